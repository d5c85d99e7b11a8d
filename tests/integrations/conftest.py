"""Tiny diffusers models with random weights, and their inputs."""

from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()  # from casting models, e.g. "kept in float32: []"

HEADS = dict(num_attention_heads=2, attention_head_dim=8)
PIXART = dict(num_layers=2, sample_size=8, cross_attention_dim=16, caption_channels=12)
SD3 = dict(
    sample_size=8, in_channels=4, out_channels=4, num_layers=3, joint_attention_dim=12, caption_projection_dim=16,
    pooled_projection_dim=10, pos_embed_max_size=8, dual_attention_layers=(0,),
)  # fmt: skip
FLUX = dict(
    in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=12, pooled_projection_dim=10,
    axes_dims_rope=(2, 2, 4),
)  # fmt: skip
MAKE = {  # name -> the model's class and configuration
    "dit": ("DiTTransformer2DModel", dict(num_layers=2, sample_size=8, num_embeds_ada_norm=5, out_channels=8)),
    "pixart": ("PixArtTransformer2DModel", PIXART),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd35": ("SD3Transformer2DModel", {**SD3, "qk_norm": "rms_norm"}),
    "flux": ("FluxTransformer2DModel", FLUX),
}
B, TEXT = 3, 5


def make(name, dtype=torch.float32, **changes):
    """A model with every weight drawn at random, so that no gate is closed."""
    cls, config = MAKE[name]
    model = getattr(diffusers, cls)(**{**HEADS, **config, **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.dim() < 2 else p[0].numel() ** -0.5))
    return model.to(dtype).eval()


def inputs(name, dtype=torch.float32):
    """The model's arguments: a batch of different samples; floating-point ones are leaves that require gradients."""
    generator = torch.Generator().manual_seed(1)

    def t(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype).requires_grad_()

    x, text, steps = t(B, 4, 8, 8), t(B, TEXT, 12), torch.tensor([3, 500, 998])
    if name == "dit":
        return {"hidden_states": x, "timestep": steps, "class_labels": torch.tensor([0, 5, 2])}
    if name == "pixart":
        mask = torch.ones(B, TEXT)
        mask[1, 2:] = 0
        arguments = {"hidden_states": x, "timestep": steps, "encoder_hidden_states": text}
        return arguments | {"encoder_attention_mask": mask, "added_cond_kwargs": {}}
    arguments = {"encoder_hidden_states": text, "pooled_projections": t(B, 10), "timestep": steps}
    if name != "flux":
        return {"hidden_states": x, **arguments}
    ids = torch.stack(torch.meshgrid(*map(torch.arange, (1, 4, 4)), indexing="ij"), -1).reshape(16, 3)
    tokens = {"hidden_states": t(B, 16, 4), "img_ids": ids, "txt_ids": torch.zeros(TEXT, 3)}
    return arguments | tokens | {"timestep": steps / 1000}


def run(model, arguments):
    """The output, and the gradients of inputs and weights that have any, by name."""
    out = model(**arguments).sample
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    leaves = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    leaves |= {k: p for k, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((out * weights).sum(), list(leaves.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {"out": out.detach(), **found}


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture
def kit():
    return SimpleNamespace(make=make, inputs=inputs, run=run, samples=B)
