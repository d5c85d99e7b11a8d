"""Run by test_fsdp.py in every process: blocks sharded one by one equal the whole model, tangents included."""

import os
import sys

import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import jvp
from torch.nn.parallel import DistributedDataParallel

from ditfast.models import DiT
from ditfast.ops.backends.availability import why_not_loaded
from ditfast.ops.backends.choice import use_backend
from ditfast.ops.backends.log import record


def build():
    torch.manual_seed(0)
    model = DiT(input_size=10, hidden_size=32, depth=3, num_heads=2, num_classes=7).eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model


def run(model, inputs):
    x, t, y = inputs
    out = model(x, t, y)
    (out * torch.linspace(-1, 1, out[0].numel()).view_as(out[0])).mean().backward()
    return out


def run_with_tangents(model, inputs):
    """Like a step of MeanFlow: the tangent with respect to latents and timesteps is a constant in the loss."""
    x, t, y = inputs
    out, out_t = jvp(lambda x, t: model(x, t, y), (x, t), (x.cos(), t / 100))
    (out - (torch.cat([x, x], 1) - out_t).detach()).square().mean().backward()
    return torch.cat([out, out_t], 1).detach()


def shard(model, world, checkpointed=False):
    mesh = init_device_mesh("cpu", (world,))
    for i, block in enumerate(model.blocks):
        model.blocks[i] = fully_shard(checkpoint_wrapper(block) if checkpointed else block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check(rank, world, parallel, run):
    torch.manual_seed(1)
    inputs = torch.randn(4, 4, 10, 10), torch.arange(4) * 200.0, torch.arange(4)
    whole = build()
    expected = run(whole, inputs)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    with record() as log:
        out = run(parallel, [v[mine] for v in inputs])
    assert "gated_residual" not in log, "the blocks were not carried"
    torch.testing.assert_close(out, expected[mine], rtol=0, atol=1e-5 * expected.abs().max().item())
    named = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in parallel.named_parameters()}
    for name, p in whole.named_parameters():
        if p.requires_grad:
            got = named.get(name, named.get(f"module.{name}")).grad
            got = got.full_tensor() if hasattr(got, "full_tensor") else got
            tolerance = 2e-5 * p.grad.abs().max().item()
            torch.testing.assert_close(got, p.grad, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def check_refusal(world):
    """Outside torch.func, FSDP2 fails with an unhelpful PyTorch error."""
    x, t, y = torch.randn(1, 4, 10, 10), torch.ones(1), torch.ones(1, dtype=torch.long)
    with forward_ad.dual_level():
        try:
            shard(build(), world)(forward_ad.make_dual(x, x), t, y)
        except NotImplementedError as error:
            assert "use torch.func.jvp" in str(error)
        else:
            raise AssertionError("FSDP2 accepted a tangent")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for checkpointed in (False, True):
        check(rank, world, shard(build(), world, checkpointed), run)
    with use_backend("auto" if why_not_loaded() else "host"):
        if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):  # FSDP2 in 2.11 fails inside any transform
            check(rank, world, shard(build(), world), run_with_tangents)
        check(rank, world, DistributedDataParallel(build()), run_with_tangents)
    check_refusal(world)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # after FSDP2 on gloo, even plain PyTorch occasionally aborts on exit
