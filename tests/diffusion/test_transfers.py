"""After its first step, a sampling loop neither reads from the device nor copies to it.

Meta tensors stand for device tensors: reading one raises, and every operation that mixes in a host tensor is counted.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditfast.diffusion import create_diffusion
from ditfast.models import DiT

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)


class Traffic(TorchDispatchMode):
    """Records operations that read a tensor, or whose inputs or outputs are not on ``device``."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seen, self.operations = device, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.operations += 1
        if func in READS or any(tensor.device.type != self.device for tensor in tensors):
            self.seen.append(func)
        return out


def host_data_is_refused(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a tensor is made from data of the host")

    for name in ("tensor", "as_tensor", "from_numpy", "asarray"):
        monkeypatch.setattr(torch, name, refuse)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)


def loops(diffusion, model, cond_fn, device, **options):
    options = {"device": device, "cond_fn": cond_fn, **options}
    shape = (2, 4, 8, 8)
    yield diffusion.p_sample_loop_progressive(model, shape, **options)
    yield diffusion.ddim_sample_loop_progressive(model, shape, eta=0.5, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", [{}, {"predict_xstart": True}, {"learn_sigma": False}])
def test_sampling(monkeypatch, device, kind):
    diffusion = create_diffusion("4", **kind)
    twice = 1 if "learn_sigma" in kind else 2

    def model(x, t):
        return torch.cat([x * t.view(-1, 1, 1, 1)] * twice, dim=1)

    for steps in loops(diffusion, model, lambda x, t: -x, device):
        next(steps)
        with monkeypatch.context() as patch, Traffic(device) as traffic:
            host_data_is_refused(patch)
            assert len(list(steps)) == 3
        assert traffic.operations > 50 and not traffic.seen


def test_sampling_from_a_dit():
    diffusion = create_diffusion("3")
    model = (
        DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=7, backend="reference").eval().to("meta")
    )
    y = torch.zeros(2, dtype=torch.long, device="meta")
    for steps in loops(diffusion, model, None, None, model_kwargs={"y": y}):
        next(steps)
        with Traffic("meta") as traffic:
            assert len(list(steps)) == 2
        assert traffic.operations > 50 and not traffic.seen


def test_training():
    diffusion = create_diffusion("")
    x = torch.zeros(2, 4, 8, 8, device="meta", requires_grad=True)
    t = torch.zeros(2, dtype=torch.long, device="meta")
    for _ in range(2):
        with Traffic("meta") as traffic:
            diffusion.training_losses(lambda x, t: torch.cat([x, x], dim=1), x, t)["loss"].mean().backward()
        assert traffic.operations > 50
    assert not traffic.seen


def test_tables_are_copied_once():
    diffusion = create_diffusion("4")
    t = torch.zeros(2, dtype=torch.long, device="meta")
    counts = []
    for _ in range(2):
        with Traffic("meta") as traffic:
            diffusion.q_sample(torch.zeros(2, 3, 4, 4, device="meta"), t)
        counts.append(sum(func is torch.ops.aten._to_copy.default for func in traffic.seen))
    assert counts[0] >= 2 and counts[1] == 0
