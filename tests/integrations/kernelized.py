"""A standalone model with layers from a kernel repository, in a process where `kernels` is Hugging Face's package.

python kernelized.py REPOSITORY
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.nn.functional as F
from kernels._rust import Digest, DigestAlgorithm, Metadata
from torch import nn

from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_forward_from_hub
from kernels import use_kernel_mapping as mapping_in_force

D = 64


@use_kernel_forward_from_hub("Mlp")
class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


@use_kernel_forward_from_hub("Attention")
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 1
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


@use_kernel_forward_from_hub("LayerNormModulate")
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-3

    def forward(self, x, shift, scale):
        return F.layer_norm(x, (D,), eps=self.eps) * (1 + scale[:, None]) + shift[:, None]


@use_kernel_forward_from_hub("GatedResidual")
class Add(nn.Module):
    def forward(self, x, y, gate):
        return x + gate[:, None] * y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp, self.add = Norm(), Attention(), Mlp(), Add()

    def forward(self, x, rows):
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.chunk(6, dim=1)
        x = self.add(x, self.attn(self.norm(x, shift1, scale1)), gate1)
        return self.add(x, self.mlp(self.norm(x, shift2, scale2)), gate2)


def results(block, leaves):
    out = block(*leaves)
    return out, *torch.autograd.grad(out.square().sum(), [*leaves, *block.parameters()])


def same(found, expected):
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def check_layers(repository, kernel):
    """Forward, gradients, torch.compile, on two backends."""
    torch.manual_seed(0)
    block = Block()
    leaves = torch.randn(3, 7, D).requires_grad_(), torch.randn(3, 6 * D).requires_grad_()
    expected = results(block, leaves)
    names = ("Mlp", "Attention", "LayerNormModulate", "GatedResidual")
    mapping = {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in names}
    with mapping_in_force(mapping):
        kernelize(block, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
    assert block.mlp.forward.__func__.__module__ == f"{kernel.__name__}.layers"
    for backend in ("reference", "triton"):
        with kernel.use_backend(backend):
            same(results(block, leaves), expected)
    same(results(torch.compile(block, fullgraph=True, backend="aot_eager"), leaves), expected)


def check_benchmark(repository, kernel):
    spec = spec_from_file_location("benchmark", repository / "benchmarks" / "benchmark.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    benchmark = module.Junction()
    benchmark.kernel = kernel
    benchmark.setup()
    for name in ("forward", "backward"):
        getattr(benchmark, f"benchmark_{name}")()
        torch.testing.assert_close(benchmark.out, getattr(benchmark, f"verify_{name}")(), rtol=1e-4, atol=1e-4)


def main(repository):
    for variant in (repository / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    kernel = get_local_kernel(repository)
    assert kernel.__name__.startswith("_ditfast_cpu_") and kernel.__name__ in dir(torch.ops)
    check_layers(repository, kernel)
    check_benchmark(repository, kernel)
    assert "ditfast" not in sys.modules


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    print("as the model computes by itself")
