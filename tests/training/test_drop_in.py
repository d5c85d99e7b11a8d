"""A training loop in the original's style runs with only the import changed, and gives the reference's losses."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ditfast import DiT, create_diffusion, use_backend

STEPS = 3


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@torch.no_grad()
def update_ema(ema, model, decay):
    averages, current = OrderedDict(ema.named_parameters()), OrderedDict(model.named_parameters())
    for name, value in current.items():
        averages[name].mul_(decay).add_(value.data, alpha=1 - decay)


def train(backend):
    """Losses of a few steps, and the average after them."""
    torch.manual_seed(0)
    model = DiT(input_size=6, in_channels=3, hidden_size=64, depth=1, num_heads=1, num_classes=5)
    ema = copy.deepcopy(model)
    for p in ema.parameters():
        p.requires_grad = False
    ddp = DistributedDataParallel(model)
    diffusion = create_diffusion(timestep_respacing="")
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3, weight_decay=0)
    update_ema(ema, ddp.module, decay=0)
    ddp.train()
    ema.eval()
    losses = []
    for _ in range(STEPS):
        x, y = torch.randn(2, 3, 6, 6), torch.randint(0, 5, (2,))
        t = torch.randint(0, diffusion.num_timesteps, (2,))
        with use_backend(backend):
            loss = diffusion.training_losses(ddp, x, t, dict(y=y))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, ddp.module, decay=0.9)
        losses.append(loss.item())
    return losses, ema.state_dict()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_loop_in_the_originals_style(group, backend):
    losses, average = train(backend)
    expected, reference = train("reference")
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len(set(losses)) == STEPS
    for name, value in reference.items():
        torch.testing.assert_close(
            average[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
