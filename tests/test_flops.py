"""FLOPs of the registered operations, and the analysis of whole models against measurements and published values."""

import contextlib
import itertools
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast import DiT, use_backend
from ditfast.models.conditioning import CONDITIONINGS
from ditfast.ops.flops import FORMULAS

every = pytest.mark.parametrize("kind", CONDITIONINGS)
KERNELS = ("triton", "host")  # where an operation has either
SMALL = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def on(*names):
    """The other attentions as matrix products, which the counter sees on every device."""
    with contextlib.ExitStack() as stack, sdpa_kernel(SDPBackend.MATH):
        for name in names:
            stack.enter_context(use_backend(name))
        yield


def small(kind="adaln_zero", **changes):
    torch.manual_seed(0)
    model = DiT(**{**SMALL, **changes}, conditioning=kind)
    return model, (torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), torch.tensor([4, 0, 2]))


def counted(fn):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        out = fn()
    return counter.get_total_flops(), out


def forward_backward(model, inputs):
    forward, out = counted(lambda: model(*inputs))
    backward, _ = counted(out.sum().backward)
    return forward, backward


def test_every_registered_operation_has_a_formula():
    registered = {n.removeprefix("ditfast::") for n in torch._C._dispatch_get_all_op_names() if "ditfast::" in n}
    assert registered == FORMULAS.keys()


@every
def test_kernels_count_what_the_reference_counts(kind):
    model, inputs = small(kind)
    results = []
    for names in (("reference",), KERNELS):
        with on(*names):
            inference, _ = counted(torch.no_grad()(lambda: model(*inputs)))
            results.append((inference, *forward_backward(model, inputs)))
    assert results[0] == results[1] and results[0][0] == results[0][1] > 0


@pytest.mark.parametrize("frozen", ["attn.qkv", "mlp.fc1", "mlp.fc2", "x_embedder"])
def test_frozen_weights_have_no_gradient_to_count(frozen):
    model, (x, t, y) = small(depth=1)
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name and name != "pos_embed")
    results = []
    for names in (("reference",), KERNELS):
        with on(*names):
            results.append(forward_backward(model, (x.clone().requires_grad_(), t, y)))
    assert results[0] == results[1]


def test_compiled_graphs_count_the_same():
    """By running the traced graphs, and by what Inductor reads from their nodes."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.fx_utils import count_flops_fx

    ran, read = [], []

    def compiler(graph, inputs):
        read.append(sum(count_flops_fx(node) or 0 for node in graph.graph.nodes if node.op == "call_function"))

        def run(*args):
            flops, out = counted(lambda: torch.fx.Interpreter(graph).run(*args))
            ran.append(flops)
            return out

        return make_boxed_func(run)

    torch.compiler.reset()
    model, inputs = small(depth=1)
    with on(*KERNELS):
        expected = forward_backward(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
        compiled(*inputs).sum().backward()
    assert tuple(ran) == tuple(read) == expected


ORDERS = itertools.permutations(["import torch.utils.flop_counter", "import ditfast.ops"])


@pytest.mark.parametrize("order", ORDERS, ids=("counter-first", "ditfast-first"))
def test_known_in_either_order_of_import(order):
    code = f"{'; '.join(order)}; import torch; print(torch.ops.ditfast.mlp in torch.utils.flop_counter.flop_registry)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
