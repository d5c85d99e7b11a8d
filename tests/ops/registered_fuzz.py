"""Call every registered operation with one wrong argument after another; print what a kernel computes wrongly.

Run in a process of its own, which a kernel that believes a wrong argument would kill.
"""

import sys
import warnings

import torch
from ops.registered import on_formulas, registered_calls
from ops.test_bad_input import OPS
from torch.utils._pytree import tree_leaves

# of attention's backward, which must fit each other: formulas and kernels differ where exp(logit - lse) is no share
FITTED = ("qkv", "lse", "scale")
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.bool, torch.complex64)


def tensors(t):
    """The same tensor in other dtypes, sizes, memory layouts and places."""
    yield from (t.to(dtype) for dtype in DTYPES)
    yield torch.empty(0, dtype=t.dtype)
    yield torch.empty(0, dtype=torch.float64)
    yield t.reshape(-1)
    yield t[None]
    yield t.flatten(0, 1) if t.dim() > 1 else t.expand(2, -1)
    yield t.to("meta")
    yield t.to_sparse()
    yield t.flatten()[0].expand(t.shape)
    yield t.movedim(0, -1).contiguous().movedim(-1, 0)
    yield t.repeat_interleave(2, -1)[..., ::2]
    for dim, size in enumerate(t.shape):
        yield t.narrow(dim, 0, size - 1)
        yield t.narrow(dim, 0, 0)
        yield torch.cat([t, t], dim)


def wrong(a):
    """Values to pass in place of ``a``."""
    if isinstance(a, torch.Tensor):
        return list(tensors(a))
    if isinstance(a, bool):
        return [not a]
    if isinstance(a, list):
        return [[], a[:-1], a + a]
    if isinstance(a, int):
        return [0, -1, -a, a + 1, 2**31, 2**62]
    if isinstance(a, float):
        return [0.0, -1.0, float("nan"), float("inf"), 1e300]
    if isinstance(a, torch.dtype):
        return list(DTYPES)
    return ["", "hots", "cuda", "sdpa", "auto"] if isinstance(a, str) else []


def run(op, args):
    """The outputs, or None for an error."""
    try:
        return [t for t in tree_leaves(op(*args)) if not t.is_meta]
    except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, ZeroDivisionError):
        return None


def differ(got, expected, args):
    """How a kernel's outputs differ from the formulas'; None if they do not."""
    tolerance = max(torch.finfo(t.dtype).eps for t in (*args, *got) if isinstance(t, torch.Tensor)) ** 0.5
    if expected is None:
        return "the formulas refuse this"
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.dim() == 3 and a.shape == (b.shape[0], 2 * b.shape[1], b.shape[2]):
            continue  # "host" keeps lse in two parts
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"output {i} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        a, b = (t.double().nan_to_num(0, 0, 0) for t in (a, b))
        if (a - b).norm() > tolerance * (1 + b.norm()):
            return f"output {i}"
    return None


def main(backend):
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tried = 0
    for name in OPS:
        for op, args in registered_calls(name, backend).items():
            for i, argument in enumerate(op._schema.arguments):
                for number, value in enumerate(wrong(args[i])):
                    changed = [*args[:i], value, *args[i + 1 :]]
                    got, tried = run(op, changed), tried + 1
                    if got is None or ("attention_backward" in op.name() and argument.name in FITTED):
                        continue
                    why = differ(got, run(op, on_formulas(op, changed)), changed)
                    if why is not None:
                        print(f"{op.name()} {argument.name} {number}: {why}", flush=True)
    print(f"tried {tried}")


if __name__ == "__main__":
    main(sys.argv[1])
