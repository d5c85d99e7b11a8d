"""An animation shows what the model is given, and ends with the images."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_vae

from ditfast import DiT
from ditfast.sampling.animation import FRAMES
from ditfast.sampling.decode import to_uint8
from ditfast.sampling.files import tile_images
from ditfast.sampling.start import draw_start

THREE = ("--classes", 2, 5, 1, "--cfg", 1.5)


def frames_of(path):
    """RGB frames and their durations."""
    with Image.open(path) as image:
        found = []
        for index in range(image.n_frames):
            image.seek(index)
            found.append((np.asarray(image.convert("RGB")).astype(int), image.info["duration"]))
        return found


def near(frame, images, scale):
    """A GIF has 256 colors."""
    return np.abs(frame - tile_images(images, scale=scale).astype(int)).mean() < 6


@pytest.fixture
def flow(save, tmp_path):
    model = DiT.from_pretrained(save(tmp_path / "flow"))
    model.sampling = {"objective": "flow", "path_type": "Linear", "prediction": "velocity"}
    model.save_pretrained(tmp_path / "flow", overwrite=True)
    return tmp_path / "flow"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "sde"])
def test_it_goes_from_noise_to_the_images(run, ckpt, flow, tmp_path, sampler):
    gif, how = tmp_path / "a.gif", {"model": ckpt if sampler.startswith("dd") else flow}
    options = (*THREE, "--sampler", sampler, "--grid-scale", 4)
    images = run(*options, "--gif", gif, "--batch", 2, **how)
    frames = frames_of(gif)
    assert len(frames) == 4 + 1 and [each for _, each in frames] == [60] * 4 + [2000]
    noise = torch.stack([draw_start(seed, (3, 8, 8), 7).noise for seed in range(3)])
    assert near(frames[0][0], to_uint8(noise), 4) and near(frames[-1][0], images, 4)
    before = gif.read_bytes()
    run(*options, "--gif", gif, **how)  # in one batch; the images are there, and drawn again
    assert gif.read_bytes() == before


def test_many_steps_and_an_autoencoder(run, save, tmp_path):
    vae, model = save_vae(tmp_path / "vae", 0), save(tmp_path / "latent", in_channels=4)
    options = ("--num-samples", 1, "--cfg", 1, "--sampler", "ddim", "--vae", vae, "--gif", tmp_path / "a.gif")
    images = run(*options, model=model, decoder="vae", steps=FRAMES + 7)
    frames = frames_of(tmp_path / "a.gif")
    assert len(frames) == FRAMES + 1 and frames[0][0].shape == (16, 16, 3) and near(frames[-1][0], images, 1)


def test_refused(refusal, ckpt, flow, tmp_path):
    gif, tall = ("--gif", tmp_path / "a.gif"), ("--grid-columns", 1, "--grid-scale", 3000)
    for options, message in (
        ((*gif, "--steps", 1), "--gif needs a fixed number of steps, at least 2, got 1"),
        ((*gif, "--sampler", "ode"), "--gif needs a .*, got an adaptive --sampling-method"),
        (("--gif", tmp_path / "no" / "a.gif"), "--gif must be a file in a folder that exists"),
        ((*gif, *tall), "--grid-scale 3000 makes the grid .* 65535 per side"),
    ):
        how = {"model": flow, "steps": None} if "ode" in options else {"model": ckpt}
        assert re.search(message, refusal(*THREE, *options, **how))
        assert not gif[1].exists()
    gif[1].write_bytes(b"mine")
    assert "a.gif exists: choose another --gif" in refusal(*THREE, *gif)
    assert gif[1].read_bytes() == b"mine"
