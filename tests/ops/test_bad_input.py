"""One clear error per bad argument, and for what the kernels cannot differentiate."""

import pytest
import torch
from torch.autograd import gradgradcheck

from ditfast import ops
from ditfast.ops.backends.availability import why_not


def good(op, dtype=torch.float32):
    """Valid arguments of ``op``, by name."""
    g = torch.Generator().manual_seed(0)

    def t(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    rows = {name: t(2, 4, 8) for name in "xy"} | {name: t(2, 8) for name in ("gate", "shift", "scale")}
    names = {
        "layer_norm_modulate": ("x", "shift", "scale"),
        "gated_residual": ("x", "y", "gate"),
        "gated_residual_layer_norm_modulate": ("x", "y", "gate", "shift", "scale"),
    }
    if op in names:
        bias = {} if op == "layer_norm_modulate" else {"bias": t(8)}
        return {name: rows[name] for name in names[op]} | bias
    return {
        "mlp": lambda: {"h": t(2, 4, 8), "w1": t(16, 8), "b1": t(16), "w2": t(8, 16), "b2": t(8)},
        "attention": lambda: {"qkv": t(2, 4, 3 * 2 * 64), "num_heads": 2},
        "qkv_attention": lambda: {"h": t(2, 4, 8), "weight": t(384, 8), "bias": t(384), "num_heads": 2},
        "patchify": lambda: {"x": t(2, 3, 4, 6), "patch_size": 2},
        "unpatchify": lambda: {"tokens": t(2, 6, 12), "patch_size": 2, "grid": (2, 3)},
        "patch_embed": lambda: {
            "x": t(2, 3, 4, 6), "weight": t(8, 3, 2, 2), "bias": t(8), "pos_embed": t(1, 6, 8), "patch_size": 2
        },
    }[op]()  # fmt: skip


ROWS = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")
OPS = tuple(op.name for op in ops.ALL)
TENSORS = [(op, name) for op in OPS for name, value in good(op).items() if isinstance(value, torch.Tensor)]
FIRST = {op: next(iter(good(op))) for op in OPS}


def rejects(op, error, *parts, **changes):
    """``op`` raises ``error`` with every part in its message, whatever the backend."""
    arguments = {**good(op), **changes}
    with pytest.raises(error) as caught:
        getattr(ops, op)(**arguments)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_are_accepted(op):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert getattr(ops, op)(**good(op, dtype)) is not None


@pytest.mark.parametrize(("op", "name"), TENSORS)
@pytest.mark.parametrize("value", (3.0, None, [1.0], "x"), ids=repr)
def test_not_a_tensor(op, name, value):
    if value is None and name in ("bias", "b2") and op != "patch_embed":
        getattr(ops, op)(**{**good(op), name: None})
    else:
        rejects(op, TypeError, f"{name} must be a tensor, got {type(value).__name__}", **{name: value})


@pytest.mark.parametrize(("op", "name"), TENSORS)
@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8, torch.bool, torch.complex64), ids=str)
def test_dtype(op, name, dtype):
    rejects(
        op, TypeError, f"{name} must be float32, float16, bfloat16 or float64", f"got {dtype}",
        **{name: good(op)[name].to(dtype)},
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_layout(op, name):
    """Kernels read memory by its strides."""
    value = good(op)[name]
    layouts = [value.to_sparse(), value.to_mkldnn()]
    layouts += [value.to_sparse_csr()] if value.dim() in (2, 3) else []
    layouts += [torch.nested.as_nested_tensor([*value], layout=torch.jagged)] if value.dim() > 1 else []
    for wrong in layouts:
        rejects(op, TypeError, f"{name} must be a dense tensor, torch.strided, got {wrong.layout}", **{name: wrong})
    if value.dim() > 1:  # strided, but without a shape
        nested = torch.nested.nested_tensor([*value])
        rejects(op, TypeError, f"{name} must be a dense tensor, torch.strided, got a nested tensor", **{name: nested})


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair[1] != FIRST[pair[0]]])
def test_device(op, name):
    rejects(
        op, ValueError, f"{name} must be on the first argument's device, cpu, got meta",
        **{name: good(op)[name].to("meta")},
    )  # fmt: skip


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_rank(op, name):
    value = good(op)[name]
    for wrong in (value[0], value[None], value.flatten()[0]):
        if name == "pos_embed" and wrong is not value[None] and wrong.dim() == 2:
            continue  # (N, D) is fine
        rejects(op, ValueError, f"{name} must have shape (", f"got {tuple(wrong.shape)}", **{name: wrong})


