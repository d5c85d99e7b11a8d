"""A small fixed extractor, and images that it distinguishes."""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_dit

from ditfast.evaluate import main
from ditfast.evaluation import features

Image = pytest.importorskip("PIL.Image")

HEIGHT, WIDTH = 6, 10


class Waves(torch.nn.Module):
    """Features (B, 4): the mean of image / 255 times sin(k (1 + 2 row + 3 column + 5 channel) / 10), k = 1 to 4."""

    def __init__(self, height: int = HEIGHT, width: int = WIDTH):
        super().__init__()
        row, column = torch.arange(height)[:, None], torch.arange(width)
        place = 1 + 2 * row + 3 * column + 5 * torch.arange(3)[:, None, None]
        self.register_buffer("waves", torch.sin(torch.arange(1, 5)[:, None, None, None] * place.double() / 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return torch.einsum("bchw,kchw->bk", images / 255.0, self.waves.float()) / self.waves[0].numel()


class Rich(torch.nn.Module):
    """Like `Waves`, with spatial features and probabilities."""

    def __init__(self, height: int = HEIGHT, width: int = WIDTH):
        super().__init__()
        self.waves = Waves(height, width)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.waves(images)
        spatial = torch.nn.functional.adaptive_avg_pool2d(images / 255.0, 2).flatten(1)
        return {"features": features, "spatial": spatial, "probabilities": (40 * features).softmax(1)}


def save_script(net, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(net).save(str(path))
    features.KNOWN.add(hashlib.sha256(Path(path).read_bytes()).hexdigest())
    return str(path)


def make_images(seed, count, height=HEIGHT, width=WIDTH):
    """uint8 (count, H, W, 3)."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (count, 1, 1, 3)) * rng.random((count, height, width, 1)) ** 0.5
    return np.clip(base + 15 * seed, 0, 255).astype(np.uint8)


def save_folder(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    return str(folder)


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture(autouse=True)
def no_inception(monkeypatch):
    monkeypatch.delenv("DITFAST_INCEPTION", raising=False)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Paths by name: two sets of images as folder and npz, and extractors."""
    root = tmp_path_factory.mktemp("data")
    paths = {"waves": save_script(Waves(), root / "waves.pt"), "rich": save_script(Rich(), root / "rich.pt")}
    for name, seed, count in (("real", 0, 40), ("fake", 1, 33)):
        images = make_images(seed, count)
        paths[name] = save_folder(root / name, images)
        paths[f"{name}.npz"] = str(root / f"{name}.npz")
        np.savez(root / f"{name}.npz", arr_0=images, arr_1=np.arange(count))  # ADM's files also hold labels
    return paths


@pytest.fixture(scope="session")
def script():
    return save_script


@pytest.fixture(scope="session")
def generate():
    return make_images


@pytest.fixture(scope="session")
def folder():
    return save_folder


@pytest.fixture
def evaluate(capsys):
    """Run the command and return its report; stderr is kept as ``evaluate.err``."""

    def command(*options):
        capsys.readouterr()
        main([str(each) for each in (*options, "--json")])
        out, command.err = capsys.readouterr()
        return json.loads(out)

    return command


@pytest.fixture
def refusal(refusal_of):
    """The single line with which the command rejects its options."""
    refused = refusal_of(lambda *options: main([str(each) for each in options]))

    def error(*options):
        message = refused(*options)
        assert "error: " in message
        return message

    return error


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    """A DiT of 8 x 8 pixels whose samples differ."""
    return save_dit(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def golden():
    return json.loads((Path(__file__).parent / "preprocessing.json").read_text())
