"""The block of DiTTransformer2DModel (adaLN-Zero) and of PixArtTransformer2DModel (adaLN-single)."""

from diffusers.models import attention
from diffusers.models.normalization import AdaLayerNormZero

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

remember(AdaLayerNormZero)


class BasicTransformerBlock(Patched, attention.BasicTransformerBlock):
    """With norm_type "ada_norm_zero" and no cross-attention, or "ada_norm_single".

    Sources: Peebles & Xie, section 3.2; Chen et al., "PixArt-alpha", section 2.3.
    """

    theirs = attention.BasicTransformerBlock

    def why_not_parts(self) -> str | None:
        if self.norm_type not in ("ada_norm_zero", "ada_norm_single"):
            return f"norm_type is {self.norm_type}"
        if self.pos_embed is not None or self.only_cross_attention or self._chunk_size is not None:
            return "it embeds positions, attends to another sequence first, or computes its MLP in chunks"
        if self.norm_type == "ada_norm_single":
            return why_not_bare("norm1", self.norm1) or why_not_bare("norm2", self.norm2)
        if self.attn2 is not None:
            return "it has cross-attention"
        reason = why_not_plain("norm1", self.norm1, AdaLayerNormZero) or why_not_bare("norm1.norm", self.norm1.norm)
        return reason or why_not_bare("norm3", self.norm3)

    def left_parts(self) -> dict[str, str]:
        parts = {"attn1": why_not_attention(self.attn1), "ff": why_not_feed_forward(self.ff)}
        if self.attn2 is not None:
            parts["attn2"] = "cross-attention stays diffusers'"
        return {name: reason for name, reason in parts.items() if reason is not None}

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
        added_cond_kwargs=None,
    ):
        x = hidden_states  # (B, N, D)
        rows = None
        if not cross_attention_kwargs and x.dim() == 3 and self.why_not() is None:
            rows = self._rows(x, timestep, class_labels)
        if rows is None:
            rest = encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs
            return self.theirs.forward(self, x, attention_mask, *rest, class_labels, added_cond_kwargs)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows  # (B, D) each
        is_zero, backends = self.norm_type == "ada_norm_zero", self.backends()
        first, second = (self.norm1.norm, self.norm3) if is_zero else (self.norm1, self.norm2)
        h = modulated(x, first, shift_msa, scale_msa, backends)
        branch = self_attention(self.attn1, h, backends, attention_mask=attention_mask)
        if self.attn2 is None:
            x, h = junction(x, branch, gate_msa, second, shift_mlp, scale_mlp, backends)
        else:
            x = residual(x, branch, gate_msa, backends)
            x = x + self.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
            h = modulated(x, second, shift_mlp, scale_mlp, backends)
        return residual(x, feed_forward(self.ff, h, backends), gate_mlp, backends)

    def _rows(self, x, timestep, class_labels):
        """Shifts, scales and gates, six (B, D); None if the conditioning has another shape."""
        if self.norm_type == "ada_norm_single":  # timestep is (B, 6*D)
            return (self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)).unbind(1)
        emb = self.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)  # (B, D)
        return rows_of(self.norm1, emb, 6, x) if fits(x, emb) else None
