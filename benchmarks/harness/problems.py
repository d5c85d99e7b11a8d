"""Every operation as a problem of one size and dtype mix: inputs, what a backend computes, what is right."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
import torch.nn.functional as F

from ditfast import ops
from ditfast.ops import contract
from ditfast.ops.verify import PRECISIONS
from harness.traffic import CHANNELS, PATCH

CHUNK_ELEMENTS = 2**25  # of a tensor in float64 at a time, to bound memory
PER_BATCH = ("bias", "w1", "b1", "w2", "b2", "w_qkv", "b_qkv", "weight", "pos_embed", "dbias_of_gelu")  # summed


@dataclass(frozen=True)
class Operation:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    function: callable  # (inputs…, backend=) -> output or outputs
    op: str | None = None  # its public name, where that is another
    has_backward: bool = True


def _attention(qkv, *, backend):
    width = qkv.shape[-1] // 3
    return ops.attention(qkv, max(1, width // head_dim(width)), backend=backend)


def _qkv_attention(h, w_qkv, b_qkv, *, backend):
    heads = max(1, h.shape[-1] // head_dim(h.shape[-1]))
    return ops.qkv_attention(h, w_qkv, b_qkv, heads, backend=backend)


def head_dim(dim: int) -> int:
    """72 for the D of DiT-XL (and its fractions), else 64."""
    return 72 if dim % 72 == 0 else 64


def _gelu(dact, pre, *, backend, keep_act):
    """The pass in the middle of the MLP's backward: kernels write over dact."""
    flat = dact.flatten(0, 1), pre.flatten(0, 1)
    if backend == "triton":
        from ditfast.kernels import gelu

        act, db1 = gelu.backward_(*flat, keep_act, pre.dtype)
        return (dact, db1, act.view_as(pre)) if keep_act else (dact, db1)
    dpre = torch.ops.aten.gelu_backward(*flat, approximate="tanh")
    found = dpre.view_as(pre), dpre.sum(0)
    return (*found, F.gelu(pre, approximate="tanh")) if keep_act else found


_JUNCTION = ("x", "y", "gate", "shift", "scale", "bias")
OPERATIONS = {
    "layer_norm_modulate": Operation(("x", "shift", "scale"), ("h",), ops.layer_norm_modulate),
    "gated_residual": Operation(("x", "y", "gate", "bias"), ("x_new",), ops.gated_residual),
    "junction": Operation(
        _JUNCTION,
        ("x_new", "h"),
        lambda *a, backend: ops.gated_residual_layer_norm_modulate(*a[:5], bias=a[5], backend=backend),
        "gated_residual_layer_norm_modulate",
    ),
    "mlp": Operation(("h", "w1", "b1", "w2", "b2"), ("y",), ops.mlp),
    "gelu": Operation(("dact", "pre"), ("dpre", "dbias_of_gelu"), partial(_gelu, keep_act=False), "mlp", False),
    "gelu_recompute": Operation(
        ("dact", "pre"), ("dpre", "dbias_of_gelu", "act"), partial(_gelu, keep_act=True), "mlp", False
    ),
    "patchify": Operation(("image",), ("tokens",), partial(ops.patchify, patch_size=PATCH)),
    "unpatchify": Operation(("patches",), ("image",), partial(ops.unpatchify, patch_size=PATCH)),
    "patch_embed": Operation(
        ("image", "weight", "bias", "pos_embed"), ("out",), partial(ops.patch_embed, patch_size=PATCH)
    ),
    "attention": Operation(("qkv",), ("out",), _attention),
    "qkv_attention": Operation(("h", "w_qkv", "b_qkv"), ("out",), _qkv_attention),
}


