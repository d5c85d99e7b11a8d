"""Inputs for the row operations, in every dtype mix and memory layout that occurs."""

import contextlib
from dataclasses import dataclass

import torch

from ditfast import ops

INPUTS = {
    "layer_norm_modulate": ("x", "shift", "scale"),
    "gated_residual": ("x", "y", "gate", "bias"),
    "gated_residual_layer_norm_modulate": ("x", "y", "gate", "shift", "scale", "bias"),
}
OUTPUTS = {
    "layer_norm_modulate": ("h",),
    "gated_residual": ("x_new",),
    "gated_residual_layer_norm_modulate": ("x_new", "h"),
}
DTYPES = {
    "fp32": (torch.float32, torch.float32),  # dtype of the residual stream, of the branches
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),  # as under autocast
}
LAYOUTS = ("dense", "strided", "permuted", "expanded")


@dataclass
class Case:
    op: str
    dtype: str = "fp32"
    b: int = 3
    n: int = 5
    d: int = 32
    layout: str = "dense"
    bias: bool = True
    device: str = "cpu"

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16) if self.dtype == "mixed" else contextlib.nullcontext()

    def call(self, *args, backend):
        """Call the operation with positional inputs in the order of INPUTS, under autocast if dtypes are mixed."""
        named = dict(zip(INPUTS[self.op], args, strict=True))
        with self.autocast():
            return getattr(ops, self.op)(**named, backend=backend)

    def inputs(self, dtype=None):
        """Leaves that require grad, in the order of INPUTS; ``dtype`` overrides the case's dtypes."""
        g = torch.Generator().manual_seed(7)
        stream, branch = DTYPES[self.dtype]
        rows = {"x": (stream, 3.0), "y": (branch, 1.0)}
        values = {}
        for name in ("x", "y", "shift", "scale", "gate", "bias"):
            kind, spread = rows.get(name, (stream if name == "bias" else branch, 1.0))
            shape = (self.b, self.n, self.d) if name in rows else (self.b, self.d) if name != "bias" else (self.d,)
            t = (torch.randn(shape, generator=g) * spread + (0.5 if name == "x" else 0)).to(kind)
            t = self.lay_out(t).to(self.device, dtype or kind) if dtype is None else t.to(self.device, dtype)
            values[name] = t.requires_grad_()
        if not self.bias:
            values["bias"] = None
        return [values[name] for name in INPUTS[self.op]]

    def lay_out(self, t):
        """The same values in a different memory layout."""
        if self.layout == "strided":  # views into wider tensors, like chunks of one (B, 6D) tensor
            wide = torch.full((*t.shape[:-1], 3 * self.d), float("nan"), dtype=t.dtype)
            wide[..., self.d : 2 * self.d] = t
            return wide[..., self.d : 2 * self.d]
        if self.layout == "permuted":  # dense, but D is not the innermost dimension
            return t.mT.contiguous().mT if t.dim() > 1 else t
        return t

    def weights(self):
        """Gradients of the outputs; with zero strides, as ``.sum()`` makes them, if the layout is expanded."""
        g = torch.Generator().manual_seed(8)
        result = []
        for name in OUTPUTS[self.op]:
            stream, branch = DTYPES[self.dtype]
            kind = branch if name == "h" else stream
            if self.layout == "expanded":
                w = torch.randn((), generator=g).to(kind).expand(self.b, self.n, self.d)
            else:
                w = self.lay_out(torch.randn(self.b, self.n, self.d, generator=g).to(kind))
            result.append(w.to(self.device))
        return result

    def names(self):
        gradients = [f"d{name}" for name in INPUTS[self.op] if name != "bias" or self.bias]
        return [*OUTPUTS[self.op], *gradients]
