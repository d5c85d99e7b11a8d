"""The self-check, with Triton's interpreter on CPU tensors as the "GPU"."""

import os
import signal
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch

from ditfast import ops
from ditfast.ops import verify
from ditfast.ops.backends import availability, cache, choice, selfcheck
from ditfast.ops.backends.log import record
from ditfast.ops.op import PRECISIONS

CPU = torch.device("cpu")
KEY = (ops.LAYER_NORM_MODULATE, "triton", torch.float32, torch.float32, 32)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty cache, small problems, and kernels that are also considered for CPU tensors."""
    monkeypatch.setenv("DITFAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_AUTO_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(selfcheck, "SIZE", (2, 9))
    monkeypatch.setattr(selfcheck, "_answers", {})
    cache.environment.cache_clear()
    yield tmp_path / "cache"
    cache.environment.cache_clear()


@pytest.fixture
def without_extension(monkeypatch):
    """Leave only Triton's kernels."""
    monkeypatch.setitem(availability._installed, "ditfast._C", False)


def arguments():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 32, generator=g), torch.randn(2, 32, generator=g), torch.randn(2, 32, generator=g)


def run():
    """The backends that layer_norm_modulate used, and whether it was right."""
    x, shift, scale = arguments()
    with record() as ran:
        h = ops.layer_norm_modulate(x, shift, scale)
    torch.testing.assert_close(h, ops.layer_norm_modulate(x, shift, scale, backend="reference"))
    return ran["layer_norm_modulate"]


@pytest.fixture
def wrong(monkeypatch):
    """A kernel that is off by one percent."""
    from ditfast.kernels import layer_norm_modulate as kernel

    forward = kernel.forward

    def off(*args):
        h, mean, rstd = forward(*args)
        return h * 1.01, mean, rstd

    monkeypatch.setattr(kernel, "forward", off)


def files(folder):
    return sorted(p.name for p in folder.glob("*")) if folder.exists() else []


