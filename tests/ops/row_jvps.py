"""Primal and tangent of the row operations, by a kernel in one pass and by the reference."""

from dataclasses import dataclass
from importlib import import_module

import torch
from contract import assert_contract
from ops.row_ops import DTYPES, INPUTS, OUTPUTS, Case

from ditfast.ops import reference

LN, GATED, JUNCTION = INPUTS
FILE = {LN: LN, GATED: GATED, JUNCTION: "junction"}
EVERY = ("x", "y", "gate", "shift", "scale", "bias")
EPS = 1e-6


@dataclass
class RowJvp(Case):
    """Inputs and tangents, with separate memory layouts; a tangent is zero unless its input is ``given``."""

    given: tuple[str, ...] = EVERY
    tangent_layout: str = "dense"

    def kernel(self):
        return import_module(f"ditfast.kernels.{FILE[self.op]}")

    def primals(self):
        inputs = (None if t is None else t.detach() for t in self.inputs())
        return dict(zip(INPUTS[self.op], inputs, strict=True))

    def tangents(self):
        """By input name, None for zero; every sample and every token has a different one."""
        g = torch.Generator().manual_seed(9)
        primals = self.primals()
        values = {k: torch.randn(t.shape, generator=g).to(t.dtype) for k, t in primals.items() if t is not None}
        given = {k: self.lay_out_tangent(t).to(self.device) for k, t in values.items() if k in self.given}
        return dict.fromkeys(primals) | given

    def lay_out_tangent(self, t):
        if self.tangent_layout == "expanded":  # zero strides along all but the last dimension
            return t[(slice(1),) * (t.dim() - 1)].expand(t.shape)
        return Case(self.op, b=self.b, n=self.n, d=self.d, layout=self.tangent_layout).lay_out(t)

    def options(self):
        return {} if self.op == GATED else {"eps": EPS, "out_dtype": DTYPES[self.dtype][1]}

    def by_kernel(self, tangents=None):
        """By name: outputs, mean and rstd if any, and the outputs' tangents."""
        tangents = self.tangents() if tangents is None else tangents
        tangents = {f"{name}_t": t for name, t in tangents.items()}
        found = self.kernel().jvp(**self.primals(), **tangents, **self.options())
        statistics = () if self.op == GATED else ("mean", "rstd")
        return dict(zip((*OUTPUTS[self.op], *statistics, *self.tangent_names()), found, strict=True))

    def by_reference(self, dtype=None):
        """Like `by_kernel`, without statistics; in ``dtype``, or in the inputs' dtype."""
        primals = {k: t.to(dtype or t.dtype) for k, t in self.primals().items() if t is not None}
        given = {k: t for k, t in self.tangents().items() if t is not None}
        tangents = {k: given[k].to(t.dtype) if k in given else torch.zeros_like(t) for k, t in primals.items()}
        options = self.options() | ({"out_dtype": dtype} if dtype and self.op != GATED else {})

        def outputs(*values):
            out = getattr(reference, self.op)(**dict(zip(primals, values, strict=True)), **options)
            return out if isinstance(out, tuple) else (out,)

        out, out_t = torch.func.jvp(outputs, tuple(primals.values()), tuple(tangents.values()))
        return dict(zip((*OUTPUTS[self.op], *self.tangent_names()), (*out, *out_t), strict=True))

    def tangent_names(self):
        return [f"{name}_t" for name in OUTPUTS[self.op]]

    def assert_right(self):
        """Outputs and tangents meet the contract."""
        got, low, ref = self.by_kernel(), self.by_reference(), self.by_reference(torch.float64)
        for name in ref:
            assert_contract(name, got[name], low[name], ref[name])
