"""Run by test_fsdp.py in every process: blocks sharded one by one give what the whole model gives."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ditfast.models import DiT
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


def check(rank, world, checkpointed):
    torch.manual_seed(1)
    inputs = torch.randn(4, 4, 10, 10), torch.arange(4) * 200, torch.arange(4)
    whole, sharded = build(), build()
    expected = run(whole, inputs)
    mesh = init_device_mesh("cpu", (world,))
    for i, block in enumerate(sharded.blocks):
        sharded.blocks[i] = fully_shard(checkpoint_wrapper(block) if checkpointed else block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    with record() as log:
        out = run(sharded, [v[mine] for v in inputs])
    assert "gated_residual" not in log, "the blocks were not carried"
    torch.testing.assert_close(out, expected[mine], rtol=0, atol=1e-5 * expected.abs().max().item())
    named = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in sharded.named_parameters()}
    for name, p in whole.named_parameters():
        if p.requires_grad:
            got, tolerance = named[name].grad.full_tensor(), 2e-5 * p.grad.abs().max().item()
            torch.testing.assert_close(got, p.grad, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for checkpointed in (False, True):
        check(rank, world, checkpointed)
    dist.destroy_process_group()