# op, argument, its wrong shape, what else the message says
SHAPES = [
    *((op, name, shape, rule)
      for op in ROWS
      for name in ("gate", "shift", "scale") if name in good(op)
      for shape, rule in (
          ((2, 4), "(B, D) = (2, 8)"), ((3, 8), "(B, D) = (2, 8)"), ((1, 8), "(B, D) = (2, 8)"),
          ((2, 1, 8), "(B, D) = (2, 8) or (B, N, D) = (2, 4, 8)"),
          ((2, 4, 4), "(B, D) = (2, 8) or (B, N, D) = (2, 4, 8)"),
      )),
    *((op, name, shape, rule)
      for op in ROWS[1:]
      for name, shape, rule in (
          ("y", (2, 5, 8), "(B, N, D) = (2, 4, 8)"), ("y", (2, 4, 16), "(B, N, D) = (2, 4, 8)"),
          ("bias", (4,), "(D,) = (8,)"), ("bias", (1,), "(D,) = (8,)"),
      )),
    ("mlp", "w1", (16, 4), "(F, D) = (16, 8)"),
    ("mlp", "b1", (8,), "(F,) = (16,)"),
    ("mlp", "w2", (8, 12), "(D_out, F) = (8, 16)"),
    ("mlp", "b2", (16,), "(D_out,) = (8,)"),
    ("qkv_attention", "weight", (384, 7), "(3*H*d, D) = (384, 8)"),
    ("qkv_attention", "bias", (128,), "(3*H*d,) = (384,)"),
    ("patch_embed", "weight", (8, 4, 2, 2), "(D, C, p, p) = (8, 3, 2, 2)"),
    ("patch_embed", "weight", (8, 3, 4, 4), "(D, C, p, p) = (8, 3, 2, 2)"),
    ("patch_embed", "weight", (8, 3, 2, 1), "(D, C, p, p) = (8, 3, 2, 2)"),
    ("patch_embed", "bias", (3,), "(D,) = (8,)"),
    ("patch_embed", "pos_embed", (1, 5, 8), "(1, N, D) = (1, 6, 8)"),
    ("patch_embed", "pos_embed", (2, 6, 8), "(1, N, D) = (1, 6, 8)"),
    ("patch_embed", "pos_embed", (6, 4), "(N, D) = (6, 8)"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "shape", "rule"), SHAPES)
def test_shape(op, name, shape, rule):
    rejects(op, ValueError, f"{name} must have shape {rule}, got {shape}", **{name: torch.zeros(shape)})


@pytest.mark.parametrize(("op", "name"), [("layer_norm_modulate", "x"), ("mlp", "h"), ("unpatchify", "tokens")])
def test_no_columns(op, name):
    rejects(op, ValueError, f"{name} must have D >= 1, got shape (2, 4, 0)", **{name: torch.zeros(2, 4, 0)})


RULES = [
    ("attention", ValueError, "qkv must have N >= 1 tokens, got shape (2, 0, 24)", {"qkv": torch.zeros(2, 0, 24)}),
    ("attention", ValueError, "qkv must have a last size divisible by 3 * num_heads=15, got 384", {"num_heads": 5}),
    ("qkv_attention", ValueError, "h must have N >= 1 tokens, got shape (2, 0, 8)", {"h": torch.zeros(2, 0, 8)}),
    ("qkv_attention", ValueError, "weight must have a first size divisible by 3 * num_heads=15, got 384",
     {"num_heads": 5}),
    ("qkv_attention", ValueError, "weight must have a first size divisible by 3 * num_heads=6, got 0",
     {"weight": torch.zeros(0, 8)}),
    ("qkv_attention", TypeError, "weight must have the dtype of h, torch.float16, outside autocast",
     {"h": torch.zeros(2, 4, 8).half()}),
    ("qkv_attention", TypeError, "bias must have the dtype of h, torch.float32, outside autocast, got torch.f",
     {"bias": torch.zeros(384).double()}),
    ("mlp", TypeError, "w1 must have the dtype of h, torch.bfloat16, outside autocast",
     {"h": torch.zeros(2, 4, 8).bfloat16()}),
    ("mlp", TypeError, "b2 must have the dtype of h, torch.float32, outside autocast, got torch.f",
     {"b2": torch.zeros(8).double()}),
    ("patch_embed", TypeError, "weight must have the dtype of x, torch.bfloat16, outside autocast",
     {"x": torch.zeros(2, 3, 4, 6).bfloat16()}),
    ("patch_embed", TypeError, "bias must have the dtype of x, torch.float32, outside autocast, got torch.f",
     {"bias": torch.zeros(8).half()}),
    ("patchify", ValueError, "x must have H and W divisible by patch_size=4, got shape (2, 3, 4, 6)",
     {"patch_size": 4}),
    ("patch_embed", ValueError, "x must have H and W divisible by patch_size=2, got shape (2, 3, 5, 6)",
     {"x": torch.zeros(2, 3, 5, 6)}),
    ("unpatchify", ValueError, "tokens must have a last size divisible by patch_size**2=25, got 12",
     {"patch_size": 5}),
    ("unpatchify", ValueError, "grid must be given for N=6 tokens, which is not a perfect square", {"grid": None}),
    ("unpatchify", ValueError, "grid must be (rows, columns) with rows * columns = N = 6, got (2, 2)",
     {"grid": (2, 2)}),
    ("unpatchify", ValueError, "grid must be (rows, columns) with rows * columns = N = 6, got (6,)", {"grid": (6,)}),
    ("unpatchify", ValueError, "grid must be (rows, columns) with rows * columns = N = 6, got (-2, -3)",
     {"grid": (-2, -3)}),
    ("unpatchify", ValueError, "grid must be (rows, columns) with rows * columns = N = 6, got (1.5, 4)",
     {"grid": (1.5, 4)}),
    ("unpatchify", ValueError, "grid must be (rows, columns) with rows * columns = N = 6, got 6", {"grid": 6}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "error", "message", "changes"), RULES, ids=[f"{r[0]}-{r[2]}" for r in RULES])