@dataclass(frozen=True)
class Problem:
    name: str
    batch: int
    tokens: int
    dim: int
    dtype: str  # a key of PRECISIONS
    device: str
    operation: Operation = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "operation", OPERATIONS[self.name])

    @property
    def op(self) -> str:
        return self.operation.op or self.name

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, self.dim

    def context(self):
        on = self.dtype == "autocast"
        return torch.autocast(self.device, torch.bfloat16) if on else nullcontext()

    def call(self, *inputs, backend):
        """The outputs, as a tuple, in the dtypes that autocast gives them."""
        with self.context():
            outputs = self.operation.function(*inputs, backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def inputs(self) -> list[torch.Tensor]:
        """Leaves in the order of the operation's inputs. An image wants no gradient where a model embeds it."""
        g = torch.Generator(self.device).manual_seed(7)
        fixed = ("image",) if self.name == "patch_embed" else ()
        return [
            self._input(name, g).requires_grad_(self.operation.has_backward and name not in fixed)
            for name in self.operation.inputs
        ]

    def _input(self, name, g):
        b, n, d, side = self.batch, self.tokens, self.dim, PATCH * math.isqrt(self.tokens)
        stream, branch = PRECISIONS[self.dtype]
        patch = CHANNELS * PATCH**2
        shape, dtype, spread = {
            "x": ((b, n, d), stream, 3.0),
            "y": ((b, n, d), branch, 1.0),
            "h": ((b, n, d), branch, 3.0),
            **dict.fromkeys(("gate", "shift", "scale"), ((b, 6 * d), branch, 1.0)),
            "bias": ((d,), stream, 1.0),
            "w1": ((4 * d, d), stream, d**-0.5),
            "b1": ((4 * d,), stream, 0.5),
            "w2": ((d, 4 * d), stream, 0.5 * d**-0.5),
            "b2": ((d,), stream, 0.5),
            "dact": ((b, n, 4 * d), branch, 1.0),
            "pre": ((b, n, 4 * d), branch, 3.0),
            "image": ((b, CHANNELS, side, side), branch, 1.0),
            "patches": ((b, n, 2 * patch), branch, 1.0),
            "weight": ((d, CHANNELS, PATCH, PATCH), stream, patch**-0.5),
            "pos_embed": ((n, d), stream, 1.0),
            "qkv": ((b, n, 3 * d), branch, 1.0),
            "w_qkv": ((3 * d, d), stream, 0.3 * d**-0.5),  # h is larger than a norm's
            "b_qkv": ((3 * d,), stream, 0.5),
        }[name]
        t = (torch.randn(shape, generator=g, device=self.device) * spread).to(dtype)
        return t[:, d : 2 * d] if name in ("gate", "shift", "scale") else t  # a view, as into the adaLN's output

    def grads(self, outputs) -> list[torch.Tensor]:
        """Random gradients of the outputs, and the same for every backend."""
        g = torch.Generator(self.device).manual_seed(8)
        return [torch.randn(t.shape, generator=g, device=self.device).to(t.dtype) for t in outputs]

    @cached_property
    def gradient_names(self) -> tuple[str, ...]:
        leaves = zip(self.operation.inputs, self.inputs(), strict=True)
        return tuple(f"d{name}" for name, t in leaves if t.requires_grad)

    def results(self, backend, function=None) -> dict[str, torch.Tensor]:
        """Outputs and gradients by name; ``function`` takes the place of `call`."""
        leaves = self.inputs()
        outputs = (function or partial(self.call, backend=backend))(*leaves)
        return self._with_gradients(leaves, outputs, self.grads(outputs))

    def _with_gradients(self, leaves, outputs, grads):
        found = dict(zip(self.operation.outputs, (t.detach() for t in outputs), strict=True))
        if self.operation.has_backward:
            wanted = [t for t in leaves if t.requires_grad]
            found |= zip(self.gradient_names, torch.autograd.grad(outputs, wanted, grads), strict=True)
        if "dqkv" in found:  # each at its own magnitude
            found |= zip(("dq", "dk", "dv"), found.pop("dqkv").chunk(3, dim=-1), strict=True)
        return found

    def reference(self, low) -> dict[str, torch.Tensor]:
        """The same in float64, a few samples at a time. ``low``: results, for the dtypes of the outputs."""
        leaves = self.inputs()
        grads = self.grads([low[name] for name in self.operation.outputs])
        per_sample = [name not in PER_BATCH for name in self.operation.inputs]
        step = max(1, CHUNK_ELEMENTS // (self.tokens * self._row_elements))
        parts = []
        for start in range(0, self.batch, step):
            cut = slice(start, start + step)
            chunk = [t[cut] if c else t for t, c in zip(leaves, per_sample, strict=True)]
            chunk = [
                t.detach().double().requires_grad_(leaf.requires_grad) for t, leaf in zip(chunk, leaves, strict=True)
            ]
            outputs = self.call(*chunk, backend="reference")
            parts.append(self._with_gradients(chunk, outputs, [g[cut].double() for g in grads[: len(outputs)]]))
        return {name: self._join(name, [part[name] for part in parts]) for name in parts[0]}

    @property
    def _row_elements(self):
        if "attention" in self.name:
            return self.tokens * max(1, self.dim // head_dim(self.dim))
        return 4 * self.dim

    @staticmethod
    def _join(name, parts):
        return sum(parts) if is_per_batch(name) else torch.cat(parts)


def is_per_batch(name: str) -> bool:
    """Whether a result belongs to no sample: the gradient of a parameter."""
    return name in PER_BATCH or name.removeprefix("d") in PER_BATCH


def judge(problem: Problem, got, low=None, ref=None) -> dict[str, dict]:
    """Hold ``got`` to the contract: {"fwd": verdict, "bwd": verdict} as far as it holds outputs and gradients.

    A verdict is the worst of `ditfast.ops.contract.verdict`.
    """
    low = low or problem.results("reference")
    ref = ref or problem.reference(low)
    slack = _weight_error(problem) if "attention" in problem.op and problem.dtype == "fp32" else 0.0
    verdicts = {}
    for name, tensor in got.items():
        is_output = name in problem.operation.outputs and problem.operation.has_backward
        verdict = contract.verdict(name, tensor, low[name], ref[name], not is_per_batch(name), slack)
        verdicts.setdefault("fwd" if is_output else "bwd", []).append(verdict)
    return {mode: contract.worst(found) for mode, found in verdicts.items()}


def _weight_error(problem):
    """What float32 logits and their log-sum-exp cost a weight exp(logit - lse) that is computed again in backward.

    PyTorch's plain softmax divides by its own sum and has no such error.
    """
    worst, heads = 0.0, problem.dim // head_dim(problem.dim)
    first, *linear = (t.detach().double() for t in problem.inputs())
    for sample in first:
        sample = F.linear(sample, *linear) if linear else sample
        q, k, _ = sample.unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        logits = q @ k.mT * q.shape[-1] ** -0.5  # (H, N, N)
        worst = max(worst, logits.abs().max().item(), logits.logsumexp(-1).abs().max().item())
    return 2 * torch.finfo(torch.float32).eps * worst
