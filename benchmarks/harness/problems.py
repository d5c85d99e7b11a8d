"""Every operation as a problem of given size and dtypes: inputs, results of a backend, reference results."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ditfast import ops
from ditfast.ops import contract
from ditfast.ops.attention import heads_of
from ditfast.ops.mlp import gelu_backward
from ditfast.ops.op import PRECISIONS, Op, RandomTensors

CHUNK_ELEMENTS = 2**25  # float64 elements per tensor at a time, to bound memory


def _gelu(dact, pre, *, backend, recompute):
    """The middle pass of the MLP's backward; kernels overwrite dact."""
    dpre, db1, act = gelu_backward(dact.flatten(0, 1), pre.flatten(0, 1), recompute, backend)
    found = dpre.view_as(pre), db1
    return (*found, act.view_as(pre)) if recompute else found


def _gelu_arguments(t, batch, tokens, dim):
    return {name: t(batch, tokens, 4 * dim, spread=spread) for name, spread in (("dact", 1.0), ("pre", 3.0))}


def _pass_of_mlp(recompute: bool) -> Op:
    moved = ops.MLP.moved["bwd, recompute" if recompute else "bwd"]
    return replace(
        ops.MLP,
        function=partial(_gelu, recompute=recompute),
        arguments=_gelu_arguments,
        outputs=("dpre", "db1", "act") if recompute else ("dpre", "db1"),
        moved={"bwd": moved},
    )


MLP_PASSES = {"gelu": _pass_of_mlp(recompute=False), "gelu_recompute": _pass_of_mlp(recompute=True)}
PROBLEMS = {op.name: op for op in ops.ALL} | MLP_PASSES
FIXED = {"patch_embed": ("x",)}  # a model needs no gradient for its image


def gpu_kernels() -> list[tuple[str, str, str]]:
    """(op, backend, precision) of every kernel for GPUs."""
    return [
        (op.name, backend, precision)
        for op in ops.ALL
        for backend in op.kernels
        if backend != "host"
        for precision in op.backends[backend]
    ]


