"""A tensor that is not what a kernel will read or write raises an error, whatever passed it on."""

import pytest
import torch

from ditfast.ops import extension, host

B, N, D = 2, 4, 16
BF16 = torch.bfloat16


def f(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def freed():
    t = f(B * N, D)
    t.untyped_storage().resize_(0)
    return t


x, row, wide = f(B, N, D), f(B, D), f(B, 2 * D)
qkv, out, lse = f(B, N, 3 * D), f(B, N, D), f(B, 2, N)
CASES = {  # the message -> the call
    "a must be torch.float32": lambda: host.product(f(4, 4, dtype=BF16), f(4, 4)),
    "a must have a stride of 1": lambda: host.product(f(4, 8)[:, ::2], f(4, 4)),
    "b must have shape": lambda: host.product(f(4, 4), f(3, 4)),
    r"bias must have shape \(4,\)": lambda: host.product(f(4, 4), f(4, 4), f(3)),
    "pre must be contiguous": lambda: host.gelu(f(8, 4).t()),
    "pre must have memory": lambda: host.gelu(freed()),
    "pre_t must be torch.float32": lambda: host.gelu_jvp(f(8, 4), f(8, 4, dtype=BF16)),
    "pre_t must have memory": lambda: host.gelu_jvp(f(8, 4), torch._efficientzerotensor(8, 4)),
    "dact must be torch.float32": lambda: host.gelu_backward_(f(8, 4, dtype=BF16), f(8, 4), False),
    "dact must have shape": lambda: host.gelu_backward_(f(8, 3), f(8, 4), True),
    "dact must be contiguous": lambda: host.gelu_backward_(f(4, 8).t(), f(8, 4), True),
    "dact must be on the CPU": lambda: host.gelu_backward_(f(8, 4).to("meta"), f(8, 4), True),
    "shift must have shape": lambda: host.layer_norm_modulate(x, wide, row, 1e-6, BF16),
    "scale must have shape": lambda: host.layer_norm_modulate(x, row, row[:1], 1e-6, BF16),
    "scale_t must have shape": lambda: host.layer_norm_modulate_jvp(x, row, row, 1e-6, BF16, x, row, wide),
    "y must have shape": lambda: host.gated_residual(x, x[:, 1:], row, None),
    r"bias must have shape \(16,\)": lambda: host.gated_residual(x, x, row, f(D + 1)),
    "mean must be torch.float32": lambda: host.layer_norm_modulate_backward(x, x, row, f(B, N, dtype=BF16), f(B, N)),
    "rstd must have shape": lambda: host.junction_backward(x, x, x, x, row, row, None, f(B, N), f(B, N + 1)),
    "dx_new must have shape": lambda: host.junction_backward(x[:1], x, x, x, row, row, None, f(B, N), f(B, N)),
    "image must have shape": lambda: host.patchify(f(2, 3, 9, 8), 2, False),
    "tokens must have shape": lambda: host.unpatchify(f(2, 15, 12), 2, 4, 4, False),
    "qkv_t must be torch.float32": lambda: extension.host_jvp(qkv, qkv.bfloat16(), 2, 1.0),
    "dout must be torch.float32": lambda: extension.host_backward(out.bfloat16(), qkv, out, lse, 1.0),
    "out must be contiguous": lambda: extension.host_backward(out, qkv, f(B, D, N).mT, lse, 1.0),
    "lse must have shape": lambda: extension.host_backward(out, qkv, out, f(B, 2, N - 1), 1.0),
}


@pytest.mark.parametrize("message", CASES)
def test_wrong_tensors(message):
    with pytest.raises((TypeError, ValueError), match=message):
        CASES[message]()
