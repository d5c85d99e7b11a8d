"""Forward-mode AD of every operation on every kernel is as exact as PyTorch's, through every interface."""

import contextlib
import sys
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_contract
from golden_values import close
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditfast import ops
from ditfast.ops.backends import choice, selfcheck
from ditfast.ops.backends.availability import why_not
from ditfast.ops.backends.log import record
from ditfast.ops.op import PRECISIONS, RandomTensors
from ditfast.ops.tangents import linear

LINEAR = (ops.PATCHIFY, ops.UNPATCHIFY)


def device_of(backend):
    return "cuda" if backend != "host" and torch.cuda.is_available() else "cpu"


CASES = [
    pytest.param(op, name, precision, id=f"{op.name}-{name}-{precision}")
    for op in ops.ALL
    for name in op.kernels
    if why_not(op, name, device_of(name)) is None
    for precision in (op.backends[name] if name == "host" else ("bf16",))  # the interpreter is slow
]
# what an operation's kernels share is tested on only the fastest of them
KERNELS = {case.values[0]: case.values[1] for case in CASES}
each_op = pytest.mark.parametrize(
    ("op", "backend"), [pytest.param(*pair, id=pair[0].name) for pair in KERNELS.items()]
)


@pytest.fixture(autouse=True)
def fresh(one_thread):
    torch.compiler.reset()


class Problem:
    """An operation as a function of a dict of its tensors, with their values and tangents, different per sample."""

    def __init__(self, op, precision="fp32", dtype=None, device="cpu"):
        self.op, self.mixed = op, precision == "autocast" and dtype is None
        tokens = 9 if "patch" in op.name else 7
        random = RandomTensors(PRECISIONS[precision], device, dtype)
        arguments = op.arguments(random, 3, tokens, 64)
        self.tensors = {name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)}
        self.fixed = {name: a for name, a in arguments.items() if name not in self.tensors}
        stream = {name: t.dtype == random.stream for name, t in self.tensors.items()}
        self.tangents = {name: random(*t.shape, stream=stream[name]) for name, t in self.tensors.items()}
        if op is ops.MLP:  # one more kept activation
            self.fixed["recompute"] = True

    def on(self, backend, names=None):
        """A function that takes the tensors of these names (None: all) by name, and returns a tuple."""
        fixed = {name: t for name, t in self.tensors.items() if names is not None and name not in names}

        def function(tensors):
            autocast = torch.autocast(next(iter(tensors.values())).device.type, torch.bfloat16)
            with autocast if self.mixed else contextlib.nullcontext():
                out = self.op.function(**fixed, **tensors, **self.fixed, backend=backend)
            return out if isinstance(out, tuple) else (out,)

        return function

    def jvp(self, backend, names=None):
        names = self.tensors if names is None else names
        tensors, tangents = ({name: part[name] for name in names} for part in (self.tensors, self.tangents))
        return jvp(self.on(backend, names), (tensors,), (tangents,))


def by_dual_level(function, tensors, tangents):
    with forward_ad.dual_level():
        out = function({name: forward_ad.make_dual(t, tangents[name]) for name, t in tensors.items()})
        return tuple(zip(*(forward_ad.unpack_dual(o) for o in out), strict=True))


def by_jvp(function, tensors, tangents):
    return jvp(function, (tensors,), (tangents,))


def by_compiled_jvp(function, tensors, tangents):
    def run(tensors, tangents):
        out, out_t = by_jvp(function, tensors, tangents)
        return out, tuple(t.detach() for t in out_t)

    return torch.compile(run, fullgraph=True, backend="aot_eager")(tensors, tangents)


WAYS = [(op, way) for op in KERNELS for way in (by_jvp, by_dual_level)]
WAYS += [(op, by_compiled_jvp) for op in (ops.JUNCTION, ops.QKV_ATTENTION, ops.UNPATCHIFY, ops.PATCH_EMBED)]


@pytest.mark.parametrize(("op", "backend", "precision"), CASES)
def test_contract(op, backend, precision, poisoned):
    """Outputs and tangents, for all inputs together and, on the fastest kernel, for each alone."""
    device = device_of(backend)
    kinds = (Problem(op, precision, dtype, device) for dtype in (None, torch.float64))
    problem, exact = kinds
    for names in (None, *([name] for name in problem.tensors if backend == KERNELS[op])):
        got, low = (problem.jvp(b, names) for b in (backend, "reference"))
        ref = exact.jvp("reference", names)
        for kind, parts in zip(("", "tangent of "), zip(got, low, ref, strict=True), strict=True):
            for name, *tensors in zip(op.outputs, *parts, strict=True):
                assert_contract(f"{kind}{name} by {names or 'all'}", *tensors)


