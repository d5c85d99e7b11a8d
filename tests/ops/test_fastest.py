"""The automatic choice of attention, with the interpreter as the "GPU" and made-up times."""

import warnings

import pytest
import torch

from ditfast import ops
from ditfast.ops.backends import availability, cache, choice, fastest, selfcheck
from ditfast.ops.backends.log import record

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("DITFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "_AUTOMATIC", ("cuda", "cpu"))
    monkeypatch.setitem(availability._installed, "ditfast._C", False)  # no GPU has host kernels
    monkeypatch.setattr(selfcheck, "SIZE", (2, 27))
    monkeypatch.setattr(selfcheck, "_answers", {})
    monkeypatch.setattr(fastest, "_choices", {})
    cache.environment.cache_clear()
    yield
    cache.environment.cache_clear()


@pytest.fixture
def times(monkeypatch):
    """What the clock says of each candidate; the list of what was measured."""
    measured = []

    def set_times(**us):
        monkeypatch.setattr(fastest, "measure", lambda candidate, *_: measured.append(candidate) or us[candidate])
        return measured

    return set_times


def ran_on(qkv, heads=1):
    with record() as ran:
        ops.attention(qkv, heads)
    return ran["attention"]


def qkv(n=5, d=72, dtype=BF16):
    return torch.randn(2, n, 3 * d).to(dtype)


def test_the_fastest_right_kernel_is_taken(times):
    measured = times(triton=10.0, sdpa=12.0)
    assert ran_on(qkv()) == ["triton"] and measured == ["triton", "sdpa"]
    assert cache.load(CPU)["attention bfloat16 72 N<=64"] == {
        "choice": "triton",
        "us": {"triton": 10.0, "sdpa": 12.0},
    }


def test_a_slower_kernel_is_not_taken(times):
    times(triton=13.0, sdpa=12.0)
    assert ran_on(qkv()) == ["sdpa"]


def test_a_wrong_kernel_is_not_even_timed(times, monkeypatch):
    from ditfast.kernels import attention as kernel

    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *a: (forward(*a)[0] * 1.1, forward(*a)[1]))
    measured = times(triton=1.0, sdpa=12.0)
    with pytest.warns(RuntimeWarning, match="attention/triton bfloat16 bfloat16 72 failed"):
        assert ran_on(qkv()) == ["sdpa"]
    assert measured == []


def test_the_answer_is_read_from_disk(times, monkeypatch):
    times(triton=10.0, sdpa=12.0)
    assert ran_on(qkv()) == ["triton"]
    monkeypatch.setattr(fastest, "_choices", {})
    monkeypatch.setattr(fastest, "measure", lambda *_: pytest.fail("measured again"))
    assert ran_on(qkv()) == ["triton"]


def test_each_size_class_is_measured(times):
    measured = times(triton=10.0, sdpa=12.0)
    for n in (5, 64, 65, 128):
        ran_on(qkv(n))
    assert measured == ["triton", "sdpa"] * 2
    assert [fastest.size_class(n) for n in (1, 64, 65, 256, 257, 10**6)] == [64, 64, 128, 256, 512, 4096]


@pytest.mark.parametrize("other", (qkv(dtype=torch.float32), qkv(d=40)), ids=("fp32", "d40"))
def test_what_kernels_do_not_take_goes_to_sdpa_unasked(times, other):
    measured = times(triton=1.0, sdpa=12.0)
    assert ran_on(other) == ["sdpa"] and measured == []


def test_unaligned_rows_go_to_sdpa_with_one_warning(times):
    from ditfast.ops.attention import _warn_unaligned

    _warn_unaligned.cache_clear()
    times(triton=1.0, sdpa=12.0)
    odd = torch.zeros(2, 5, 3 * 72 + 1, dtype=BF16)[..., 1:]
    with pytest.warns(RuntimeWarning, match="multiples of 16 bytes"):
        assert ran_on(odd) == ["sdpa"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ran_on(odd) == ["sdpa"]


def test_compiled_first_ends_on_the_kernel(times):
    times(triton=10.0, sdpa=12.0)
    fn = torch.compile(lambda t: ops.attention(t, 1), fullgraph=True, backend="aot_eager")
    t = qkv().requires_grad_()
    with record() as ran:
        fn(t).sum().backward()
    assert ran["attention"] == ["triton", "triton"]
