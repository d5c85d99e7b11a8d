"""Training loops and samplers in the style of the original and SiT work with only the import changed.

Results are compared with the original's operations on the same weights, in plain PyTorch.
"""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from golden_values import close, fill
from original_dit import OriginalDiT
from torch.nn.parallel import DistributedDataParallel

from ditfast import DiT, create_diffusion, use_backend

TINY = dict(input_size=6, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=1, num_classes=5)
STEPS = 2
NULL = 5


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


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


def train(model):
    """Losses of a few steps, and the average after them."""
    torch.manual_seed(0)
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
        x, y = torch.randn(2, 4, 6, 6), torch.randint(0, 5, (2,))
        t = torch.randint(0, diffusion.num_timesteps, (2,))
        loss = diffusion.training_losses(ddp, x, t, dict(y=y))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, ddp.module, decay=0.9)
        losses.append(loss.item())
    return losses, ema.state_dict()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_training_loop(group, backend):
    """Half of the labels are dropped: both must drop the same ones."""
    arguments = {**TINY, "depth": 1, "class_dropout_prob": 0.5}
    expected, reference = train(fill(OriginalDiT(**arguments)))
    with use_backend(backend):
        losses, average = train(fill(DiT(**arguments)))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(set(losses)) == STEPS
    for name, value in reference.items():
        torch.testing.assert_close(
            average[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def sample(model, guided):
    """Latents (3, 4, 6, 6), sampled like in the original's scripts."""
    torch.manual_seed(0)
    diffusion, n = create_diffusion("4"), 3
    z, y = torch.randn(n, 4, 6, 6), torch.tensor([0, 4, 2])
    if guided:
        z, y = torch.cat([z, z], 0), torch.cat([y, torch.tensor([NULL] * n)], 0)
    kwargs = dict(y=y, cfg_scale=1.5) if guided else dict(y=y)
    forward = model.forward_with_cfg if guided else model.forward
    with torch.no_grad():
        samples = diffusion.p_sample_loop(
            forward, z.shape, z, clip_denoised=False, model_kwargs=kwargs, progress=False, device=z.device
        )
    return samples.chunk(2, dim=0)[0] if guided else samples


@pytest.mark.parametrize("guided", [False, True])
def test_sampling(guided):
    close(sample(fill(DiT(**TINY)).eval(), guided), sample(fill(OriginalDiT(**TINY)).eval(), guided), 1e-5)


def transport_loss(model, x1, y):
    """The velocity loss on the straight path from noise, and its gradients by parameter."""
    torch.manual_seed(1)
    x0, t = torch.randn_like(x1), torch.rand(x1.shape[0])
    at = t.view(-1, 1, 1, 1)
    loss = (model(at * x1 + (1 - at) * x0, t, y=y) - (x1 - x0)).square().flatten(1).mean(1).mean()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


def heun(model, z, y, steps=3, **options):
    """Solve an ODE to t = 1; time is a float in [0, 1], shared by all samples."""
    x, h = z, 1 / steps
    for i in range(steps):
        k1 = model(x, torch.ones(x.shape[0]) * (i * h), y=y, **options)
        k2 = model(x + h * k1, torch.ones(x.shape[0]) * ((i + 1) * h), y=y, **options)
        x = x + h / 2 * (k1 + k2)
    return x


def divergence(model, x, y):
    """Hutchinson's estimate of the velocity's divergence, as integrated for a likelihood."""
    torch.manual_seed(2)
    eps = torch.randint(2, x.shape, dtype=torch.float32) * 2 - 1
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((model(x, torch.full((x.shape[0],), 0.3), y=y) * eps).sum(), x)
    return (grad * eps).flatten(1).sum(1)


def test_transport():
    """SiT's training, guided ODE and likelihood, on a DiT without a predicted variance."""
    x, y = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2])
    model, reference = (fill(kind(**TINY, learn_sigma=False)) for kind in (DiT, OriginalDiT))
    close(transport_loss(model.train(), x, y), transport_loss(reference.train(), x, y), 1e-5)
    model.eval(), reference.eval()
    twice, labels = torch.cat([x, x]), torch.cat([y, torch.full_like(y, NULL)])
    with torch.no_grad():
        ends = [heun(each.forward_with_cfg, twice, labels, cfg_scale=4.0) for each in (model, reference)]
    close(*ends, 1e-5)
    close(divergence(model, x, y), divergence(reference, x, y), 1e-5)
