"""The automatic choice of attention, with the interpreter as the "GPU" and made-up times."""

import subprocess
import sys
import warnings
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from ditfast import ops
from ditfast.ops.backends import agreement, availability, cache, choice, fastest, selfcheck
from ditfast.ops.backends.log import record
from ditfast.ops.op import RandomTensors

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("DITFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "_AUTO_DEVICES", ("cuda", "cpu"))
    monkeypatch.setitem(availability._installed, "ditfast._C", False)  # no GPU has host kernels
    monkeypatch.setattr(selfcheck, "SIZE", (2, 27))
    monkeypatch.setattr(selfcheck, "_answers", {})
    monkeypatch.setattr(fastest, "_choices", {})
    cache.environment.cache_clear()
    yield
    cache.environment.cache_clear()


@pytest.fixture
def times(monkeypatch):
    """Fake each candidate's time; return the list of measured candidates."""
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


def test_the_fastest_correct_kernel_is_used(times):
    measured = times(triton=10.0, sdpa=12.0)
    assert ran_on(qkv()) == ["triton"] and measured == ["sdpa", "triton"]
    assert cache.load(CPU)["attention bfloat16 72 N<=64 inference"] == {
        "choice": "triton",
        "us": {"triton": 10.0, "sdpa": 12.0},
    }


def test_a_slower_kernel_is_not_used(times):
    times(triton=13.0, sdpa=12.0)
    assert ran_on(qkv()) == ["sdpa"]


def test_a_lead_within_the_margin_does_not_count(times):
    times(triton=11.5, sdpa=12.0)
    assert ran_on(qkv()) == ["sdpa"]


def test_training_and_inference_are_timed_separately(times):
    measured = times(triton=10.0, sdpa=12.0)
    ran_on(qkv())
    ran_on(qkv().requires_grad_())
    assert measured == ["sdpa", "triton"] * 2
    assert {name.split()[-1] for name in cache.load(CPU) if "N<=" in name} == {"inference", "training"}


def test_an_untimed_size_runs_on_sdpa_and_is_tried_again(monkeypatch):
    monkeypatch.setattr(fastest, "measure", mock.Mock(side_effect=torch.OutOfMemoryError("no memory")))
    with pytest.warns(RuntimeWarning, match="could not be timed, so it runs on sdpa: OutOfMemoryError: no memory"):
        assert ran_on(qkv()) == ["sdpa"]
    assert not any("N<=" in name for name in cache.load(CPU))


def test_a_kernel_that_could_not_be_checked_is_tried_again(times, monkeypatch):
    times(triton=10.0, sdpa=12.0)
    with monkeypatch.context() as broken:
        broken.setattr(selfcheck, "_compare", mock.Mock(side_effect=torch.OutOfMemoryError("no memory")))
        with pytest.warns(RuntimeWarning, match="could not be checked"):
            assert ran_on(qkv()) == ["sdpa"]
    monkeypatch.setattr(selfcheck, "_answers", {})
    monkeypatch.setattr(fastest, "_choices", {})
    assert ran_on(qkv()) == ["triton"]


def test_an_unknown_answer_while_a_graph_is_captured(times, monkeypatch):
    times(triton=10.0, sdpa=12.0)
    monkeypatch.setattr(selfcheck, "is_capturing", lambda device: True)
    with pytest.warns(RuntimeWarning, match="graph"):
        assert ran_on(qkv()) == ["sdpa"]
    monkeypatch.setattr(selfcheck, "is_capturing", lambda device: False)
    assert ran_on(qkv()) == ["triton"]


def test_timing_inside_a_checkpointed_block(monkeypatch):
    """The timed calls must not be mistaken for part of the block."""

    def measure(candidate, make_run, dtype, width, tokens, training, device):
        make_run(RandomTensors((dtype, dtype), device), 2, tokens, width, "sdpa", training)()
        return {"triton": 10.0, "sdpa": 12.0}[candidate]

    monkeypatch.setattr(fastest, "measure", measure)
    t = qkv().requires_grad_()
    with record() as ran:
        checkpoint(lambda t: ops.attention(t * 1, 1), t, use_reentrant=False).sum().backward()
    assert ran["attention"] == ["triton"] * 3 and t.grad is not None


RANK = """
import contextlib, os, sys
from datetime import timedelta
import torch, torch.distributed as dist
from ditfast import ops
from ditfast.ops.backends import agreement, availability, choice, fastest, log, selfcheck
rank, folder = int(sys.argv[1]), sys.argv[2]
os.environ["DITFAST_CACHE_DIR"] = f"{folder}/{rank}"
agreement.PATIENCE = timedelta(seconds=60)
choice._AUTO_DEVICES, selfcheck.SIZE = ("cpu",), (2, 27)
availability._installed["ditfast._C"] = False
def attend():
    ops.attention(torch.randn(2, 5, 216).bfloat16(), 1)
fastest.measure = lambda backend, *_: {"sdpa": 10.0, "triton": (5.0, 20.0)[rank]}[backend]
if sys.argv[3] == "known" and rank == 1:
    attend()
    selfcheck._answers.clear(), fastest._choices.clear()
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
if sys.argv[3] == "known" and rank == 0:
    dist.barrier()
if sys.argv[3] == "silent" and rank == 0:
    dist.barrier()
    sys.exit()
if sys.argv[3] == "silent":
    agreement.UNNOTICED = agreement.PATIENCE = timedelta(seconds=0.1)
if sys.argv[3] == "failing" and rank == 0:
    fastest._answer = None
with log.record() as ran, contextlib.suppress(TypeError):
    attend()
print(*ran.get("attention", ["nothing"]), flush=True)
if sys.argv[3] != "known" or rank == 1:
    dist.barrier()
"""


def run_ranks(folder, how):
    """The backend that attention used on each rank."""
    command = [sys.executable, "-W", "ignore", "-c", RANK]
    arguments = [[str(rank), str(folder), how] for rank in range(2)]
    ranks = [subprocess.Popen([*command, *each], stdout=subprocess.PIPE, text=True) for each in arguments]
    return [rank.communicate(timeout=120)[0].strip() for rank in ranks]


def test_ranks_with_different_clocks_use_the_same_backend(tmp_path):
    """By rank 1's clock PyTorch's is faster, by rank 0's the kernel."""
    assert run_ranks(tmp_path, "both") == ["triton", "triton"]


@pytest.mark.parametrize(("how", "rank0"), [("silent", ""), ("failing", "nothing")])
def test_a_rank_without_an_answer_of_rank_0_decides_for_itself(tmp_path, how, rank0):
    assert run_ranks(tmp_path, how) == [rank0, "sdpa"]


def test_a_rank_that_knows_the_answer_does_not_wait_for_rank_0(tmp_path):
    """By rank 0's clock the kernel is faster, but it asks only later: all ranks use the first answer."""
    assert run_ranks(tmp_path, "known") == ["sdpa", "sdpa"]


def test_a_waiting_rank_says_what_it_waits_for(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    for name in ("UNNOTICED", "PATIENCE", "BRIEF"):
        monkeypatch.setattr(agreement, name, timedelta(seconds=0.02))
    monkeypatch.setattr(agreement, "_is_patient", True)
    with pytest.warns(RuntimeWarning) as said:
        assert agreement.agreed("a kernel", lambda: 1, is_known=lambda: False) == 1
    waits, decides = (str(w.message) for w in said)
    assert "rank 1 waits up to 0.02 s for rank 0 to check or time a kernel" in waits and "decides a kernel" in decides
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    assert agreement.agreed("a kernel", lambda: 2, is_known=lambda: False) == 1


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
    assert measured == ["sdpa", "triton"] * 2
    assert [fastest.size_class(n) for n in (1, 64, 65, 256, 257, 10**6)] == [64, 64, 128, 256, 512, 4096]


@pytest.mark.parametrize("other", (qkv(dtype=torch.float32), qkv(d=40)), ids=("fp32", "d40"))
def test_inputs_without_a_kernel_go_to_sdpa_silently(times, other):
    measured = times(triton=1.0, sdpa=12.0)
    assert ran_on(other) == ["sdpa"] and measured == []


def test_unaligned_rows_go_to_sdpa_with_one_warning(times):
    from ditfast.ops.attention import _warn_unaligned

    _warn_unaligned.cache_clear()
    times(triton=1.0, sdpa=12.0)
    odd = torch.zeros(2, 5, 3 * 72 + 1, dtype=BF16)[..., 1:]
    with pytest.warns(RuntimeWarning, match="not aligned to 16 bytes"):
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
