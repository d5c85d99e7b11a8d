"""The blocks of FluxTransformer2DModel; attention with rotary embeddings stays diffusers'."""

import torch
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers import transformer_flux
from torch import nn

from ditfast.integrations.diffusers.known import remember
from ditfast.integrations.diffusers.parts import (
    fits,
    modulated,
    residual,
    rows_of,
    why_not_bare,
    why_not_feed_forward,
    why_not_plain,
)
from ditfast.integrations.diffusers.patched import Patched
from ditfast.integrations.diffusers.sd3 import second_half
from ditfast.models.linears import call_linears
from ditfast.models.plain import is_plain, parameter
from ditfast.ops import tangents

for _cls in (AdaLayerNormZero, AdaLayerNormZeroSingle):
    remember(_cls)


class FluxTransformerBlock(Patched, transformer_flux.FluxTransformerBlock):
    """A block of two streams."""

    theirs = transformer_flux.FluxTransformerBlock

    def why_not_parts(self) -> str | None:
        reason = None
        for name in ("norm1", "norm1_context"):
            norm = getattr(self, name)
            reason = reason or why_not_plain(name, norm, AdaLayerNormZero) or why_not_bare(f"{name}.norm", norm.norm)
        reason = reason or why_not_bare("norm2", self.norm2)
        return reason or why_not_bare("norm2_context", self.norm2_context)

    def left_parts(self) -> dict[str, str]:
        parts = {name: why_not_feed_forward(getattr(self, name)) for name in ("ff", "ff_context")}
        parts["attn"] = "joint attention with rotary embeddings stays diffusers'"
        return {name: reason for name, reason in parts.items() if reason is not None}

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        x, context = hidden_states, encoder_hidden_states  # (B, N, D), (B, M, D)
        if not (fits(x, temb) and fits(context, temb)) or self.why_not() is not None:
            return self.theirs.forward(self, x, context, temb, image_rotary_emb, joint_attention_kwargs)
        backends = self.backends()
        shift, scale, gate, *rows = rows_of(self.norm1, temb, 6, x)  # (B, D) each
        h = modulated(x, self.norm1.norm, shift, scale, backends)
        shift, scale, gate_context, *rows_context = rows_of(self.norm1_context, temb, 6, context)
        h_context = modulated(context, self.norm1_context.norm, shift, scale, backends)
        y, y_context, *y_ip = self.attn(
            hidden_states=h,
            encoder_hidden_states=h_context,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        x = second_half(x, (y, None), gate, rows, self.norm2, self.ff, backends)
        for y in y_ip:  # an IP adapter's, not gated
            x = x + y
        rest = rows_context, self.norm2_context, self.ff_context, backends
        return _clipped(second_half(context, (y_context, None), gate_context, *rest)), x


class FluxSingleTransformerBlock(Patched, transformer_flux.FluxSingleTransformerBlock):
    """A block of both streams in one sequence, with attention and MLP side by side."""

    theirs = transformer_flux.FluxSingleTransformerBlock

    def why_not_parts(self) -> str | None:
        return why_not_plain("norm", self.norm, AdaLayerNormZeroSingle) or why_not_bare("norm.norm", self.norm.norm)

    def left_parts(self) -> dict[str, str]:
        return {
            "attn": "attention with rotary embeddings stays diffusers'",
            "proj_mlp": "an MLP whose activation joins attention's output stays diffusers'",
        }

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        x, context = hidden_states, encoder_hidden_states  # (B, N, D), (B, M, D)
        if not fits(x, temb) or self.why_not() is not None:
            return self.theirs.forward(self, x, context, temb, image_rotary_emb, joint_attention_kwargs)
        backends, texts = self.backends(), context.shape[1]
        x = torch.cat([context, x], dim=1)  # (B, M + N, D)
        shift, scale, gate = rows_of(self.norm, temb, 3, x)  # (B, D) each
        h = modulated(x, self.norm.norm, shift, scale, backends)
        a = self.act_mlp(call_linears(self.proj_mlp, h))  # (B, M + N, 4*D)
        y = self.attn(hidden_states=h, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        branch = _without_bias(self.proj_out, torch.cat([y, a], dim=2))
        x = _clipped(residual(x, branch, gate, backends))
        return x[:, :texts], x[:, texts:]


def _without_bias(layer: nn.Module, x):
    """Returns (output of a Linear without its bias, that bias, or None if already added)."""
    if not is_plain(layer, nn.Linear):
        return layer(x), None
    return tangents.linear(x, parameter(layer, "weight")), parameter(layer, "bias")


def _clipped(x):
    """x, clipped to the float16 range if it is float16."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
