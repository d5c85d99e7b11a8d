import numpy as np
import pytest
from tiny_models import save_dit

from ditfast.sample import main

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture(scope="session")
def save():
    return save_dit


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def run(ckpt, tmp_path):
    """Run the command on the pixel model; return its images (n, Hh, Ww, 3) by number."""

    def command(*options, out="out", model=ckpt, decoder="pixel", steps=4):
        shared = ("--ckpt", model, "--decoder", decoder, "--out", tmp_path / out)
        shared += () if steps is None else ("--steps", steps)
        main([str(each) for each in (*shared, *options)])
        return np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / out).glob("*.png"))])

    return command


@pytest.fixture
def refusal(refusal_of, run):
    """The single line with which the command rejects its options."""
    return refusal_of(run)