def test_rule(op, error, message, changes):
    rejects(op, error, message, **changes)


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, "patch_size" if "patch" in op else "num_heads") for op in OPS if "patch" in op or "attention" in op],
)
@pytest.mark.parametrize("value", (0, -2, 2.0, "2", True, None), ids=repr)
def test_count(op, name, value):
    rejects(op, ValueError, f"{name} must be a positive integer, got {value!r}", **{name: value})


def device_of(backend):
    return "cuda" if backend != "host" and torch.cuda.is_available() else "cpu"


# every operation on every backend with its own gradients
KERNELS = [(op.name, name) for op in ops.ALL for name in op.kernels if why_not(op, name, device_of(name)) is None]


def call_and_tensors(op, backend, dtype=torch.float32):
    """``op`` as a function of its tensors, and the tensors."""
    arguments = good(op, dtype)
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]

    def fn(*tensors):
        return getattr(ops, op)(**{**arguments, **dict(zip(names, tensors, strict=True))}, backend=backend)

    return fn, [arguments[name].to(device_of(backend)) for name in names]


def jvp(fn, tensors):
    return torch.func.jvp(fn, tuple(tensors), tuple(torch.ones_like(t) for t in tensors))[1]


def requires_grad(fn, tensors):
    return fn, [t.detach().requires_grad_() for t in tensors]


LINEAR = ("patchify", "unpatchify")  # each one's gradient is the other


@pytest.mark.parametrize(("op", "backend"), [pair for pair in KERNELS if pair[0] not in LINEAR])
def test_double_backward_is_rejected(op, backend):
    fn, tensors = requires_grad(*call_and_tensors(op, backend))
    out = fn(*tensors)
    out = out[-1] if isinstance(out, tuple) else out
    gradients = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    message = f"{op}: double backward is not supported by the kernels; use backend='reference'"
    with pytest.raises(NotImplementedError, match=message):
        sum(g.square().sum() for g in gradients).backward()


@pytest.mark.parametrize("op", LINEAR)
def test_double_backward_of_a_permutation(op):
    for backend in ("triton", "reference"):
        fn, (t,) = requires_grad(*call_and_tensors(op, backend))
        (gradient,) = torch.autograd.grad(fn(t).pow(3).sum(), t, create_graph=True)
        torch.testing.assert_close(gradient, 3 * t.square())
        (second,) = torch.autograd.grad(gradient.sum(), t)
        torch.testing.assert_close(second, 6 * t)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_supports_both(op):
    fn, tensors = requires_grad(*call_and_tensors(op, "reference", torch.float64))
    assert gradgradcheck(fn, tensors, fast_mode=True)
    tangent = jvp(fn, [t.detach() for t in tensors])
    tangent = tangent if isinstance(tangent, tuple) else (tangent,)
    step = 1e-6
    ahead, behind = (fn(*(t.detach() + s for t in tensors)) for s in (step, -step))
    ahead, behind = (t if isinstance(t, tuple) else (t,) for t in (ahead, behind))
    for t, a, b in zip(tangent, ahead, behind, strict=True):
        torch.testing.assert_close(t, (a - b) / (2 * step), rtol=1e-6, atol=1e-6)
