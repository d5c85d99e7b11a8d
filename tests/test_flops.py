"""FLOPs of the registered operations, and the analysis of whole models against measurements and published values."""

import contextlib
import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast import DiT, flops, ops, use_backend
from ditfast.models import cost
from ditfast.models.conditioning import CONDITIONINGS
from ditfast.ops.backends.log import record

every = pytest.mark.parametrize("kind", CONDITIONINGS)
KERNELS = ("triton", "host")  # if an operation has one
SMALL = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5)


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@contextlib.contextmanager
def on(*names):
    """Replace other attentions with matrix products, which the counter sees on every device."""
    with contextlib.ExitStack() as stack, sdpa_kernel(SDPBackend.MATH):
        for name in names:
            stack.enter_context(use_backend(name))
        yield


def small(kind="adaln_zero", **changes):
    torch.manual_seed(0)
    model = DiT(**{**SMALL, **changes}, conditioning=kind)
    return model, (torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), torch.tensor([4, 0, 2]))


class Untracked(contextlib.nullcontext):
    """Stands in for the counter's module tracker, whose hooks make a model call every module, unfused."""

    parents = ("Global",)


def counted(fn, fused=True):
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    if fused:
        counter.mod_tracker = Untracked()
    with counter:
        out = fn()
    return counter.get_total_flops(), out


def forward_backward(model, inputs, fused=True):
    forward, out = counted(lambda: model(*inputs), fused)
    backward, _ = counted(out.sum().backward, fused)
    return forward, backward


def test_every_registered_operation_has_a_formula():
    registered = {n.removeprefix("ditfast::") for n in torch._C._dispatch_get_all_op_names() if "ditfast::" in n}
    assert registered == {name for op in ops.ALL for name in op.flops}


@every
def test_kernels_count_what_the_reference_counts(kind):
    """In inference, forward and backward; fused, and module by module as with the counter's own hooks."""
    model, inputs = small(kind)
    results = []
    for names, fused in ((("reference",), True), (KERNELS, True), (KERNELS, False)):
        with on(*names), record() as ran:
            inference, _ = counted(torch.no_grad()(lambda: model(*inputs)), fused)
            results.append((inference, *forward_backward(model, inputs, fused)))
        assert ("mlp" in ran) == fused
    assert results[0] == results[1] == results[2] and results[0][0] == results[0][1] > 0


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
    """When the traced graphs run, and when Inductor reads their nodes."""
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


ORDERS = list(itertools.permutations(["import torch.utils.flop_counter", "import ditfast.ops"]))


@pytest.mark.parametrize("order", ORDERS, ids=("counter-first", "ditfast-first"))
def test_known_in_either_order_of_import(order):
    code = f"{'; '.join(order)}; import torch; print(torch.ops.ditfast.mlp in torch.utils.flop_counter.flop_registry)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


@every
def test_formula_equals_the_counters_result(kind):
    model, (x, t, y) = small(kind, depth=3, hidden_size=48, patch_size=4, mlp_ratio=3.0, learn_sigma=False)
    with on("reference"):
        flops, _ = counted(torch.no_grad()(lambda: model(x, t, y)))
    assert flops == 2 * 3 * sum(cost.macs(model).values())


# PyTorch's LayerNorm keeps bfloat16 statistics on the CPU, float32 on a GPU
KEPT = [(k, d) for k in CONDITIONINGS for d in cost.DTYPES if d != "bf16" or cost.ROWS[k]]


@pytest.mark.parametrize("kind, dtype", KEPT)
@pytest.mark.parametrize("recompute", (False, True))
def test_kept_bytes_equal_a_measurement(kind, dtype, recompute):
    model, (x, t, y) = small(kind, recompute_mlp=recompute, num_classes=7)
    model, x = (model.bfloat16(), x.bfloat16()) if dtype == "bf16" else (model, x)
    shapes = {s for p in model.parameters() for s in (p.shape, p.flatten(1).shape if p.dim() > 1 else p.shape)}
    shapes |= {s[::-1] for s in shapes}
    sizes, alive = {}, []

    def pack(t):
        alive.append(t)  # kept alive, so that no address is reused
        if t.shape not in shapes:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with on(*KERNELS), sdpa_kernel(SDPBackend.FLASH_ATTENTION), autocast, saved:
        alive.append(model(x, t, y))
    tokens = 16 + 2 * (kind == "in_context")
    second_lse = 2 * 4 * 3 * 2 * tokens  # two blocks; float32 (B, H, N): only the CPU's kernel keeps lse in two parts
    assert sum(sizes.values()) - second_lse == sum(cost.kept_bytes(model, 3, dtype).values())


