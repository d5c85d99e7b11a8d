"""The blocks of SD3Transformer2DModel and of its ControlNet."""

from diffusers.models import attention
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from diffusers.models.transformers import transformer_sd3
from torch import nn

from ditfast.integrations.diffusers.known import remember
from ditfast.integrations.diffusers.parts import (
    feed_forward,
    fits,
    junction,
    modulated,
    residual,
    rows_of,
    self_attention,
    why_not_attention,
    why_not_bare,
    why_not_feed_forward,
    why_not_plain,
)
from ditfast.integrations.diffusers.patched import Patched
from ditfast.models.linears import call_linears

for _cls in (AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX):
    remember(_cls)


class SD3SingleTransformerBlock(Patched, transformer_sd3.SD3SingleTransformerBlock):
    """A block of one stream, like a DiT's."""

    theirs = transformer_sd3.SD3SingleTransformerBlock

    def why_not_parts(self) -> str | None:
        reason = why_not_plain("norm1", self.norm1, AdaLayerNormZero) or why_not_bare("norm1.norm", self.norm1.norm)
        return reason or why_not_bare("norm2", self.norm2)

    def left_parts(self) -> dict[str, str]:
        parts = {"attn": why_not_attention(self.attn), "ff": why_not_feed_forward(self.ff)}
        return {name: reason for name, reason in parts.items() if reason is not None}

    def forward(self, hidden_states, temb):
        x = hidden_states  # (B, N, D)
        if not fits(x, temb) or self.why_not() is not None:
            return self.theirs.forward(self, x, temb)
        shift_msa, scale_msa, gate_msa, *rows = rows_of(self.norm1, temb, 6, x)  # (B, D) each
        backends = self.backends()
        h = modulated(x, self.norm1.norm, shift_msa, scale_msa, backends)
        branch = self_attention(self.attn, h, backends, encoder_hidden_states=None)
        return second_half(x, branch, gate_msa, rows, self.norm2, self.ff, backends)


def second_half(x, branch, gate, rows, norm, ff, backends):
    """The rest of a block after its attention; rows are shift, scale and gate of the MLP."""
    shift_mlp, scale_mlp, gate_mlp = rows  # (B, D) each
    x, h = junction(x, branch, gate, norm, shift_mlp, scale_mlp, backends)
    return residual(x, feed_forward(ff, h, backends), gate_mlp, backends)


class JointTransformerBlock(Patched, attention.JointTransformerBlock):
    """A block of two streams; joint attention stays diffusers'.

    Source: Esser et al., "Scaling Rectified Flow Transformers", section 4.
    """

    theirs = attention.JointTransformerBlock

    def why_not_parts(self) -> str | None:
        if self._chunk_size is not None:
            return "it computes its MLP in chunks"
        norm: type[nn.Module] = SD35AdaLayerNormZeroX if self.use_dual_attention else AdaLayerNormZero
        reason = why_not_plain("norm1", self.norm1, norm) or why_not_bare("norm1.norm", self.norm1.norm)
        norm = AdaLayerNormContinuous if self.context_pre_only else AdaLayerNormZero
        reason = reason or why_not_plain("norm1_context", self.norm1_context, norm)
        reason = reason or why_not_bare("norm1_context.norm", self.norm1_context.norm)
        reason = reason or why_not_bare("norm2", self.norm2)
        return reason or (None if self.context_pre_only else why_not_bare("norm2_context", self.norm2_context))

    def left_parts(self) -> dict[str, str]:
        parts = {"attn": "joint attention stays diffusers'", "ff": why_not_feed_forward(self.ff)}
        if self.use_dual_attention:
            parts["attn2"] = why_not_attention(self.attn2)
        if not self.context_pre_only:
            parts["ff_context"] = why_not_feed_forward(self.ff_context)
        return {name: reason for name, reason in parts.items() if reason is not None}

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        x, context = hidden_states, encoder_hidden_states  # (B, N, D), (B, M, D)
        if not (fits(x, temb) and fits(context, temb)) or self.why_not() is not None:
            return self.theirs.forward(self, x, context, temb, joint_attention_kwargs)
        backends, kwargs = self.backends(), joint_attention_kwargs or {}
        parts = 9 if self.use_dual_attention else 6
        shift_msa, scale_msa, gate_msa, *rows = rows_of(self.norm1, temb, parts, x)  # (B, D) each
        h = modulated(x, self.norm1.norm, shift_msa, scale_msa, backends)
        h_context, *rows_context = self._begin_context(context, temb, backends)
        y, y_context = self.attn(hidden_states=h, encoder_hidden_states=h_context, **kwargs)
        branch = y, None
        if self.use_dual_attention:
            shift2, scale2, gate2 = rows[3:]
            h = modulated(x, self.norm1.norm, shift2, scale2, backends)
            x = residual(x, branch, gate_msa, backends)
            branch, gate_msa = self_attention(self.attn2, h, backends, **kwargs), gate2
        x = second_half(x, branch, gate_msa, rows[:3], self.norm2, self.ff, backends)
        if self.context_pre_only:
            return None, x
        gate, *rows = rows_context
        rest = rows, self.norm2_context, self.ff_context, backends
        return second_half(context, (y_context, None), gate, *rest), x

    def _begin_context(self, context, temb, backends):
        """The context's input to attention (B, M, D), and four rows (B, D) for the rest of the block, if any."""
        norm = self.norm1_context
        if self.context_pre_only:
            rows = call_linears(norm.linear, norm.silu(temb).to(context.dtype))  # (B, 2*D)
            scale, shift = rows.chunk(2, dim=1)
            return (modulated(context, norm.norm, shift, scale, backends),)
        shift, scale, *rows = rows_of(norm, temb, 6, context)  # (B, D) each
        return modulated(context, norm.norm, shift, scale, backends), *rows
