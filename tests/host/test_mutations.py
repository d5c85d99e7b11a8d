"""Errors planted in the CPU kernels: the numerical contract, a NaN or a second thread must reveal each."""

import sys
from functools import cache, partial

import pytest
import torch
from attention_cases import NAN
from contract import assert_contract, compare, run
from host import attention_calls, mutants, test_gelu, test_norm, test_product, test_rows
from host.mutants import Planted, assert_same_on_two_threads, plant
from host.planted_in_attention import PLANTED_IN_ATTENTION
from host.planted_in_jvp import PLANTED_IN_JVP
from ops.row_ops import Case

import ditfast
from ditfast import ops
from ditfast.ops import host

_C = pytest.importorskip("ditfast._C")
pytestmark = pytest.mark.skipif(not (mutants.CMAKE and mutants.NINJA), reason="needs cmake and ninja")


def check_rows(*names):
    """Two chunks of rows, the last one partial, and columns that fill no vector; on one thread and on two."""
    for name in names:
        for dtype in ("mixed", "fp32"):
            case = Case(name, dtype, b=3, n=45, d=40, layout="strided")
            call = partial(case.call, backend="host")
            compare(case.call, case.inputs, names=case.names(), weights=case.weights(), backend="host")
        results = run(call, case.inputs(), case.weights())
        assert_same_on_two_threads(lambda: run(call, case.inputs(), case.weights()), results)  # noqa: B023


def check_norm():
    check_rows("layer_norm_modulate")
    x = torch.randn(1, 3, 43, generator=torch.Generator().manual_seed(1)) * 1e-3  # eps matters
    row = torch.zeros(1, 43)
    exact = torch.nn.functional.layer_norm(x.double(), (43,), eps=1e-6)
    torch.testing.assert_close(host.layer_norm_modulate(x, row, row, 1e-6, x.dtype)[0].double(), exact)


check_residual = partial(check_rows, "gated_residual")
check_junction = partial(check_rows, "gated_residual_layer_norm_modulate")


def check_gelu():
    """More than one task of forward, two chunks of backward, and both of GELU's tails."""
    test_gelu.check_far_tails(torch.float32)
    for dtype, spread in ((torch.float32, 3.0), (torch.bfloat16, 30.0)):
        pre, dact = test_gelu.problem(dtype, 400, 43, spread)
        low, exact = test_gelu.reference(pre, dact), test_gelu.reference(pre.double(), dact.double())
        results = gelu(pre, dact)
        for name, *tensors in zip(("act", "dpre", "dbias"), results, low, exact, strict=True):
            assert_contract(name, *tensors, per_sample=False)
        assert_same_on_two_threads(lambda: gelu(pre, dact), results)  # noqa: B023


def gelu(pre, dact):
    act, dpre = host.gelu(pre), dact.clone()
    recomputed, dbias = host.gelu_backward_(dpre, pre, True)
    assert torch.equal(act, recomputed), "backward's activation differs"
    return act, dpre, dbias


def check_product():
    """Sizes that fill nothing, several tasks of which the last is not full, what is packed in parts; NaN."""
    for size in ((13, 1, 33), (97, 300, 200), (31, 530, 801), (1000, 5, 20), (430, 7, 401)):
        result, _ = test_product.check(size)
        assert_same_on_two_threads(lambda: [host.product(*test_product.problem(*size))], [result])  # noqa: B023
    test_product.test_what_is_packed_at_once_is_bounded(None)
    test_product.test_what_is_not_finite_stays_so(NAN, None)


def check_patches():
    """Images (2, 3, 12, 20) in patches of 4 pixels, in both orders."""
    image = torch.randn(2, 3, 12, 20)
    for channels_last in (False, True):
        tokens = host.patchify(image, 4, channels_last)
        assert torch.equal(tokens, ops.patchify(image, 4, channels_last=channels_last, backend="reference"))
        assert torch.equal(host.unpatchify(tokens, 4, 3, 5, channels_last), image)


