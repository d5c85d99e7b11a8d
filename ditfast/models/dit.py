"""DiT: a transformer over latent patches, conditioned on timestep and class."""

import math
from contextlib import nullcontext

import torch
import torch.nn as nn

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
    get_2d_sincos_pos_embed,
    is_patch_projection,
)
from ditfast.models.limits import check_arguments, check_number, check_tensors
from ditfast.models.plain import is_plain, reject_symbolic, remember_forward
from ditfast.models.tangents import check_tangents, reject_layer
from ditfast.models.wrappers import accepts_carry, is_native
from ditfast.ops.backends.choice import names_in_force, use_backend
from ditfast.ops.registration import may_be_dual


@remember_forward
class DiT(nn.Module):
    """Diffusion Transformer, with adaLN-Zero blocks or one of the paper's other kinds.

    Args:
        input_size: S, height and width of the latent in pixels; or both, (height, width).
        patch_size: p, in latent pixels; must divide S.
        in_channels: C of the latent.
        hidden_size: D; a multiple of 4 and of num_heads.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: width of a block's MLP over D.
        class_dropout_prob: how often training replaces a label by the null label.
        num_classes: K; the null label is K.
        learn_sigma: predict a variance beside the noise: C_out = 2 * C, else C.
        backend: name of the backend that the model's operations prefer; None: see `ditfast.use_backend`.
        recompute_mlp: keep less for backward: the MLPs' activations are computed again there.
        conditioning: how timestep and class enter: "adaln_zero", "adaln" (no gates), "cross_attention" (to both,
            after the self-attention) or "in_context" (two more tokens, removed after the last block).
        timestep_freq_shift, norm2_eps: 1 and 1e-5 make the function of diffusers' DiT, which differs so.
        second_time: the model is of averages over a stretch of time, as those of `ditfast.flow.MeanFlow`: forward
            takes its other end, r.

    Attributes:
        config: the arguments by name.
        sampling: how to sample from it, as `ditfast.checkpoints.sampling` says: what is trained otherwise than by
            the default should say so here before `save_pretrained`.

    Raises:
        ValueError: an argument that no model has (`limits`), an unknown backend or conditioning.

    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", section 3.2.
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
        backend=None,
        recompute_mlp=False,
        conditioning="adaln_zero",
        timestep_freq_shift=0,
        norm2_eps=1e-6,
        second_time=False,
    ):
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(config)
        super().__init__()
        self.config = config
        diffusion = {"objective": "diffusion", "noise_schedule": "linear"}
        self.sampling = {"objective": "meanflow"} if second_time else diffusion
        names_in_force(backend)  # rejects an unknown name now, not at the first forward
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
        self.blocks = nn.ModuleList([kind.block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        for block in self.blocks:
            block.mlp.recompute = recompute_mlp
            block.norm2.eps = norm2_eps
        self.final_layer = kind.final(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Set every parameter: xavier-uniform projections, small normal embeddings, zero output.

        The Linears that regress modulation start at zero in adaLN-Zero alone, where closed gates make each block the
        identity. Without gates zeros would only mute the conditioning.

        Source: Peebles & Xie, section 3.2, "adaLN-Zero block", and section 4, "Training".
        """
        self.apply(_init_linear)
        if not self.pos_embed.is_meta:
            embed = get_2d_sincos_pos_embed(self.pos_embed.shape[-1], self.x_embedder.grid_size)  # (N, D)
            self.pos_embed.data.copy_(torch.from_numpy(embed).float().unsqueeze(0))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in filter(None, (self.t_embedder, self.r_embedder)):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        if self.conditioning == "adaln_zero":
            for layer in (*self.blocks, self.final_layer):
                nn.init.zeros_(layer.adaLN_modulation[-1].weight)
                nn.init.zeros_(layer.adaLN_modulation[-1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def unpatchify(self, x):
        """Patches to images: (B, N, p*p*C_out) -> (B, C_out, S, S), any square N if the model's latents are square.

        Raises:
            ValueError: N is not the square of a whole number, or not that of the model's rectangle.
        """
        rows, columns = getattr(self.x_embedder, "grid_size", (1, 1))  # any square, as far as a foreign one tells
        if rows == columns and math.isqrt(x.shape[1]) ** 2 != x.shape[1]:
            raise ValueError(f"x must have a square number of tokens, got shape {tuple(x.shape)}")
        grid = None if rows == columns else (rows, columns)
        return ops.unpatchify(x, self.patch_size, grid, backend=names_in_force(self.backend))

    def forward(self, x, t, y, return_hidden=None, *, r=None):
        """Predict the noise (and variance) in a noisy latent, or a velocity: what the model was trained for.

        Args:
            x: (B, C, S, S) noisy latents.
            t: (B,) timesteps, whole or fractional; or (1,) for all samples.
            y: (B,) integer labels, K for the null label; or (1,).
            return_hidden: indices of blocks whose output tokens are wanted too.
            r: (B,) the other end of the stretch of time from t, with ``second_time``; or (1,). None for t itself.

        Returns:
            (B, C_out, S, S); with ``return_hidden`` also a list of (B, N, D) tokens, one per index, in order.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape or device, for the model's own embedders.
            IndexError: on the CPU, a label outside the table.
        """
        reject_symbolic(x)
        wanted = self._wanted_blocks(return_hidden)
        self.check_input(x, t, y, r)
        backends = names_in_force(self.backend)
        tokens = self.embed_patches(x, backends)  # (B, N, D); first, since what draws at random draws in this order
        t = embed_times(self.t_embedder, self.r_embedder, t, r, x.dtype)  # (B or 1, D)
        y = self.y_embedder(y, self.training)  # (B or 1, D)
        x, c = CONDITIONINGS[self.conditioning].combine(tokens, t, y)
        hidden = {}
        for i, block in enumerate(self.blocks):
            x = self._call(block, x, c, backends)  # tokens (B, N, D), or a Carry of them
            if i in wanted:
                x = add_pending(x)
                hidden[i] = self._image_tokens(as_tokens(x))  # (B, N, D)
        x = self._call(self.final_layer, self._image_tokens(x), c, backends)  # (B, N, p*p*C_out)
        x = self.unpatchify(x)  # (B, C_out, S, S)
        return x if return_hidden is None else (x, [hidden[i] for i in wanted])

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=None, *, r=None):
        """Predict with classifier-free guidance, for a batch whose halves have the same latents.

        Args:
            x: (2B, C, S, S); the second half is not read, the first is used twice.
            t: (2B,) timesteps.
            y: (2B,) labels, then null labels.
            cfg_scale: 1 for no guidance.
            cfg_channels: how many leading channels are guided; see `default_cfg_channels`.
            r: (2B,) with ``second_time``, see `forward`.

        Returns:
            (2B, C_out, S, S) with equal guided channels in both halves.

        Raises:
            TypeError, ValueError: an argument of another type, an odd batch, more guided channels than there are.

        Source: Peebles & Xie, section 3.1, "Classifier-free guidance".
        """
        half, channels = self.check_guidance(x, cfg_scale, cfg_channels)
        stretch = {} if r is None else {"r": r}
        return guide(self(torch.cat([half, half]), t, y, **stretch), cfg_scale, channels)

    def check_guidance(self, x, cfg_scale, cfg_channels):
        """The half of x that `forward_with_cfg` reads, and how many channels it guides; raises as it says."""
        check_tensors(x=x)
        if x.dim() == 0 or x.shape[0] % 2:
            raise ValueError(f"x must have an even batch for guidance, got shape {tuple(x.shape)}")
        if cfg_channels is None:
            cfg_channels = default_cfg_channels(self.in_channels)
        if not isinstance(cfg_scale, torch.Tensor):
            check_number("cfg_scale", cfg_scale)
        if not isinstance(cfg_channels, int) or not 0 <= cfg_channels <= self.out_channels:
            raise ValueError(f"cfg_channels must be in [0, {self.out_channels}], got {cfg_channels!r}")
        return x[: x.shape[0] // 2], cfg_channels

    @classmethod
    def from_pretrained(cls, source, **changes):
        """A model from a folder, a file or the Hugging Face Hub: see `ditfast.checkpoints.from_pretrained`."""
        from ditfast import checkpoints

        return checkpoints.from_pretrained(source, cls=cls, **changes)

    def save_pretrained(self, folder, *, overwrite=False):
        """Write config.json and model.safetensors: see `ditfast.checkpoints.save_pretrained`."""
        from ditfast import checkpoints

        checkpoints.save_pretrained(self, folder, overwrite=overwrite)

    def embed_patches(self, x, backends):
        """Latents (B, C, S, S) to tokens (B, N, D) with their position."""
        embedder = self.x_embedder
        fusible = is_plain(embedder, PatchEmbed) and is_patch_projection(embedder.proj, self.patch_size)
        if not fusible or self.pos_embed.shape[:2] != (1, embedder.num_patches):
            return embedder(x) + self.pos_embed
        proj = embedder.proj
        return ops.patch_embed(x, proj.weight, proj.bias, self.pos_embed, self.patch_size, backend=backends)

    def _call(self, layer, x, c, backends):
        """What a block or final layer makes of x, tokens or a `Carry`."""
        if may_be_dual():
            reject_layer(layer)
        if not is_native(layer):  # maybe one of ours in a wrapper, which passes no backends on
            with nullcontext() if self.backend is None else use_backend(self.backend):
                return layer(as_tokens(x), c)
        if accepts_carry(layer):
            return layer(x if isinstance(x, Carry) else start_carry(x, c, backends), c)
        return layer(as_tokens(x), c, backends=backends)

    def _image_tokens(self, x):
        """x without the two tokens that came in context."""
        return x[:, :-2] if self.conditioning == "in_context" else x

    def check_input(self, x, t, y, r=None):
        """Check what goes to the model's own embedders; what others take is not known."""
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
        """``return_hidden`` as whole numbers."""
        if not isinstance(return_hidden, list | tuple | range | None):
            raise TypeError(f"return_hidden must be a list of blocks, got {type(return_hidden).__name__}")
        wanted = [int(i) if isinstance(i, torch.Tensor) else i for i in return_hidden or ()]  # as exporters have them
        for i in wanted:
            if not isinstance(i, int) or not 0 <= i < len(self.blocks):
                raise ValueError(f"return_hidden must hold blocks in [0, {len(self.blocks) - 1}], got {i!r}")
        return wanted


def guide(out, cfg_scale, cfg_channels: int):
    """Predictions (2B, C_out, S, S), the second half without labels, with their leading channels guided."""
    guided, rest = out[:, :cfg_channels], out[:, cfg_channels:]
    cond, uncond = guided.chunk(2)
    guided = uncond + cfg_scale * (cond - uncond)  # (B, cfg_channels, S, S)
    return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def default_cfg_channels(in_channels: int) -> int:
    """How many channels guidance acts on: 3 of 4, as the released samples were made; else all."""
    return 3 if in_channels == 4 else in_channels


def _init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
