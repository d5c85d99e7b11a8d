"""The benchmark for ``kernels benchmark``: the junction of a DiT-XL/2 block, forward and backward."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class Junction(Benchmark):
    seed = 42

    def setup(self):
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.x, self.y, self.gradient = (torch.randn(8, 256, 1152, device=self.device, dtype=dtype) for _ in range(3))
        self.rows = torch.randn(8, 3, 1152, device=self.device, dtype=dtype).unbind(1)  # gate, shift, scale

    def benchmark_forward(self):
        self.out = self.kernel.gated_residual_layer_norm_modulate(self.x, self.y, *self.rows)[1]

    def verify_forward(self):
        gate, shift, scale = (row.unsqueeze(1) for row in self.rows)
        return F.layer_norm(self.x + gate * self.y, (1152,), eps=1e-6) * (1 + scale) + shift

    def benchmark_backward(self):
        x = self.x.detach().requires_grad_()
        h = self.kernel.gated_residual_layer_norm_modulate(x, self.y, *self.rows)[1]
        (self.out,) = torch.autograd.grad(h, x, self.gradient)

    def verify_backward(self):
        x = self.x.detach().requires_grad_()
        gate, shift, scale = (row.unsqueeze(1) for row in self.rows)
        h = F.layer_norm(x + gate * self.y, (1152,), eps=1e-6) * (1 + scale) + shift
        return torch.autograd.grad(h, x, self.gradient)[0]