def near_published(value, published, digits):
    """Equal within 0.1 %, or half a unit of the last published digit."""
    return abs(value - published) <= max(1e-3 * published, 0.5 * 10**-digits)


@pytest.mark.parametrize("name", flops.PAPER)
def test_published_gflops(name):
    model = cost.build_on_meta(name)
    assert near_published(sum(cost.macs(model).values()) / 1e9, flops.PAPER[name][0], 2)
    assert sum(cost.parameters(model).values()) == sum(p.numel() for p in model.parameters())


@every
def test_published_gflops_of_the_conditionings_and_of_512(kind):
    assert near_published(flops.analyse("DiT-XL/2", kind)["paper_gflops"], flops.PAPER_XL_2[kind][0], 2)
    if kind == "adaln_zero":
        assert near_published(flops.analyse("DiT-XL/2", image_size=512)["paper_gflops"], 525, 0)


def test_parameters_by_operator():
    found = cost.parameters(cost.build_on_meta("DiT-XL/2", "cross_attention"))
    d = 1152
    assert found["qkv"] == 28 * (3 * d * d + 3 * d) and found["mlp"] == 28 * (8 * d * d + 5 * d)
    assert found["cross-attention"] == 28 * (4 * d * d + 4 * d) and found["norm, residual"] == 28 * 3 * 2 * d
    assert found["proj"] == 28 * (d * d + d) and found["final"] == 2 * d + 32 * d + 32 and not found["adaLN"]


def test_training_costs_three_forwards():
    r = flops.analyse("DiT-S/8", batch=256, train_steps=1000)
    assert r["training_flops"] == 3 * 1000 * r["flops"] == pytest.approx(6e9 * 256 * 1000 * r["paper_gflops"])


def test_command(capsys, tmp_path):
    flops.main(["--model", "DiT-S/4", "--json", "--batch", "2"])
    r = json.loads(capsys.readouterr().out)
    assert r["flops"] == 4 * r["paper_gflops"] * 1e9 and r["published_gflops"] == 1.41 and r["training_flops"] is None
    assert sum(op["kept_bytes"] for op in r["operators"].values()) == r["kept_bytes"]
    flops.main(["--model", "DiT-S/4", "--plot", str(tmp_path / "plot.png")])
    out = capsys.readouterr().out
    assert "1.41 Gflops as the paper counts them = GMACs (published: 1.41)" in out and "2212.09748" in out
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    flops.main(["--model", "DiT-S/8", "--conditioning", "all", "--batch", "8", "--train-steps", "10"])
    assert set(CONDITIONINGS) <= set(capsys.readouterr().out.split())


def test_correlation_of_the_papers_numbers():
    logs, semilog = flops.correlations([flops.analyse(name) for name in flops.PAPER])
    assert logs == pytest.approx(-0.936, abs=5e-4) and semilog == pytest.approx(-0.93, abs=5e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train-steps", "5"], "--train-steps needs --batch"),
        (["--image-size", "100"], "--image-size must be a positive multiple of 64, got 100"),
        (["--batch", "0"], "must be at least 1"),
        (["--conditioning", "none"], "invalid choice: 'none'"),
        (["--model", "DiT-XL/3"], "invalid choice: 'DiT-XL/3'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        flops.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        (("--batch", "0"), "--batch must be at least 1, got 0"),
        (("--batch", "1", "--train-steps", "0"), "--train-steps must be at least 1, got 0"),
        (("--train-steps", "1"), "--train-steps needs --batch"),
        (("--image-size", "100"), "--image-size must be a positive multiple of 64, got 100"),
        (("--plot", ""), "--plot must be a path, got ''"),
        (("--model", "DiT-S/8", "--plot", "nowhere/x.png"), "--plot nowhere/x.png cannot be written: No such file"),
        (("--model", "DiT-S/8", "--plot", "x.nothing"), "--plot x.nothing cannot be written: Format 'nothing'"),
    ],
)
def test_refused(refusal_of, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refusal_of(flops.main)([*options])