@dataclass(frozen=True)
class Problem:
    name: str  # a key of PROBLEMS
    batch: int
    tokens: int
    dim: int
    dtype: str  # a key of PRECISIONS
    device: str

    @property
    def op(self) -> Op:
        return PROBLEMS[self.name]

    @property
    def is_whole_op(self) -> bool:
        """Whether it is an operation with gradients rather than one pass of it."""
        return self.name not in MLP_PASSES

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, self.dim

    def context(self):
        on = self.dtype == "autocast"
        return torch.autocast(self.device, torch.bfloat16) if on else nullcontext()

    def call(self, *inputs, backend):
        """Tuple of outputs, in the dtypes that autocast produces."""
        named = dict(zip(self.input_names, inputs, strict=True))
        with self.context():
            outputs = self.op.function(**self._constants, **named, backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def inputs(self) -> list[torch.Tensor]:
        """Leaves in the order of the operation's arguments."""
        fixed = FIXED.get(self.name, ())
        return [
            t.requires_grad_(self.is_whole_op and name not in fixed)
            for name, t in self._arguments().items()
            if isinstance(t, torch.Tensor)
        ]

    def _arguments(self):
        return self.op.arguments(RandomTensors(PRECISIONS[self.dtype], self.device), *self.shape)

    @cached_property
    def _fakes(self):
        """The arguments as fake tensors."""
        with FakeTensorMode():
            return self._arguments()

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        return tuple(name for name, value in self._fakes.items() if isinstance(value, torch.Tensor))

    @cached_property
    def _constants(self):
        return {name: value for name, value in self._fakes.items() if not isinstance(value, torch.Tensor)}

    def bytes_moved(self, mode: str) -> int:
        """Minimum bytes that a pass reads and writes, not counting modulation, statistics and partial sums."""
        inputs = [self._fakes[name] for name in self.input_names]
        with torch.no_grad(), inputs[0].fake_mode:
            outputs = self.call(*inputs, backend="reference")
        sizes = {name: t.nbytes for name, t in self._fakes.items() if name in self.input_names}
        sizes |= {name: t.nbytes for name, t in zip(self.op.outputs, outputs, strict=True)}
        return sum(sizes[name if name in sizes else name.removeprefix("d")] for name in self.op.moved[mode])

    def flops(self, mode: str) -> int:
        """FLOPs of a pass's matrix products, two per multiply-add."""
        leaves, (counts, backward) = self.inputs(), (FlopCounterMode(display=False) for _ in range(2))
        with counts:
            outputs = self.call(*leaves, backend="reference")
        if mode == "fwd":
            return counts.get_total_flops()
        with backward:
            torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], self.grads(outputs))
        return backward.get_total_flops()

    def gemm(self):
        """Return (function that runs a large matrix product of such a model with the library, its FLOPs)."""
        rows, kind = self.batch * self.tokens, PRECISIONS[self.dtype][1]
        a, b = (
            torch.randn(shape, device=self.device).to(kind) for shape in ((rows, self.dim), (4 * self.dim, self.dim))
        )
        out = a.new_empty(rows, 4 * self.dim)
        return partial(torch.mm, a, b.t(), out=out), 8 * rows * self.dim**2

    def grads(self, outputs) -> list[torch.Tensor]:
        """Random gradients of the outputs, identical for every backend."""
        g = torch.Generator(self.device).manual_seed(8)
        return [torch.randn(t.shape, generator=g, device=self.device).to(t.dtype) for t in outputs]

    def results(self, backend, function=None) -> dict[str, torch.Tensor]:
        """Outputs and gradients by name; ``function`` replaces `call`."""
        leaves = self.inputs()
        outputs = (function or partial(self.call, backend=backend))(*leaves)
        return self._with_gradients(leaves, outputs, self.grads(outputs))

    def _with_gradients(self, leaves, outputs, grads):
        found = dict(zip(self.op.outputs, (t.detach() for t in outputs), strict=True))
        if self.is_whole_op:
            wanted = {f"d{name}": t for name, t in zip(self.input_names, leaves, strict=True) if t.requires_grad}
            found |= zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), grads), strict=True)
        if "dqkv" in found:  # each scaled to its own magnitude
            found |= zip(("dq", "dk", "dv"), found.pop("dqkv").chunk(3, dim=-1), strict=True)
        return found

    def reference(self, low) -> dict[str, torch.Tensor]:
        """Outputs and gradients in float64, a few samples at a time. ``low``: results with the outputs' dtypes."""
        leaves = self.inputs()
        grads = self.grads([low[name] for name in self.op.outputs])
        step = max(1, CHUNK_ELEMENTS // (self.tokens * self._row_elements))
        parts = []
        for start in range(0, self.batch, step):
            cut = slice(start, start + step)
            chunk = [
                (t if name in self.op.parameters else t[cut]).detach().double().requires_grad_(t.requires_grad)
                for name, t in zip(self.input_names, leaves, strict=True)
            ]
            outputs = self.call(*chunk, backend="reference")
            parts.append(self._with_gradients(chunk, outputs, [g[cut].double() for g in grads[: len(outputs)]]))
        return {name: self._join(name, [part[name] for part in parts]) for name in parts[0]}

    @property
    def _row_elements(self):
        return self.tokens * heads_of(self.dim) if "attention" in self.name else 4 * self.dim

    def _join(self, name, parts):
        return sum(parts) if self.is_per_batch(name) else torch.cat(parts)

    def is_per_batch(self, name: str) -> bool:
        """Whether a result has no batch dimension, as a parameter's gradient."""
        return name in [f"d{parameter}" for parameter in self.op.parameters]


def judge(problem: Problem, got, low=None, ref=None) -> dict[str, dict]:
    """Check ``got`` against the contract: {"fwd": verdict, "bwd": verdict} for the outputs and gradients it has.

    A verdict is the worst one of `ditfast.ops.contract.verdict`.
    """
    low = low or problem.results("reference")
    ref = ref or problem.reference(low)
    slack = _weight_error(problem) if "attention" in problem.name and problem.dtype == "fp32" else 0.0
    verdicts = {}
    for name, tensor in got.items():
        is_output = name in problem.op.outputs and problem.is_whole_op
        verdict = contract.verdict(name, tensor, low[name], ref[name], not problem.is_per_batch(name), slack)
        verdicts.setdefault("fwd" if is_output else "bwd", []).append(verdict)
    return {mode: contract.worst(found) for mode, found in verdicts.items()}


def _weight_error(problem):
    """Error of a weight exp(logit - lse) recomputed in backward, due to float32 logits and log-sum-exp.

    PyTorch's plain softmax divides by its own sum and does not have this error.
    """
    worst, heads = 0.0, heads_of(problem.dim)
    first, *linear = (t.detach().double() for t in problem.inputs())
    for sample in first:
        sample = F.linear(sample, *linear) if linear else sample
        q, k, _ = sample.unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        logits = q @ k.mT * q.shape[-1] ** -0.5  # (H, N, N)
        worst = max(worst, logits.abs().max().item(), logits.logsumexp(-1).abs().max().item())
    return 2 * torch.finfo(torch.float32).eps * worst
