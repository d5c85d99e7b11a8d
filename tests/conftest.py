"""Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before they are defined."""

import re
from importlib.util import find_spec

import pytest
import torch

from harness.interpreting import choose_interpreter

if not torch.cuda.is_available():
    choose_interpreter()


EXTRAS = (
    *("PIL", "diffusers", "huggingface_hub", "matplotlib", "rich", "scipy", "sklearn", "tensorboard", "torchdiffeq"),
    *("torchmetrics", "tqdm", "tyro", "yaml"),
)
MISSING = [name for name in EXTRAS if find_spec(name) is None]
_SAID = re.compile(
    rf"(?:No module named '|needs (?:the package )?|\b)({'|'.join(MISSING)})\b"
    r".*(?:'|not installed|: pip install)"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip tests that fail because an extra is not installed."""
    report = yield
    if MISSING and report.failed:
        said = _SAID.search(str(call.excinfo.value)) or _SAID.search(report.longreprtext)
        if said:
            report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1], f"needs {said[1]}")
    return report


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def own_choice_of_backends():
    """Forget the choices of backends that a resumed run took from its checkpoint; the next test makes its own."""
    yield
    from ditfast.ops.backends.choice import repeat_choices

    repeat_choices({})


@pytest.fixture(scope="module")
def one_thread():
    """Most problems here are so small that a second thread slows them down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def refusal_of(capsys):
    """Wrap a command: call it with arguments that it must reject, and return the single line it ends with."""

    def refusing(command):
        def refused(*arguments, **options):
            with pytest.raises(SystemExit) as stopped:
                command(*arguments, **options)
            code = stopped.value.code
            message = code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]
            assert code != 0 and "\n" not in message
            return message

        return refused

    return refusing


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """Fill every tensor that the package allocates with NaN, so that an unwritten element shows."""
    new_empty = torch.Tensor.new_empty

    def new_nan(self, *shape, **kwargs):
        out = new_empty(self, *shape, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)
