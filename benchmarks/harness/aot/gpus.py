"""GPUs to predict for, and the assumptions about them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    copy: float  # bytes per second of a large copy, reads plus writes
    clock: float = 1.98e9  # Hz, when memory-bound
    multiprocessors: int = 132
    registers: int = 65536  # 32-bit; this and the next are per multiprocessor
    warps: int = 64
    blocks: int = 32
    shared: int = 227 * 1024

    def memory_clocks(self, row_bytes: float) -> float:
        """Clocks of one multiprocessor in which its share of the bandwidth moves a row."""
        return row_bytes * self.multiprocessors * self.clock / self.copy

    def resident(self, registers: int, warps: int, shared: int) -> int:
        """Blocks that fit on a multiprocessor; registers come in groups of 8, a block costs 1 KB of shared memory."""
        of_registers = self.registers // (-(-registers // 8) * 8 * 32 * warps)
        return min(self.blocks, self.warps // warps, of_registers, self.shared // (shared + 1024))


# H200: 4.3 TB/s of 4.8 have been measured; the H100 (SXM, HBM3) is assumed to reach the same share of its 3.35
GPUS = {"H200": GPU(copy=4.3e12), "H100": GPU(copy=3.35e12 * 4.3 / 4.8)}