def test_a_correct_kernel_is_used(fresh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run() == ["triton"]
    (name,) = files(fresh)
    assert cache.load(CPU) == {"layer_norm_modulate/triton float32 float32 32": True}


def test_a_wrong_kernel_is_named_once_and_not_used(wrong, without_extension):
    with pytest.warns(RuntimeWarning, match="layer_norm_modulate/triton float32 float32 32 failed") as caught:
        assert run() == ["reference"]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run() == ["reference"]
    assert "h: max error" in selfcheck.check(*KEY, CPU).reason


def test_a_wrong_gradient_is_found(monkeypatch):
    from ditfast.kernels import layer_norm_modulate as kernel

    backward = kernel.backward
    monkeypatch.setattr(kernel, "backward", lambda *a: (backward(*a)[0], backward(*a)[1].flip(0)))
    assert "dshift" in selfcheck.check(*KEY, CPU).reason


def test_a_kernel_that_does_not_compile_is_not_used(monkeypatch, without_extension):
    from ditfast.kernels import layer_norm_modulate as kernel

    def broken(*args):
        raise ValueError("no such instruction")

    monkeypatch.setattr(kernel, "forward", broken)
    with pytest.warns(RuntimeWarning, match=r"could not be checked \(ValueError: no such instruction\)") as caught:
        assert run() == ["reference"]
        assert run() == ["reference"]
    assert len(caught) == 1
    assert selfcheck.check(*KEY, CPU).reason == "ValueError: no such instruction"


def test_a_transient_failure_is_tried_again_in_the_next_process(monkeypatch):
    check = selfcheck._compare
    monkeypatch.setattr(selfcheck, "_compare", mock.Mock(side_effect=torch.OutOfMemoryError("no memory")))
    with pytest.warns(RuntimeWarning, match="could not be checked"):
        assert run() == ["reference"]
    assert cache.load(CPU) == {}
    monkeypatch.setattr(selfcheck, "_compare", check)
    assert run() == ["reference"]  # not again in this process
    monkeypatch.setattr(selfcheck, "_answers", {})
    assert run() == ["triton"]


def test_an_unknown_answer_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(selfcheck, "is_capturing", lambda device: True)
    with pytest.warns(RuntimeWarning, match=r"layer_norm_modulate/triton .* call ditfast.verify\(\)"):
        assert run() == ["reference"]
    monkeypatch.setattr(selfcheck, "is_capturing", lambda device: False)
    assert run() == ["triton"]


def test_the_second_process_reads_the_answer(monkeypatch):
    assert run() == ["triton"]
    monkeypatch.setattr(selfcheck, "_answers", {})
    monkeypatch.setattr(selfcheck, "check", lambda *_: pytest.fail("checked again"))
    assert run() == ["triton"]


def test_the_answer_is_remembered_in_the_process(monkeypatch):
    assert run() == ["triton"]
    monkeypatch.setattr(cache, "load", lambda *_: pytest.fail("read again"))
    assert run() == ["triton"]


NAME = "layer_norm_modulate/triton float32 float32 32"
DAMAGE = (
    "", "{", '["layer_norm_modulate/triton float32', "[1]", "\x00\xff", "[" * 100_000, "3", f'["{NAME}", "no"]',
    f'["{NAME}", {{}}]', '["other", true] ["more"',
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_file_is_survived(fresh, damage):
    assert run() == ["triton"]
    (name,) = files(fresh)
    (fresh / name).write_text(damage, encoding="latin-1")
    selfcheck._answers.clear()
    assert run() == ["triton"]
    assert cache.load(CPU)[NAME] is True


def test_editing_a_kernel_forgets_its_answers(fresh, monkeypatch, tmp_path):
    import shutil

    from ditfast import kernels

    copy = tmp_path / "kernels"
    shutil.copytree(kernels.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert run() == ["triton"]
    before = files(fresh)
    (copy / "rows.py").write_text((copy / "rows.py").read_text() + "\n# edited\n")
    monkeypatch.setattr(kernels, "__path__", [str(copy)])
    cache.environment.cache_clear()
    selfcheck._answers.clear()
    assert run() == ["triton"]
    assert len(files(fresh)) == 2 and before[0] in files(fresh)


def test_a_read_only_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DITFAST_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert run() == ["triton"]


def test_the_environment_can_trust_every_kernel(wrong, monkeypatch):
    monkeypatch.setenv("DITFAST_SELFCHECK", "0")
    with pytest.raises(AssertionError):  # the wrong kernel was used
        run()


def test_random_state_is_left_alone():
    state = torch.get_rng_state()
    run()
    assert torch.equal(state, torch.get_rng_state())


def test_under_autocast(fresh):
    x, shift, scale = arguments()
    with torch.autocast("cpu", torch.bfloat16), record() as ran:
        h = ops.layer_norm_modulate(x, shift.bfloat16(), scale.bfloat16())
    assert h.dtype == torch.bfloat16 and ran["layer_norm_modulate"] == ["triton"]
    assert list(cache.load(CPU)) == ["layer_norm_modulate/triton float32 bfloat16 32"]


CHECKED = [(op, precision) for op in ops.ALL for precision in op.auto_precisions]


@pytest.mark.parametrize(("op", "precision"), CHECKED, ids=[f"{op.name}-{precision}" for op, precision in CHECKED])
def test_every_kernel_passes(op, precision, monkeypatch):
    if op is ops.ATTENTION:
        monkeypatch.setattr(selfcheck, "SIZE", (2, 210))  # two tiles
    for width in op.widths(64)[:2]:
        assert selfcheck.check(op, "triton", *PRECISIONS[precision], width, CPU).reason is None


def test_a_wrong_gradient_of_the_bias_is_found(monkeypatch):
    """Or a gradient of qkv that is wrong only if the bias's is requested."""
    from ditfast.kernels import attention as kernel

    monkeypatch.setattr(selfcheck, "SIZE", (2, 210))
    backward = kernel.backward
    for change, name in ((lambda g, b: (g, b * 1.1), "dbias"), (lambda g, b: (g * 1.1, b), "dq")):
        wrong = lambda *a, change=change: change(*backward(*a)) if a[-1] else backward(*a)  # noqa: E731
        monkeypatch.setattr(kernel, "backward", wrong)
        reason = selfcheck.check(ops.ATTENTION, "triton", torch.bfloat16, torch.bfloat16, 72, CPU).reason
        assert reason.startswith(f"{name}: ")


def test_every_kernel_has_a_check():
    assert [op.name for op in ops.ALL if op.self_check is None] == ["qkv_attention"]  # attention's check covers it
    assert all(set(op.auto_precisions) <= set(PRECISIONS) and op.auto_precisions for op in ops.ALL if op.self_check)


COMPILED = """
import torch
from ditfast import ops
from ditfast.ops.backends import choice, selfcheck
from ditfast.ops.backends.log import record
choice._AUTO_DEVICES, selfcheck.SIZE = ("cuda", "cpu"), (2, 9)
x, c = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 64)
fn = torch.compile(lambda x, c: ops.layer_norm_modulate(x, *c.chunk(2, 1)), fullgraph=True, backend="aot_eager")
with record() as ran:
    fn(x, c).sum().backward()
print(*ran["layer_norm_modulate"])
"""


def test_compile_first_in_a_fresh_process_ends_on_the_kernel():
    result = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd="/")
    assert result.stdout.split() == ["triton", "triton"], result.stderr


STORE = (
    "import sys, torch; from ditfast.ops.backends import cache\n"
    "for i in range(80): cache.store(torch.device('cpu'), f'{sys.argv[1]} {i}', True)"
)


def test_several_processes_write_at_once(fresh):
    running = [subprocess.Popen([sys.executable, "-c", STORE, f"op {i}"], cwd="/") for i in range(3)]
    assert [p.wait() for p in running] == [0] * 3
    assert cache.load(CPU) == {f"op {i} {j}": True for i in range(3) for j in range(80)}
    assert len(files(fresh)) == 1


def test_a_full_disk_costs_one_answer_and_leaves_no_file(fresh, monkeypatch):
    write = os.write
    cache.store(CPU, "first", True)
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[: len(line) // 2]))
    cache.store(CPU, "cut off", True)
    monkeypatch.setattr(os, "write", mock.Mock(side_effect=OSError(28, "No space left on device")))
    cache.store(CPU, "refused", True)
    monkeypatch.setattr(os, "write", write)
    cache.store(CPU, "last", False)
    assert cache.load(CPU) == {"first": True, "last": False}
    assert len(files(fresh)) == 1


def test_without_a_home(monkeypatch):
    monkeypatch.delenv("DITFAST_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.Path, "expanduser", mock.Mock(side_effect=RuntimeError("Could not determine home")))
    assert cache.load(CPU) == {}
    assert run() == ["triton"]


def test_verify_checks_again_and_keeps_the_answers(wrong):
    cache.store(CPU, selfcheck.label(*KEY), True)
    results = verify.verify("cpu", hidden_sizes=(32,), precisions=("fp32",))
    failed = {r.op for r in results if r.reason is not None}
    assert failed == {"layer_norm_modulate"} and len(results) > len(failed)
    assert cache.load(CPU)[selfcheck.label(*KEY)] is False


FAKE = """#!{python}
import json, os, sys
first = not os.path.exists({seen!r})
os.makedirs({seen!r}, exist_ok=True)
print("ready", flush=True)
for _ in json.load(sys.stdin)[1][: 1 if first else None]:
    print("[null, 0.1, true]", flush=True)
os.kill(os.getpid(), {signal}) if first else sys.exit()
"""


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_verify_continues_after_a_process_died(monkeypatch, tmp_path, number):
    """The interpreter dies after its first answer; the kernel it was checking counts as failed."""
    script = tmp_path / "python"
    script.write_text(FAKE.format(python=sys.executable, seen=str(tmp_path / "seen"), signal=int(number)))
    os.chmod(script, 0o755)
    monkeypatch.setattr(verify.sys, "executable", str(script))
    results = list(verify.verify_in_subprocess(hidden_sizes=(32, 64), precisions=("fp32",)))
    keys = verify.kernels_to_check("cpu", (32, 64), ("fp32",))
    assert [(r.op, r.backend, r.stream, r.branch, r.width) for r in results] == [(k[0].name, *k[1:]) for k in keys]
    assert [r.reason for r in results[:3]] == [None, f"the process died, exit status {-number}", None]
    crashed = number == signal.SIGSEGV  # the other signal may mean that memory ran out
    assert cache.load(CPU) == ({selfcheck.label(*keys[1]): False} if crashed else {})


def child_process(monkeypatch, tmp_path, code):
    """Make `verify_in_subprocess` start this instead of the interpreter."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport json, os, sys\n{code}")
    os.chmod(script, 0o755)
    monkeypatch.setattr(verify.sys, "executable", str(script))


def test_a_child_that_does_not_start_blames_no_kernel(monkeypatch, tmp_path):
    child_process(monkeypatch, tmp_path, "sys.exit('the GPU is in use')")
    with pytest.raises(RuntimeError, match="did not start: the GPU is in use"):
        list(verify.verify_in_subprocess(hidden_sizes=(32,), precisions=("fp32",)))
    assert cache.load(CPU) == {}


def test_after_a_fault_the_next_kernel_is_not_blamed(monkeypatch, tmp_path):
    """The first child reports a kernel that raised, and cannot continue; the second finds no fault."""
    code = f"""
first = not os.path.exists({str(tmp_path / "seen")!r})
os.makedirs({str(tmp_path / "seen")!r}, exist_ok=True)
print("ready", flush=True)
for _ in json.load(sys.stdin)[1][: 1 if first else None]:
    print(json.dumps(["a fault" if first else None, 0.1, not first]), flush=True)
sys.exit({verify.RESTART} if first else 0)
"""
    child_process(monkeypatch, tmp_path, code)
    results = list(verify.verify_in_subprocess(hidden_sizes=(32,), precisions=("fp32",)))
    assert [r.reason for r in results] == ["a fault"] + [None] * (len(results) - 1) and len(results) > 2
    assert not results[0].was_compared and cache.load(CPU) == {}


def test_a_child_that_checks_nothing_is_an_error(monkeypatch, tmp_path):
    child_process(monkeypatch, tmp_path, "print('ready')")
    with pytest.raises(RuntimeError, match="exited with status 0 before checking any"):
        list(verify.verify_in_subprocess(hidden_sizes=(32,), precisions=("fp32",)))


def test_verify_rejects_an_unknown_precision():
    with pytest.raises(ValueError, match="precisions must be among bf16, autocast, fp16, fp32, got 'int8'"):
        verify.verify("cpu", precisions=("int8",))
