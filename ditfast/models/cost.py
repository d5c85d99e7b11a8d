"""Multiply-adds, parameters and memory of a DiT, by operator, from formulas."""

from ditfast.models.dit import DiT
from ditfast.models.meta import on_meta
from ditfast.models.presets import DiT_models

DTYPES = {
    "bf16": (2, 2),
    "fp32": (4, 4),
    "autocast": (4, 2),
}  # bytes per element in the residual stream, in the branches
ROWS = {"adaln_zero": 6, "adaln": 4, "cross_attention": 0, "in_context": 0}  # shifts, scales and gates per block


def macs(model: DiT) -> dict[str, int]:
    """Multiply-adds of one sample's forward pass, by operator."""
    n, m, d, depth, width = _sizes(model)
    table, times = model.conditioning in ("adaln_zero", "adaln"), 1 + (model.r_embedder is not None)
    patch = model.patch_size**2
    return {
        "embedders": n * model.in_channels * patch * d + times * (256 * d + d * d),
        "adaLN": depth * ROWS[model.conditioning] * d * d,
        "qkv": depth * 3 * m * d * d,
        "attention": depth * 2 * m * m * d,
        "proj": depth * m * d * d,
        "cross-attention": depth * _is_cross(model) * (2 * n * d * d + 2 * 2 * d * d + 2 * 2 * n * d),
        "mlp": depth * 2 * m * d * width,
        "norm, residual": 0,
        "final": table * 2 * d * d + n * d * patch * model.out_channels,
    }


def kept_bytes(model: DiT, batch: int = 1, dtype: str = "bf16") -> dict[str, int]:
    """Bytes saved for backward by this package's kernels, by operator; parameters and their casts do not count.

    A tensor counts once, where it is read: a Linear's input is also what the operation before it saved.
    """
    n, m, d, depth, width = _sizes(model)
    stream, branch = (size * batch for size in DTYPES[dtype])
    zero, adaptive, cross = model.conditioning == "adaln_zero", ROWS[model.conditioning] > 0, _is_cross(model)
    unit, lse = m * d, batch * 4 * m * model.num_heads
    norm = unit * stream + batch * 4 * 2 * m  # a LayerNorm's input, mean and rstd
    pending = zero * unit * branch  # the branch added by a junction
    recomputes = bool(depth) and model.blocks[0].mlp.recompute  # type: ignore[union-attr]
    hiddens = 1 if recomputes else 2  # before and after GELU
    casts = stream != branch  # under autocast each Linear casts the conditioning again
    silus = 1 if zero and not casts else depth + 1
    return {
        "embedders": n * model.patch_size**2 * model.in_channels * branch
        + (1 + (model.r_embedder is not None)) * (256 + 2 * d) * branch
        + batch * 8,
        "adaLN": adaptive * (d * stream + silus * d * branch + depth * ROWS[model.conditioning] * d * branch),
        "qkv": depth * unit * branch,
        "attention": depth * (4 * unit * branch + lse),
        "proj": 0,
        "cross-attention": cross
        * (depth * (3 * unit * branch + 4 * d * branch + lse) + (depth if casts else 1) * 2 * d * branch),
        "mlp": depth * (unit + hiddens * m * width) * branch,
        "norm, residual": depth * ((3 if cross else 2) * norm + 2 * pending) - pending,
        "final": unit * stream + batch * 4 * 2 * n + pending + n * d * branch + adaptive * 2 * d * branch,
    }


def parameters(model: DiT) -> dict[str, int]:
    """Parameters by operator; the frozen position embedding belongs to the embedders."""
    found = dict.fromkeys(macs(model), 0)
    for name, p in model.named_parameters():
        found[_operator(name)] += p.numel()
    return found


def _operator(name):
    parts = {"final_layer": "final", "norm": "norm, residual", "adaLN": "adaLN", "cross_attn": "cross-attention"}
    parts |= {"attn.qkv": "qkv", "attn.proj": "proj", "blocks": "mlp"}
    return next((operator for part, operator in parts.items() if part in name), "embedders")


def _sizes(model):
    """(N, tokens inside the blocks, D, depth, MLP width)."""
    _, n, d = model.pos_embed.shape
    m = n + 2 if model.conditioning == "in_context" else n
    return n, m, d, len(model.blocks), model.blocks[0].mlp.fc1.out_features if len(model.blocks) else 0


def _is_cross(model):
    return model.conditioning == "cross_attention"


def training_macs(model: DiT, batch: int, steps: int) -> int:
    """The paper's training compute, 3 x forward x batch x steps: backward costs twice the forward."""
    return 3 * sum(macs(model).values()) * batch * steps


def build_on_meta(name: str, conditioning: str = "adaln_zero", image_size: int = 256) -> DiT:
    """Build one of the paper's models on the meta device; latents are an eighth of the image's size."""
    if image_size % 8:
        raise ValueError(f"image_size must be a multiple of 8, got {image_size}")
    with on_meta():
        return DiT_models[name](input_size=image_size // 8, conditioning=conditioning)
