"""Analysis of a kernel's machine code: registers, widths of accesses, instructions issued per row.

**Issue slots per row.** A multiprocessor has four schedulers, and each issues at most one instruction of one warp per
clock. Every instruction of the loop over tokens is issued once by each warp of the program, even if its predicate is
false or lanes are idle. So a row costs a multiprocessor at least

    slots = instructions of the loop's body * warps / rows per iteration / 4

clocks, however many programs share it. The loop is the range of addresses that a backward branch spans and that
stores rows to global memory; if the compiler made several copies, the one that stores the most rows counts. Rows per
iteration follow from the bytes covered by its stores of 8 bytes or more, over all lanes and outputs. NOPs do not
count. What precedes and follows the loop is counted separately, per program.
"""

import math
import re
import subprocess
import tempfile
from pathlib import Path

SCHEDULERS = 4  # per multiprocessor
LANES = 32
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.M)
BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
STORE = re.compile(r"\bSTG\.E(\S*)")


def tool(name: str) -> Path:
    """Path of a CUDA toolkit program bundled with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run(
            [tool("cuobjdump"), option, file.name], capture_output=True, text=True, check=True
        ).stdout


def wgmma_advice(ptx: str, arch: int) -> list[str]:
    """Codes of ptxas' advice on wgmma, e.g. C7510 or C7515: it had to serialize or wait. Empty without wgmma."""
    if "wgmma" not in ptx:
        return []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool("ptxas"), "-v", f"--gpu-name=sm_{arch}a", source, "-o", source.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"\bC75\d\d\b", done.stdout + done.stderr)))


def access_bytes(suffix: str) -> int:
    """Bytes per lane of a load or store, from what follows its name, as in ``.128.CONSTANT``."""
    for name, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if name in suffix:
            return size
    return 4


def inspect(cubin: bytes) -> dict:
    """Registers, stack bytes, spills, the widths of accesses to global memory, and the SASS itself.

    Spills show in the stack, or as accesses to local memory: LOCAL of the resource usage is 0 even then.
    """
    usage, sass = cuobjdump(cubin, "--dump-resource-usage"), cuobjdump(cubin, "-sass")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))
    accesses = [access_bytes(suffix) for _, suffix in re.findall(r"\b(LDG|STG|LDGSTS)\.E(\S*)", sass)]
    return {
        "registers": registers,
        "stack": stack,
        "spills": len(re.findall(r"\b(STL|LDL)\b", sass)),
        "widths": sorted(set(accesses)),
        "narrow": sum(size < 4 for size in accesses),
        "words": sum(size == 4 for size in accesses),
        "tensor_core": len(re.findall(r"\b(HMMA|HGMMA|QGMMA)", sass)),
        "sass": sass,
    }


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of everything but NOPs."""
    found = ((int(address, 16), text) for address, text in INSTRUCTION.findall(sass))
    return [(address, text) for address, text in found if not re.search(r"\bNOP\b", text)]


def loops(code):
    """(instructions, bytes that a lane stores to rows) of each loop that stores any."""
    for address, text in code:
        branch = BRANCH.search(text)
        if branch and int(branch.group(1), 16) < address:
            body = [t for a, t in code if int(branch.group(1), 16) <= a <= address]
            sizes = [access_bytes(s.group(1)) for t in body if (s := STORE.search(t))]
            stored = sum(size for size in sizes if size >= 8)
            if stored:
                yield len(body), stored


def issue_slots(sass: str, warps: int, column_bytes: int, d: int, lanes: int) -> dict:
    """Per row: ``slots`` of the loop; per program: ``outside``, slots of everything else.

    Args:
        column_bytes: bytes stored to all outputs for one column of a row.
        d: columns of a row, padded to ``lanes``. The compiler drops stores that are entirely past d.
    """
    code = instructions(sass)
    found = list(loops(code))
    size, stored = max(found, key=lambda loop: loop[1])
    columns = stored * LANES * warps / column_bytes
    rows = math.ceil(columns / lanes)
    if columns < rows * d:
        raise ValueError(f"a loop stores {columns:g} columns, not an integer number of rows of {d} to {lanes}")
    outside = len(code) - sum(size for size, _ in found)
    return {
        "slots": size * warps / rows / SCHEDULERS,
        "outside": outside * warps / SCHEDULERS,
        "rows_per_iteration": rows,
        "loops": len(found),
    }
