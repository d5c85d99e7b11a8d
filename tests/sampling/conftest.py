import numpy as np
import pytest
import torch
from PIL import Image

from ditfast import DiT
from ditfast.sample import main

TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=7)


def save_tiny(folder, **changes):
    """A DiT whose noise, variance and response to labels are all far from nothing."""
    torch.manual_seed(0)
    model = DiT(**{**TINY, **changes})
    for name, value in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(value, std=0.15)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture(scope="session")
def save():
    return save_tiny


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def run(ckpt, tmp_path):
    """Run the command on the model of pixels, and return its images (n, Hh, Ww, 3) by number."""

    def command(*options, out="out", model=ckpt, decoder="pixel", steps=4):
        shared = ("--ckpt", model, "--decoder", decoder, "--steps", steps, "--out", tmp_path / out)
        main([str(each) for each in (*shared, *options)])
        return np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / out).glob("*.png"))])

    return command


@pytest.fixture
def refusal(run, capsys):
    """The one line with which the command refuses its options."""

    def refused(*options, **changes):
        with pytest.raises(SystemExit) as stopped:
            run(*options, **changes)
        code = stopped.value.code
        message = code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]
        assert code != 0 and "\n" not in message
        return message

    return refused
