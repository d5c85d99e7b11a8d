"""Small models on disk that do something."""

import torch

from ditfast import DiT

TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=7)


def save_dit(folder, **changes) -> str:
    """Save a DiT whose noise, variance and response to labels are all far from zero."""
    torch.manual_seed(0)
    model = DiT(**{**TINY, **changes})
    for name, value in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(value, std=0.15)
    if not model.sampling:
        model.sampling = {"objective": "diffusion", "noise_schedule": "linear"}
    model.save_pretrained(folder)
    return str(folder)


def save_vae(folder, seed) -> str:
    """Save an AutoencoderKL that halves images once."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    AutoencoderKL(down_block_types=down, up_block_types=up, **blocks).save_pretrained(folder)
    return str(folder)
