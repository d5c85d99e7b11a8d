"""DiT: a transformer over latent patches, conditioned on timestep and class."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from os import PathLike
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ditfast import ops
from ditfast.models.carry import Carry, add_pending, as_tokens, start_carry
from ditfast.models.conditioning import CONDITIONINGS, check_conditioning
from ditfast.models.embed import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    check_labels,
    check_latents,
    check_stretch,
    check_timesteps,
    embed_times,
    is_patch_projection,
)
from ditfast.models.guidance import check_guidance, guide
from ditfast.models.initialize import initialize
from ditfast.models.limits import check_arguments, check_tensors
from ditfast.models.plain import is_known, is_plain, reject_symbolic, remember_forward
from ditfast.models.tangents import check_tangents, reject_layer
from ditfast.models.whole import whole_embedding
from ditfast.models.wrappers import accepts_carry, is_native
from ditfast.ops.backends.choice import names_in_force, use_backend
from ditfast.ops.registration import may_be_dual


@remember_forward
class DiT(nn.Module):
    """Diffusion Transformer with adaLN-Zero blocks, or one of the paper's other block types.

    Args:
        input_size: S, the height and width of the latent in pixels, or (height, width).
        patch_size: p, in latent pixels; must divide S.
        in_channels: C of the latent.
        hidden_size: D; a multiple of 4 and of num_heads.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: width of a block's MLP over D.
        class_dropout_prob: probability that training replaces a label by the null label.
        num_classes: K; the null label is K.
        learn_sigma: also predict a variance: C_out = 2 * C, else C.
        backend: the backend that the model's operations prefer; None: see `ditfast.use_backend`.
        recompute_mlp: recompute the MLPs' activations in backward to save memory.
        conditioning: how timestep and class enter: "adaln_zero", "adaln" (no gates), "cross_attention" (to both,
            after self-attention) or "in_context" (two extra tokens, removed after the last block).
        timestep_freq_shift, norm2_eps: 1 and 1e-5 match diffusers' DiT.
        second_time: predict averages over a time interval, as in `ditfast.flow.MeanFlow`; forward then takes its
            other end, r.

    Attributes:
        config: the arguments by name.
        sampling: how to sample from the model, see `ditfast.checkpoints.sampling`; {} if unknown, as for a new model:
            set it after training in a loop of your own, for `save_pretrained` to record.

    Raises:
        ValueError: an argument is out of range (`limits`), or the backend or conditioning is unknown.

    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", section 3.2.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        backend: str | None = None,
        recompute_mlp: bool = False,
        conditioning: str = "adaln_zero",
        timestep_freq_shift: float = 0,
        norm2_eps: float = 1e-6,
        second_time: bool = False,
    ):
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(config)
        super().__init__()
        self.config = config
        self.sampling: dict[str, Any] = {"objective": "meanflow"} if second_time else {}  # nobody has said more
        names_in_force(backend)  # reject an unknown name now, not in the first forward
        check_conditioning(conditioning)
        self.learn_sigma = learn_sigma
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.backend = backend
        self.conditioning = conditioning

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, freq_shift=timestep_freq_shift)
        self.r_embedder = TimestepEmbedder(hidden_size, freq_shift=timestep_freq_shift) if second_time else None
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        pos_embed = torch.zeros(1, self.x_embedder.num_patches, hidden_size)  # (1, N, D)
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)
        kind = CONDITIONINGS[conditioning]
        blocks = [kind.block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)]
        for block in blocks:
            block.mlp.recompute = recompute_mlp
            block.norm2.eps = norm2_eps
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = kind.final(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Set every parameter: see `ditfast.models.initialize`."""
        initialize(self)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches to images: (B, N, p*p*C_out) -> (B, C_out, S, S), any square N if the model's latents are square.

        Raises:
            ValueError: N is not a perfect square, or does not match the model's rectangle.
        """
        check_tensors(x=x)
        rows, columns = getattr(self.x_embedder, "grid_size", (1, 1))  # a replaced embedder may lack it: any square
        if rows == columns and math.isqrt(x.shape[1]) ** 2 != x.shape[1]:
            raise ValueError(f"x must have a square number of tokens, got shape {tuple(x.shape)}")
        grid = None if rows == columns else (rows, columns)
        return ops.unpatchify(x, self.patch_size, grid, backend=names_in_force(self.backend))

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, return_hidden: Sequence[int] | None = None, r: Tensor | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Predict the noise (and variance) in a noisy latent, or a velocity: whatever the model was trained for.

        Args:
            x: (B, C, S, S) noisy latents.
            t: (B,) timesteps, integer or fractional; or (1,) for all samples.
            y: (B,) integer labels, K for the null label; or (1,).
            return_hidden: indices of blocks whose output tokens to return as well.
            r: (B,) the other end of the time interval from t, with ``second_time``; or (1,). None for t itself.

        Returns:
            (B, C_out, S, S); with ``return_hidden`` also a list of (B, N, D) tokens, one per index, in that order.

        Raises:
            TypeError, ValueError: an argument of the model's own embedders has the wrong dtype, shape or device.
            IndexError: a label is outside the table (on the CPU).
        """
        reject_symbolic(x)
        wanted = self._wanted_blocks(return_hidden)
        self.check_input(x, t, y, r)
        backends = names_in_force(self.backend)
        tokens = self.embed_patches(x, backends)  # (B, N, D); first, to keep the order of random draws
        t = embed_times(self.t_embedder, self.r_embedder, t, r, x.dtype)  # (B or 1, D)
        y = self.y_embedder(y, self.training)  # (B or 1, D)
        state, c = CONDITIONINGS[self.conditioning].combine(tokens, t, y)
        hidden = {}
        for i, block in enumerate(self.blocks):
            state = self._call(block, state, c, backends)  # tokens (B, N, D), or a Carry of them
            if i in wanted:
                state = add_pending(state)
                hidden[i] = self._image_tokens(as_tokens(state))  # (B, N, D)
        patches = self._call(self.final_layer, self._image_tokens(state), c, backends)  # (B, N, p*p*C_out)
        out = self.unpatchify(patches)  # (B, C_out, S, S)
        return out if return_hidden is None else (out, [hidden[i] for i in wanted])

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float | Tensor,
        cfg_channels: int | None = None,
        r: Tensor | None = None,
    ) -> Tensor:
        """Predict with classifier-free guidance, for a batch whose halves share their latents.

        Args:
            x: (2B, C, S, S); only the first half is read, and used twice.
            t: (2B,) timesteps.
            y: (2B,) B labels, then B null labels.
            cfg_scale: 1 for no guidance; a number or (), or one per sample: (B,) or (B, 1, 1, 1).
            cfg_channels: how many leading channels to guide; None: see `guidance.default_cfg_channels`.
            r: (2B,) with ``second_time``, see `forward`.

        Returns:
            (2B, C_out, S, S), with the guided channels equal in both halves.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, the batch is odd, or cfg_channels is out
                of range.

        Source: Peebles & Xie, section 3.1, "Classifier-free guidance".
        """
        half, scale, channels = check_guidance(self, x, cfg_scale, cfg_channels)
        stretch = {} if r is None else {"r": r}
        return guide(self(torch.cat([half, half]), t, y, **stretch), scale, channels)

    @classmethod
    def from_pretrained(cls, source: str | PathLike, **changes: Any) -> "DiT":
        """Load a model from a folder, a file or the Hugging Face Hub: see `ditfast.checkpoints.from_pretrained`."""
        from ditfast import checkpoints

        return checkpoints.from_pretrained(source, cls=cls, **changes)

    def save_pretrained(self, folder: str | PathLike, *, overwrite: bool = False) -> None:
        """Write config.json and model.safetensors: see `ditfast.checkpoints.save_pretrained`."""
        from ditfast import checkpoints

        checkpoints.save_pretrained(self, folder, overwrite=overwrite)

    def embed_patches(self, x: Tensor, backends: tuple[str, ...]) -> Tensor:
        """Turn latents (B, C, S, S) into tokens (B, N, D), position included."""
        embedder = self.x_embedder
        fusible = is_plain(embedder, PatchEmbed) and is_patch_projection(embedder.proj, self.patch_size)
        if not fusible or self.pos_embed.shape[:2] != (1, embedder.num_patches):
            return embedder(x) + self.pos_embed
        arguments: tuple[Any, ...] = x, embedder.proj.weight, embedder.proj.bias, self.pos_embed, self.patch_size
        done = whole_embedding(*arguments, backend=backends)
        return ops.patch_embed(*arguments, backend=backends) if done is None else done

    def _call(self, layer, x, c, backends):
        """Call a block or final layer on x, tokens or a `Carry`."""
        if may_be_dual():
            reject_layer(layer)
        takes_carry = is_known(layer) and hasattr(layer, "takes_carry")  # nearly always, and soon asked
        if not takes_carry and not is_native(layer):  # possibly ours inside a wrapper that does not pass backends on
            with nullcontext() if self.backend is None else use_backend(self.backend):
                return layer(as_tokens(x), c)
        if takes_carry or accepts_carry(layer):
            return layer(x if isinstance(x, Carry) else start_carry(x, c, backends), c)
        return layer(as_tokens(x), c, backends=backends)

    def _image_tokens(self, x):
        """x without the two in-context tokens."""
        return x[:, :-2] if self.conditioning == "in_context" else x

    def check_input(self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> None:
        """Check the inputs of the model's own embedders; replaced ones may take anything."""
        if is_plain(self.x_embedder, PatchEmbed):
            check_latents(self.x_embedder, x)
        if is_plain(self.t_embedder, TimestepEmbedder):
            check_timesteps(t, x)
        check_stretch(self.r_embedder, r, x)
        if is_plain(self.y_embedder, LabelEmbedder) and isinstance(self.y_embedder.embedding_table, nn.Embedding):
            check_labels(y, x)
        if may_be_dual():
            check_tangents(x=x, t=t, r=r)

    def _wanted_blocks(self, return_hidden):
        """``return_hidden`` as a list of integers."""
        if not isinstance(return_hidden, (list, tuple, range, type(None))):
            raise TypeError(f"return_hidden must be a list of blocks, got {type(return_hidden).__name__}")
        wanted = [int(i) if isinstance(i, Tensor) else i for i in return_hidden or ()]  # exporters pass tensors
        for i in wanted:
            if not isinstance(i, int) or not 0 <= i < len(self.blocks):
                raise ValueError(f"return_hidden must hold blocks in [0, {len(self.blocks) - 1}], got {i!r}")
        return wanted
