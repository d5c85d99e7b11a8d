"""The bytes that an operation has to move, and the arithmetic of attention.

Only tensors that grow with B * N count, each once for every read and once for every write: modulation rows, biases,
statistics and partial sums are below one percent at the sizes of interest.
"""

from ditfast.ops.verify import PRECISIONS

CHANNELS, PATCH = 4, 2  # of the images

# (op, mode) -> how many times each kind of tensor is moved. A stream or branch tensor is (B, N, D), in the dtype of
# the residual stream or of a branch; an image is (B, 4, 2 sqrt(N), 2 sqrt(N)) in the dtype of a branch.
MOVED = {
    ("layer_norm_modulate", "fwd"): {"stream": 1, "branch": 1},  # x -> h
    ("layer_norm_modulate", "bwd"): {"branch": 1, "stream": 2},  # dh, x -> dx
    ("gated_residual", "fwd"): {"stream": 2, "branch": 1},  # x, y -> x
    ("gated_residual", "bwd"): {"stream": 1, "branch": 2},  # dx, y -> dy; dx goes on as it is
    ("junction", "fwd"): {"stream": 2, "branch": 2},  # x, y -> x, h
    ("junction", "bwd"): {"stream": 3, "branch": 3},  # dx, dh, x, y -> dx, dy
    ("gelu", "bwd"): {"branch": 12},  # da, pre -> dpre, each (B, N, 4D)
    ("gelu_recompute", "bwd"): {"branch": 16},  # also -> a
    ("patchify", "fwd"): {"image": 2},
    ("patchify", "bwd"): {"image": 2},
    ("unpatchify", "fwd"): {"image": 4},  # twice the channels: noise and variance
    ("unpatchify", "bwd"): {"image": 4},
    ("patch_embed", "fwd"): {"image": 1, "stream": 1},
    ("patch_embed", "bwd"): {"image": 1, "stream": 1},  # dx, image -> gradients of the parameters
    ("attention", "fwd"): {"branch": 4},  # q, k, v -> out
    ("attention", "bwd"): {"branch": 8},  # q, k, v, out, dout -> dq, dk, dv
}


def bytes_moved(op: str, mode: str, shape: tuple[int, int, int], dtype: str) -> int:
    """The least bytes that one pass of ``op`` reads and writes.

    Args:
        op, mode: a key of `MOVED`.
        shape: (B, N, D).
        dtype: a key of `ditfast.ops.verify.PRECISIONS`.
    """
    batch, tokens, dim = shape
    stream, branch = (t.itemsize for t in PRECISIONS[dtype])
    sizes = {
        "stream": batch * tokens * dim * stream,
        "branch": batch * tokens * dim * branch,
        "image": batch * tokens * CHANNELS * PATCH**2 * branch,
    }
    return sum(times * sizes[kind] for kind, times in MOVED[op, mode].items())


def attention_flops(mode: str, batch: int, tokens: int, heads: int, head_dim: int) -> int:
    """Two per multiply-add, at the true head dim: two products forward, five backward, which recomputes one."""
    products = {"fwd": 2, "bwd": 5, "both": 7}[mode]
    return products * 2 * batch * heads * tokens * tokens * head_dim
