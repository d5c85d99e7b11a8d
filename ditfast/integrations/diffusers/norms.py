"""adaLN norms shared by many diffusers models: the norm and its modulation in one pass."""

from diffusers.models import normalization
from torch import nn

from ditfast.integrations.diffusers.parts import fits, modulated, why_not_bare
from ditfast.integrations.diffusers.patched import Patched
from ditfast.models.linears import call_linears
from ditfast.ops.autocast import autocasts


class _Norm(Patched):
    norm: nn.LayerNorm

    def why_not_parts(self) -> str | None:
        return why_not_bare("its norm", self.norm)

    def _covers(self, x, emb):
        # under autocast diffusers' output is float32, the operation's is in the dtype that a Linear reads
        return fits(x, emb) and not autocasts(x) and self.why_not() is None


class AdaLayerNormZero(_Norm, normalization.AdaLayerNormZero):
    """With the gates and the second branch's rows: x (B, N, D), emb (B, D) -> h (B, N, D), four rows (B, D)."""

    theirs = normalization.AdaLayerNormZero

    def why_not_parts(self) -> str | None:
        return super().why_not_parts() or ("it embeds timesteps and labels" if self.emb is not None else None)

    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if not self._covers(x, emb):
            return self.theirs.forward(self, x, timestep, class_labels, hidden_dtype, emb)
        rows = call_linears(self.linear, self.silu(emb))  # (B, 6*D)
        shift, scale, gate, *second = rows.chunk(6, dim=1)
        return modulated(x, self.norm, shift, scale, self.backends()), gate, *second


class AdaLayerNormZeroSingle(_Norm, normalization.AdaLayerNormZeroSingle):
    """With one gate: x (B, N, D), emb (B, D) -> h (B, N, D), gate (B, D)."""

    theirs = normalization.AdaLayerNormZeroSingle

    def forward(self, x, emb=None):
        if not self._covers(x, emb):
            return self.theirs.forward(self, x, emb)
        shift, scale, gate = call_linears(self.linear, self.silu(emb)).chunk(3, dim=1)
        return modulated(x, self.norm, shift, scale, self.backends()), gate


class AdaLayerNormContinuous(_Norm, normalization.AdaLayerNormContinuous):
    """Of a final layer, scale before shift: x (B, N, D), conditioning_embedding (B, C) -> h (B, N, D)."""

    theirs = normalization.AdaLayerNormContinuous

    def forward(self, x, conditioning_embedding):
        if not self._covers(x, conditioning_embedding):
            return self.theirs.forward(self, x, conditioning_embedding)
        rows = call_linears(self.linear, self.silu(conditioning_embedding).to(x.dtype))  # (B, 2*D)
        scale, shift = rows.chunk(2, dim=1)
        return modulated(x, self.norm, shift, scale, self.backends())
