"""Inputs for attention, its reference in plain PyTorch, and how close a kernel must be to it."""

import torch

from ditfast.ops.contract import errors

NAN = float("nan")


def sample(b, n, heads, d, dtype, seed=0, device="cpu"):
    """qkv and dout; every sample has its own scale."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(1, 0.5, b).view(b, 1, 1)
    qkv, dout = (torch.randn(b, n, k * heads * d, generator=generator) * scales for k in (3, 1))
    return qkv.to(device, dtype), dout.to(device, dtype)


def padded(t):
    """The same values in rows that are 8 elements longer, padded with NaN."""
    rows = torch.full((*t.shape[:-1], t.shape[-1] + 8), NAN, dtype=t.dtype, device=t.device)
    rows[..., : t.shape[-1]] = t
    return rows[..., : t.shape[-1]]


def token_major(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def parts(qkv, heads):
    """Views of q, k and v: (B, N, H, d)."""
    b, n, width = qkv.shape
    return qkv.view(b, n, 3, heads, width // (3 * heads)).unbind(2)


def far_logits(b, n, heads, d, dtype, level, device="cpu"):
    """All logits are near ``level``: at -1e4, a single leaked zero key would take all the weight."""
    qkv, dout = sample(b, n, heads, d, dtype)
    q, k, _ = parts(qkv, heads)
    q[..., 0] = 128.0
    k[..., 0] = level / 128.0
    return qkv.to(device), dout.to(device)


def reference(qkv, dout, heads, dtype, scale):
    """out, lse, dqkv and the largest logit, by plain tensor operations in ``dtype``."""
    qkv = qkv.detach().to(dtype).requires_grad_()
    q, k, v = (t.transpose(1, 2) for t in parts(qkv, heads))  # (B, H, N, d)
    logits = q @ k.mT * scale
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    (dqkv,) = torch.autograd.grad(out, qkv, dout.to(dtype))
    return out.detach(), logits.logsumexp(-1).detach(), dqkv, logits.detach().abs().max().item()


def assert_right(results, qkv, dout, heads, scale=None):
    """out, lse and dqkv meet the contract, and rows of dbias (B, groups, 3*H*d) have the right sums.

    Two more float32 errors are allowed, which a softmax that divides by its own sum does not have. The relative error
    of a weight exp(logit - lse) grows with the logits and their log-sum-exp. And where only one key has weight,
    dout.v - dout.out is not exactly zero, because the two are summed in different orders.
    """
    out, lse, dqkv, dbias = results
    assert_right_sums(dbias, dqkv, dout)
    scale = (qkv.shape[-1] // (3 * heads)) ** -0.5 if scale is None else scale
    exact_out, exact_lse, exact_dqkv, largest = reference(qkv, dout, heads, torch.float64, scale)
    low_out, _, low_dqkv, _ = reference(qkv, dout, heads, qkv.dtype, scale)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=2e-6)
    eps = torch.finfo(torch.float32).eps
    weight_error = 2 * eps * max(largest, exact_lse.abs().max().item())
    triples = (t.chunk(3, dim=-1) for t in (dqkv, low_dqkv, exact_dqkv))
    named = {
        "out": (out, low_out, exact_out),
        **dict(zip(("dq", "dk", "dv"), zip(*triples, strict=True), strict=True)),
    }
    for name, (got, low, exact) in named.items():
        assert torch.isfinite(got).all(), f"{name} is not finite everywhere"
        cancelled = 4 * eps * scale * difference_terms(qkv, dout, heads) if name in ("dq", "dk") else 0.0
        for kind, error, limit in errors(got, low, exact):
            if kind == "max error":
                slack = weight_error * exact.abs().max().item() + cancelled
            else:
                norm = exact.flatten(1).norm(dim=1).min().clamp(min=torch.finfo(got.dtype).tiny).item()
                slack = weight_error + cancelled * exact[0].numel() ** 0.5 / norm
            assert error <= limit + slack, f"{name}: {kind} {error:.3g} > {limit + slack:.3g}"


def assert_right_sums(dbias, dqkv, dout):
    """The rows of dbias add up to the sum of unrounded dqkv: dq's is computed as a sum, dk's and dv's are exact."""
    dq, dk, dv = dbias.double().sum((0, 1)).chunk(3)
    stored = dqkv.chunk(3, dim=-1)[0].double()
    bound = torch.finfo(dqkv.dtype).eps / 2 * stored.abs().sum((0, 1)) + 1e-6 * (1 + stored.abs().max())
    assert ((dq - stored.sum((0, 1))).abs() <= bound).all(), "sums of dq"
    assert not dk.any(), "sums of dk"
    torch.testing.assert_close(dv, dout.double().sum((0, 1)), atol=1e-5, rtol=1e-5)


def difference_terms(qkv, dout, heads):
    """A bound on the terms of dout.v, times the largest element of q and k."""
    q, k, v = (t.double() for t in parts(qkv, heads))
    rows = dout.double().unflatten(-1, (heads, -1)).norm(dim=-1).max() * v.norm(dim=-1).max()
    return (rows * max(q.abs().max(), k.abs().max())).item()


def probe_inputs():
    """Inputs of csrc/attention/probe.cuh: matrices, and small integers as operands in both dtypes."""
    matrices = torch.arange(256, dtype=torch.int16)
    numbers = torch.randint(-3, 4, (32, 12), generator=torch.Generator().manual_seed(0))
    operands = torch.stack([numbers.to(dtype).view(torch.int16) for dtype in (torch.bfloat16, torch.float16)])
    return matrices, operands
