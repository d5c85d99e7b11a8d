"""Training a small DiT never waits for the GPU, and memory does not grow."""

import pytest
import torch
import torch.nn.functional as F

from ditfast import DiT, use_backend

SMALL = dict(input_size=16, patch_size=2, hidden_size=144, depth=2, num_heads=2, num_classes=10)


def training_step(device, backend):
    """A function that runs one step; its loss stays on the device."""
    torch.manual_seed(0)
    model = DiT(**SMALL).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, t = torch.randn(4, 4, 16, 16, device=device), torch.arange(4, device=device)
    y, target = torch.arange(4, device=device), torch.randn(4, 8, 16, 16, device=device)

    def step():
        with torch.autocast(device, torch.bfloat16), use_backend(backend):
            out = model(x, t, y)
        loss = F.mse_loss(out.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def memory(device):
    """Bytes in use, and bytes reserved."""
    if device == "cpu":
        return 0, 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.mark.parametrize(
    "steps, backend", [(2, "auto"), *(pytest.param(200, b, marks=pytest.mark.gpu) for b in ("triton", "auto"))]
)
def test_memory_does_not_grow(steps, backend, device):
    step = training_step(device, backend)
    losses = [step() for _ in range(1 + steps // 10)]
    before = memory(device)
    for _ in range(steps):
        loss = step()
    assert memory(device) == before
    assert loss < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("triton", "auto"))
def test_a_step_never_waits_for_the_gpu(backend):
    step = training_step("cuda", backend)
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