def check_squares():
    """Several tensors, one of them in several tasks; on one thread and on two."""
    given = test_norm.tensors(torch.float32)
    norm = host.norm(given)
    torch.testing.assert_close(norm, test_norm.exact(given).float(), rtol=1e-6, atol=0)
    assert_same_on_two_threads(lambda: [host.norm(given)], [norm])


def check_numbers():
    """Every 16-bit number, what rounds to them, and a NaN that would overflow if it were rounded like a number."""
    for dtype in (torch.bfloat16, torch.float16):
        test_rows.test_every_value_is_read_and_written(dtype, None)
        test_rows.test_rounds_to_nearest_even(dtype, None)
        nan = torch.tensor([[0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)
        h, _, _ = host.layer_norm_modulate(torch.zeros(1, 1, 1), nan, torch.zeros(1, 1), 1e-6, dtype)
        assert h.isnan().all()


PLANTED = [
    *plant(
        "rows_forward.cpp",
        check_residual,
        ("gate swapped with bias", "load(s.gate + i) * biased", "load(s.bias + i) * biased"),
        ("gate of sample 0", "widen_sample(call.gate, b", "widen_sample(call.gate, 0"),
        ("bias dropped", "load(y + i, extent) + load(s.bias + i)", "load(y + i, extent)"),
        (
            "bias after the gate",
            "load(s.gate + i) * biased",
            "load(s.gate + i) * load(y + i, extent) + load(s.bias + i)",
        ),
        ("last row of a task missed", "smaller(p.tokens, first + kRows)", "smaller(p.tokens, first + kRows - 1)"),
    ),
    *plant(
        "rows_forward.cpp",
        check_norm,
        ("shift of sample 0", "widen_sample(call.shift, b", "widen_sample(call.shift, 0"),
        ("scale of sample 0", "widen_sample(call.scale, b", "widen_sample(call.scale, 0"),
        ("one plus dropped", "1.0f + load(s.scale1 + i)", "load(s.scale1 + i)"),
        ("padding in the variance", "keep(load(row + i) - mean, extent)", "load(row + i) - mean"),
        ("variance of a sample", "/ static_cast<float>(dim) + eps", "/ static_cast<float>(dim - 1) + eps"),
        ("eps dropped", "static_cast<float>(dim) + eps)", "static_cast<float>(dim) + 0 * eps)"),
        ("mean of another row", "call.mean[b * call.problem.tokens + n] = ", "call.mean[n] = "),
    ),
    *plant(
        "rows_forward.cpp",
        check_junction,
        ("norm of x", "value = keep(widen(x_new, stored), extent)", "value = load(x + i, extent)"),
    ),
    *plant(
        "rows_backward.cpp",
        check_norm,
        ("scale of sample 0", "widen_sample(call.scale, b", "widen_sample(call.scale, 0"),
        ("dshift not summed", "add_to(sums + kShift * stride + i, d);", ""),
        ("dscale of x", "add_to(sums + kScale * stride + i, d * normal);", "add_to(sums + kScale * stride + i, d);"),
        ("mean of the gradient kept", "load(s.weighted + i) - means.of_weighted", "load(s.weighted + i)"),
        ("normal part kept", "g - load(s.normal + i) * means.of_weighted_normal", "g"),
        ("sums not cleared", "std::memset(sums, 0, static_cast<std::size_t>(kSums * stride) * sizeof(float));", ""),
        ("partials of sample 0", "partial + b * chunks * row", "partial"),
        ("last row of a chunk missed", "smaller(p.tokens, first + chunk)", "smaller(p.tokens, first + chunk - 1)"),
        ("chunks by threads", "chunk_rows(p.tokens, 16)", "chunk_rows(p.tokens, threads) - 13 * (threads - 1)"),
    ),
    *plant(
        "rows_backward.cpp",
        check_junction,
        ("dx_new not added", "if constexpr (kResidual) d = load(dx_new + i, extent);", ""),
        ("dh ignored", "d += rstd * keep(", "d += 0 * keep("),
        ("dy without the gate", "store(dy + i, d * load(s.gate + i), extent)", "store(dy + i, d, extent)"),
        ("gate of sample 0", "widen_sample(call.gate, b", "widen_sample(call.gate, 0"),
        ("dgate without the bias", "(load(y + i, extent) + load(s.bias + i))", "load(y + i, extent)"),
        ("dbias not summed", "if (has_bias) add_to(sums + kStream", "if (false) add_to(sums + kStream"),
        ("dbias without the gate", "load(gate + i, extent) * sum(kStream)", "sum(kStream)"),
        ("dbias of the last sample", "dbias += load(gate", "dbias = load(gate"),
    ),
    *plant("parallel.h", check_residual, ("last chunk not summed", "r < rows;", "r + 1 < rows;")),
    *plant(
        "rows.h",
        check_residual,
        ("sample 0 read", "b * t.stride_b + n * t.stride_n", "n * t.stride_n"),
        ("vector of sample 0", "b * v.stride_b * size_of", "0 * v.stride_b * size_of"),
    ),
    *plant(
        "gelu.h",
        check_gelu,
        (
            "slope without its cubic term",
            "slope = inner * inner * (3 * kCubic * kSlopeAtZero) +",
            "slope = 0 * inner +",
        ),
        ("slope dropped", "sigmoid.rest * (inner * sigmoid.value * slope) +", "0 * slope +"),
        ("exponent not bounded", "return at_most(at_least(x, splat(-kEnd)), splat(kEnd));", "return x;"),
        ("left end not zero", "x < splat(-kEnd) ? splat(0.0f) :", ""),
        ("derivative of x far right", "(inner * sigmoid.value", "(x * sigmoid.value"),
    ),
    *plant(
        "gelu.cpp",
        check_gelu,
        (
            "last element of a task missed",
            "smaller(kElements, size - first),",
            "smaller(kElements, size - first) - 1,",
        ),
        (
            "first task everywhere",
            "static_cast<T*>(call.act) + first;\n        for_each",
            "static_cast<T*>(call.act);\n        for_each",
        ),
        ("dbias after GELU", "load(sums + i) + dpre", "load(sums + i) + x"),
        (
            "last row of a chunk missed",
            "smaller(call.rows, (task + 1) * chunk)",
            "smaller(call.rows, (task + 1) * chunk - 1)",
        ),
        ("sums of the previous call", "std::memset(sums, 0, static_cast<std::size_t>(stride) * sizeof(float));", ""),
        ("chunks by threads", "chunk_rows(call.rows, 64)", "chunk_rows(call.rows, threads)"),
        ("later columns missed", "width - first), [", "smaller(width - first, 32)), ["),
    ),
    *plant(
        "gemm.cpp",
        check_product,
        ("last of a piece missed", "k < inner; ++k", "k < inner - 1; ++k"),
        ("last piece alone", "kIsFirst ? c[i][j] : load(sum) + c[i][j]", "c[i][j]"),
        ("last piece missed", "k < o.inner; k += o.piece", "k == 0 || k + o.piece < o.inner; k += o.piece"),
        ("first rows everywhere", "block.row + tile * kTileRows, k)", "block.row, k)"),
        ("first columns everywhere", "packed + panel * kTileWidth * o.inner", "packed"),
        ("last row missed", "i < rows; ++i", "i < rows - 1; ++i"),
        (
            "last column missed",
            "smaller(kLanes, block.columns - column);",
            "smaller(kLanes, block.columns - column - 1);",
        ),
        ("bias of the first columns", "load(o.bias + column + j,", "load(o.bias + j,"),
        ("bias of the first rows", "o.bias + block.row + row", "o.bias + row"),
        ("activation before GELU", "gelu<float>(sum)", "sum"),
        ("product only", "if (act) store", "if (act && !c) store"),
        ("last tile missed", "row_tiles * i / row_blocks", "(row_tiles - 1) * i / row_blocks"),
        ("last block missed", "first_of(task + 1);", "first_of(task + 1) - (task + 1 == tasks);"),
        ("first columns packed again", "first + column, 0), columns", "column, 0), columns"),
    ),
    *plant(
        "gemm_pack.h",
        check_product,
        ("last of inner not packed", "i < smaller(kLanes, inner - k);", "i < smaller(kLanes, inner - k - 1);"),
        ("half a panel twice", "from.data + k * from.stride_inner + block", "from.data + k * from.stride_inner"),
        ("one row for all", "from.data + row * from.stride_row + k", "from.data + k"),
        ("last rows not copied", "smaller(kTileRows, rows) - row", "smaller(kTileRows, rows - 1) - row"),
    ),
    *plant(
        "squares.cpp",
        check_squares,
        ("upper half dropped", "sums[2 * v + 1] += upper * upper;", ""),
        ("rest dropped", "add_squares(rest, vectors);", ""),
        ("half of the sums dropped", "half = kSums / 2; half", "half = kSums / 4; half"),
    ),
    Planted("first part everywhere", "norm.cpp", "+ first * size", "+ 0 * first * size", check_squares),
    Planted(
        "last part dropped", "norm.cpp", "first < tensor.elements;", "first + 1 < tensor.elements;", check_squares
    ),
    *plant(
        "vec.h",
        check_numbers,
        ("NaN rounded", "truncate((x != x) ? nan : rounded)", "truncate(rounded + 0 * nan)"),
        ("ties up", "0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
        isa="x86_64_v2",
    ),
    *plant(
        "vec.h",
        check_numbers,
        ("float16 ties down", "0x0fffu + ((magnitude >> 13) & 1u)", "0x0fffu"),
        ("float16 without infinity", "magnitude >= 0x47800000u ? splat_bits(0x7c00u) : rounded", "rounded"),
        isa="x86_64_v2",
    ),
    *plant(
        "vec.h",
        check_gelu,
        (
            "last element of a row not stored",
            "static_cast<std::size_t>(part.lanes) * sizeof(T));\n}\n#endif",
            "static_cast<std::size_t>(part.lanes - 1) * sizeof(T));\n}\n#endif",
        ),
        isa="x86_64_v2",
    ),
    Planted("sample 0 of patches", "patches.cpp", "b * call.tokens_b", "0 * call.tokens_b", check_patches),
    Planted("patch upside down", "patches.cpp", "(c * p + ph) * p;", "(c * p + p - 1 - ph) * p;", check_patches),
    Planted("task skipped", "threads.cpp", "< job.count;", "< job.count - (job.count > 1);", check_junction),
    *PLANTED_IN_ATTENTION,
    *PLANTED_IN_JVP,
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The build of an instruction set, created on first use."""
    return cache(lambda isa: mutants.Build(tmp_path_factory.mktemp(isa), isa))


@pytest.fixture
def use(monkeypatch, poisoned):
    """Make the package and the tests use an extension, on one thread unless a check says otherwise."""

    def use(extension):
        monkeypatch.setitem(sys.modules, "ditfast._C", extension)
        for where in (ditfast, attention_calls):
            monkeypatch.setattr(where, "_C", extension)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield use
    torch.set_num_threads(threads)


def test_every_planted_text_occurs_once():
    """So that a moved text shows at once, not only in the slow tests."""
    folder = mutants.ROOT / "csrc" / "host"
    assert [(p.what, p.file) for p in PLANTED if (folder / p.file).read_text().count(p.right) != 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("isa", sorted({p.isa for p in PLANTED}))
def test_correct_kernels_pass(isa, build, use):
    use(build(isa).extension())
    for check in {p.check: None for p in PLANTED}:
        check()


@pytest.mark.slow
@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_planted_error_is_caught(planted, build, use):
    if planted.isa not in _C.isas():
        pytest.skip(f"this CPU has no {planted.isa}")
    use(build(planted.isa).mutant(planted.file, planted.right, planted.wrong))
    with pytest.raises(AssertionError):
        planted.check()
