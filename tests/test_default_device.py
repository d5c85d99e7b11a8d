"""Host data stays on the host even if ``torch.set_default_device`` names a GPU (here: "meta")."""

import numpy as np
import pytest
import torch

from ditfast.data import open_data
from ditfast.data.stream import stream_batches
from ditfast.evaluation.metrics import frechet_distance, inception_score, moments, precision_recall


@pytest.fixture(autouse=True)
def elsewhere(one_thread):
    with torch.device("meta"):
        yield


@pytest.fixture
def images(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    for name in ("ant", "bee"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        pil.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(folder / "0.png")
    return tmp_path / "images"


def test_batches_of_data(images):
    for name, size, workers in (("digits", None, 0), ("glyphs", None, 0), (images, 8, 0), (images, 8, 1)):
        batch = next(stream_batches(open_data(name, size), seed=0, start=0, batch=3, workers=workers))
        assert {each.device.type for each in batch[:3]} == {"cpu"}, name


def test_samples():
    from ditfast.diffusion import create_diffusion
    from ditfast.diffusion.schedulers import make_scheduler, sample_with_scheduler
    from ditfast.sampling.start import draw_start

    start = draw_start(3, (4, 8, 8), 7)
    assert start.noise.device.type == start.generator.device.type == "cpu"
    pytest.importorskip("diffusers")
    scheduler, noise = make_scheduler("dpm++", create_diffusion("")), start.noise[None]
    x = sample_with_scheduler(lambda x, t: x / 2, scheduler, noise.shape, 4, noise, learn_sigma=False)
    assert x.isfinite().all()


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_metrics(make):
    rng = np.random.default_rng(0)
    a, b = (make(rng.normal(size=(20, 3))) for _ in range(2))
    assert frechet_distance(*moments(a), *moments(b)) > 0
    assert all(0 <= value <= 1 for value in precision_recall(a, b))
    assert inception_score(make(np.full((4, 2), 0.5))) == (1, 0)


def test_latents(images, tmp_path):
    pytest.importorskip("diffusers")
    from tiny_models import save_vae

    from ditfast.encode import main

    out = tmp_path / "latents"
    with torch.device("cpu"):
        vae = save_vae(tmp_path / "vae", 1)
        main(["--data", str(images), "--image-size", "8", "--vae", vae, "--out", str(out), "--workers", "0"])
    batch = next(stream_batches(open_data(out), seed=0, start=0, batch=2))
    assert batch.x.isfinite().all()
