"""The workload: a DiT, its inputs, its FLOPs and its matrix products."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch

from ditfast.models import DiT, DiT_models, cost
from ditfast.models.meta import on_meta
from harness.block.workload import DTYPES, make_gemms
from harness.block.workload import Workload as Blocks

MODES = {
    "fwd": "forward",
    "guided": "guided step",
    "train": "training step",
}
PASSES = {"fwd": 1, "guided": 2, "train": 3}  # both halves; each matrix product has two more in backward


@dataclass(frozen=True)
class Workload:
    """``steps``: guided steps per run; each step includes its share of the run's one-time work."""

    model: str
    image_size: int
    batch: int
    dtype: str
    steps: int
    device: str

    @property
    def latent(self):
        return self.image_size // 8

    @property
    def patch(self):
        return int(self.model.split("/")[1])

    def as_dict(self):
        return asdict(self)

    def macs(self):
        """Multiply-adds of one sample's forward; the paper calls them flops."""
        with on_meta():
            return sum(cost.macs(DiT_models[self.model](input_size=self.latent)).values())

    def flops(self, mode):
        """FLOPs of a step, two per multiply-add."""
        return 2 * self.batch * PASSES[mode] * self.macs()

    def context(self):
        if self.dtype == "autocast":
            return torch.autocast(self.device, torch.bfloat16)
        return nullcontext()

    def gemms(self, mode):
        """Return (function that runs the blocks' large matrix products of a step with the library, its FLOPs)."""
        depth = len(make_model(self, "meta").blocks)
        batch = self.batch * (2 if mode == "guided" else 1)
        blocks = Blocks(self.model, self.image_size, batch, depth, self.dtype, self.device)
        return make_gemms(blocks, "fwd_bwd" if mode == "train" else "fwd")


def make_model(workload: Workload, device=None) -> DiT:
    """A model with random weights throughout: adaLN-Zero's zero gates would hide every error in their branch."""
    device = device or workload.device
    with on_meta():
        model = DiT_models[workload.model](input_size=workload.latent)
    if device == "meta":
        return model
    pos = model.pos_embed
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        with torch.no_grad():
            fan = p[0].numel() if p.dim() > 1 else 2500
            p.normal_(0, 0.5 if "adaLN" in name and p.dim() == 1 else fan**-0.5, generator=generator)
    _set_positions(model, pos)
    return model.to(DTYPES[workload.dtype]).eval()


def _set_positions(model, pos):
    from ditfast.models import get_2d_sincos_pos_embed

    embed = get_2d_sincos_pos_embed(pos.shape[-1], model.x_embedder.grid_size)
    model.pos_embed.data.copy_(torch.from_numpy(embed))


def make_inputs(workload: Workload):
    """Latents (B, 4, S, S), timesteps (B,), labels (B,): random."""
    w, generator = workload, torch.Generator().manual_seed(1)
    x = torch.randn(w.batch, 4, w.latent, w.latent, generator=generator)
    t = torch.randint(1000, (w.batch,), generator=generator)
    y = torch.randint(1000, (w.batch,), generator=generator)
    return x.to(w.device, DTYPES[w.dtype]), t.to(w.device), y.to(w.device)
