import numpy as np
import pytest
import torch
from tiny_models import save_vae

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny", 1)


@pytest.fixture(scope="session")
def other_vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny", 2)


@pytest.fixture(scope="session")
def save_images():
    """Save eleven images of three classes in a folder."""

    def save(folder):
        rng = np.random.default_rng(0)
        for name, count in (("ant", 3), ("bee", 5), ("cat", 3)):
            (folder / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(10, 40, 2)
                pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{i}.png")
        return folder

    return save


@pytest.fixture
def tree(save_images, tmp_path):
    return save_images(tmp_path / "images")


@pytest.fixture
def encode(vae, tmp_path):
    """Run the command and return its folder."""
    from ditfast.encode import main

    def command(*options, data="images", out="out", size=12, vae=vae, shard=4):
        given = {"--data": tmp_path / data, "--out": tmp_path / out, "--vae": vae, "--image-size": size}
        shared = [word for pair in given.items() for word in pair]
        main([str(each) for each in (*shared, "--shard-size", shard, "--batch", 3, "--workers", 0, *options)])
        return tmp_path / out

    return command


@pytest.fixture
def refusal(refusal_of, encode):
    """The single line that the command ends with."""
    return refusal_of(encode)


@pytest.fixture(scope="session")
def posterior(vae):
    """mean and std (C, h, w) of an image, computed by diffusers alone."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae)

    @torch.no_grad()
    def of(x):
        found = model.encode(x[None]).latent_dist
        return found.mean[0], found.std[0]

    return of
