"""The workload: a stack of blocks, its inputs, its FLOPs and its matrix products."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch

from ditfast.models.presets import SIZES
from harness.block.eager import EagerBlock

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "autocast": torch.float32}
PRODUCTS = {"fwd": 1, "fwd_bwd": 3}  # each matrix product has two more in backward


@dataclass(frozen=True)
class Workload:
    model: str
    image_size: int
    batch: int
    blocks: int
    dtype: str
    device: str

    @property
    def dim(self):
        return self._size["hidden_size"]

    @property
    def heads(self):
        return self._size["num_heads"]

    @property
    def patch(self):
        return int(self.model.split("/")[1])

    @property
    def tokens(self):
        return (self.image_size // 8 // self.patch) ** 2

    @property
    def unit(self):
        """Bytes of one (B, N, D) tensor in a 16-bit dtype."""
        return self.batch * self.tokens * self.dim * 2

    @property
    def _size(self):
        return SIZES[self.model.removeprefix("DiT-").split("/")[0]]

    def as_dict(self):
        return asdict(self) | {"tokens": self.tokens, "dim": self.dim, "heads": self.heads}

    def macs(self, mode):
        """Multiply-adds of one sample in the stack's Linears and attention; the paper calls them flops."""
        n, d = self.tokens, self.dim
        return PRODUCTS[mode] * self.blocks * (12 * n * d * d + 2 * n * n * d + 6 * d * d)

    def flops(self, mode):
        """FLOPs, two per multiply-add, for the whole batch, without recomputation."""
        return 2 * self.batch * self.macs(mode)

    def context(self):
        if self.dtype == "autocast":
            return torch.autocast(self.device, torch.bfloat16)
        return nullcontext()


def make_blocks(workload: Workload) -> torch.nn.ModuleList:
    """Blocks with random weights, gates included: adaLN-Zero's zero gates would hide every error in their branch."""
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList([EagerBlock(workload.dim, workload.heads) for _ in range(workload.blocks)])
    for name, p in blocks.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.xavier_uniform_(p)
        else:
            torch.nn.init.normal_(p, std=0.02)
    return blocks.to(workload.device, DTYPES[workload.dtype])


def make_inputs(workload: Workload):
    """x (B, N, D), c (B, D), and the gradient of the output (B, N, D): random."""
    w, generator = workload, torch.Generator().manual_seed(1)
    shapes = [(w.batch, w.tokens, w.dim), (w.batch, w.dim), (w.batch, w.tokens, w.dim)]
    x, c, grad = (torch.randn(s, generator=generator).to(w.device, DTYPES[w.dtype]) for s in shapes)
    return x.requires_grad_(), c.requires_grad_(), grad


def forward(stack, workload, inputs):
    """The output only, as in inference."""
    with torch.no_grad(), workload.context():
        return [stack(*inputs[:2])]


def forward_backward(stack, workload, inputs):
    """The output, and the gradients with respect to x, c and the parameters."""
    x, c, grad = inputs
    with workload.context():
        out = stack(x, c)
    return [out, *torch.autograd.grad(out, [x, c, *stack.parameters()], grad)]


RUN = {"fwd": forward, "fwd_bwd": forward_backward}


def make_gemms(workload: Workload, mode: str):
    """Return (function that runs the stack's large matrix products alone, with the library; its FLOPs).

    Four Linears over all tokens; with backward, also the gradients of their inputs and weights.
    """
    w, d = workload, workload.dim
    dtype = torch.bfloat16 if w.dtype == "autocast" else DTYPES[w.dtype]
    rows, products = w.batch * w.tokens, []
    for inner, outer in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)):
        x, weight, y = (
            torch.randn(shape, device=w.device, dtype=dtype)
            for shape in ((rows, inner), (outer, inner), (rows, outer))
        )
        products.append((x, weight.t()))
        if mode == "fwd_bwd":
            products += [(y, weight), (y.t(), x)]
    products = [(a, b, torch.empty(a.shape[0], b.shape[1], device=w.device, dtype=dtype)) for a, b in products]

    def run():
        for _ in range(w.blocks):
            for a, b, out in products:
                torch.mm(a, b, out=out)

    return run, 2 * w.blocks * sum(a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in products)
