"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are defined."""

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
    """Skip what fails for want of an extra that is not installed."""
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
    """A run that goes on leaves its checkpoint's choices to the process; the next test makes its own."""
    yield
    from ditfast.ops.backends.choice import repeat_choices

    repeat_choices({})


@pytest.fixture(scope="module")
def one_thread():
    """Problems as small as most here lose more to a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def refusal_of(capsys):
    """From a command one that has to refuse its arguments, and returns the one line with which it ends."""

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
    """Every tensor that the package allocates starts as NaN, so that an element left unwritten shows."""
    new_empty = torch.Tensor.new_empty

    def new_nan(self, *shape, **kwargs):
        out = new_empty(self, *shape, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)