class NoAliases(TorchDispatchMode):
    """Checks that a registered operation's results do not alias its inputs, which compiled graphs rely on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "ditfast":
            self.seen = function
            storages = [
                [t.untyped_storage().data_ptr() for t in tree_leaves(ts) if torch.is_tensor(t)] for ts in (args, out)
            ]
            assert not {*storages[0]} & {*storages[1]}, f"{function} returns an argument"
        return out


@each_op
def test_no_tangent_aliases_an_input(op, backend):
    problem = Problem(op, device=device_of(backend))
    for name in problem.tensors:
        with NoAliases() as mode:
            by_dual_level(problem.on(backend, [name]), {name: problem.tensors[name]}, problem.tangents)
        assert mode.seen


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_the_reference_is_the_limit_of_differences(op):
    problem = Problem(op, dtype=torch.float64)
    function, step = problem.on("reference"), 1e-5
    _, tangents = problem.jvp("reference")
    ahead, behind = (
        function({n: t + s * problem.tangents[n] for n, t in problem.tensors.items()}) for s in (step, -step)
    )
    for tangent, a, b in zip(tangents, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("op", "way"), WAYS, ids=lambda value: getattr(value, "name", None) or value.__name__)
def test_every_interface_with_gradients_of_the_outputs(op, way):
    """As in training: tangents enter the loss as constants. One call of the kernel computes both."""
    backend = KERNELS[op]
    problem = Problem(op, device=device_of(backend))
    leaves = {name: t.clone().requires_grad_() for name, t in problem.tensors.items()}

    def step(backend, way):
        with record() as log:
            out, out_t = way(problem.on(backend), leaves, problem.tangents)
        calls = len(log.get(op.name, ()))
        loss = sum(((o - (o.cos() - t).detach()) ** 2).sum() for o, t in zip(out, out_t, strict=True))
        found = [*out, *out_t, *torch.autograd.grad(loss, list(leaves.values()))]
        return dict(enumerate(t.detach() for t in found)), calls

    (got, calls), (expected, _) = step(backend, way), step("reference", by_jvp)
    close(got, expected, 1e-5)
    assert calls == (1 + (op in LINEAR) + 2 * (op is ops.PATCH_EMBED))


@each_op
def test_gradient_of_one_output_alone(op, backend):
    """An output that the loss does not read has no gradient, nor does its tangent."""
    problem = Problem(op, device=device_of(backend))
    for i in range(len(op.outputs)):
        leaves = {name: t.clone().requires_grad_() for name, t in problem.tensors.items()}
        found = []
        for name in (backend, "reference"):
            out = jvp(problem.on(name), (leaves,), (problem.tangents,))[0][i]
            grads = torch.autograd.grad(out.cos().sum(), list(leaves.values()), allow_unused=True)
            found.append({k: leaves[k] * 0 if g is None else g for k, g in zip(leaves, grads, strict=True)})
        close(*found, 1e-5)


@each_op
def test_transforms_around_and_inside(op, backend):
    problem = Problem(op, device=device_of(backend))
    first = next(iter(problem.tensors))
    rest = {name: t for name, t in problem.tensors.items() if name != first}
    calls, calls_t = (
        {name: torch.stack((t, 0.5 * t)) for name, t in part.items()} for part in (problem.tensors, problem.tangents)
    )

    def columns(function):
        """Columns of the Jacobian with respect to one input."""
        return vmap(lambda t: jvp(lambda x: function({**rest, first: x}), (problem.tensors[first],), (t,)))(
            calls_t[first]
        )

    transformed = (
        columns,
        lambda function: vmap(lambda x, t: jvp(function, (x,), (t,)))(calls, calls_t),
        lambda function: jvp(lambda x: vmap(function)(x), (calls,), (calls_t,)),
        lambda function: grad(lambda x: sum(o.cos().sum() for o in by_jvp(function, x, problem.tangents)[0]))(
            problem.tensors
        ),
    )
    for transform in transformed:
        got, expected = (
            torch.utils._pytree.tree_leaves(transform(problem.on(name))) for name in (backend, "reference")
        )
        close(dict(enumerate(got)), dict(enumerate(expected)), 2e-5)


def gradient_of_tangent(function, tensors, tangents):
    return grad(lambda x: sum(t.sum() for t in jvp(function, (x,), (tangents,))[1]))(tensors)


def gradient_by_direction(function, tensors, tangents):
    """Only the direction requires a gradient; some of its inputs may be detached."""
    return grad(lambda v: sum(t.sum() for t in jvp(function, (tensors,), (v,))[1]))(tangents)


def tangent_of_tangent(function, tensors, tangents):
    return jvp(lambda x: jvp(function, (x,), (tangents,)), (tensors,), (tangents,))


def tangent_by_direction(function, tensors, tangents):
    return jvp(lambda v: jvp(function, (tensors,), (v,)), (tangents,), (tangents,))


SECOND = {
    gradient_of_tangent: "the gradient of a tangent is not supported by the kernels",
    gradient_by_direction: "the gradient of a tangent is not supported by the kernels",
    tangent_of_tangent: "a derivative of a tangent is not supported by the kernels",
    tangent_by_direction: "a derivative of a tangent is not supported by the kernels",
}


@each_op
@pytest.mark.parametrize("second", SECOND, ids=lambda second: second.__name__)
def test_second_derivatives_name_an_alternative(op, backend, second):
    problem = Problem(op, device=device_of(backend))
    if op in (*LINEAR, ops.PATCH_EMBED):  # made of first derivatives only
        got, expected = (
            second(problem.on(name), problem.tensors, problem.tangents) for name in (backend, "reference")
        )
        close(*({i: t for i, t in enumerate(torch.utils._pytree.tree_leaves(x))} for x in (got, expected)), 1e-5)
        return
    with pytest.raises(NotImplementedError, match=f"{op.name}: {SECOND[second]}.*use backend='reference'"):
        second(problem.on(backend), problem.tensors, problem.tangents)


@each_op
def test_a_tangent_has_the_dtype_of_its_tensor(op, backend):
    problem = Problem(op, device=device_of(backend))
    problem.tensors = {name: t.clone() for name, t in problem.tensors.items()}  # PyTorch casts tangents of views
    for name in problem.tensors:
        tangents = {n: t.double() if n == name else t for n, t in problem.tangents.items()}
        with pytest.raises(
            TypeError, match=f"{op.name}: the tangent of {name.split('_')[0]}.* must have its dtype, "
        ):
            by_jvp(problem.on(backend), problem.tensors, tangents)


def test_a_tensor_that_outlived_its_transform():
    problem = Problem(ops.JUNCTION, device=device_of(KERNELS[ops.JUNCTION]))
    kept = []
    grad(lambda x: kept.append(x * 1) or x.sum())(problem.tensors["x"])
    problem.tensors["x"] = kept[0]
    found = (problem.jvp(name, ["gate"]) for name in (KERNELS[ops.JUNCTION], "reference"))
    close(*(dict(enumerate(tree_leaves(parts))) for parts in found), 1e-5)


def test_attention_on_a_gpu_gets_its_tangents_from_triton(monkeypatch, tmp_path):
    """Tested with Triton's interpreter as the GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "_AUTO_DEVICES", ("cpu",))
    monkeypatch.setattr(selfcheck, "SIZE", (2, 27))
    monkeypatch.setattr(selfcheck, "_answers", {})
    monkeypatch.setenv("DITFAST_CACHE_DIR", str(tmp_path))
    for head_dim, expected in ((64, "triton"), (40, "sdpa")):
        qkv = torch.randn(2, 5, 3 * head_dim).bfloat16()
        with record() as log:
            jvp(lambda qkv: ops.attention(qkv, 1), (qkv,), (qkv,))
        assert log["attention"][-1] == expected
    choose = sys.modules["ditfast.ops.attention"]._choose_for_tangents
    arguments = ops.ATTENTION, "cuda", torch.device("cpu"), torch.bfloat16, 64
    assert choose(*arguments, None) == "cuda"
    with pytest.raises(RuntimeError, match="'cuda' cannot run: its tangents come from 'triton': no compiler"):
        choose(*arguments, "no compiler")


@pytest.mark.parametrize("count", (1, 2, 3))
def test_linear_equals_pytorch(count):
    """With tangents of any of x, weight and bias; also differentiated again, and with other transforms."""
    tensors = {"x": torch.randn(2, 3, 5), "weight": torch.randn(4, 5), "bias": torch.randn(4)}
    tangents = {name: torch.randn_like(t) for name, t in tensors.items()}

    def columns(function, given, directions):
        stacked = {name: torch.stack((t, -0.5 * t)) for name, t in directions.items()}
        return vmap(lambda directions: by_jvp(function, given, directions))(stacked)

    for names in combinations(tensors, count):
        given, directions = ({name: part[name] for name in names} for part in (tensors, tangents))
        for way in (by_jvp, by_dual_level, columns, tangent_of_tangent, tangent_by_direction, gradient_by_direction):
            found = [
                tree_leaves(way(lambda given, f=f: (f(**{**tensors, **given}).cos(),), given, directions))
                for f in (linear, F.linear)
            ]
            close(*(dict(enumerate(leaves)) for leaves in found), 1e-6)
