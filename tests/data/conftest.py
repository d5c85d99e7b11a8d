import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


def save_vae(folder, seed):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    AutoencoderKL(down_block_types=down, up_block_types=up, **blocks).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny", 1)


@pytest.fixture(scope="session")
def other_vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny", 2)


@pytest.fixture(scope="session")
def save_images():
    """Eleven images of three classes in a folder."""

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
    """Run the command, and return its folder."""
    from ditfast.encode import main

    def command(*options, data="images", out="out", size=12, vae=vae, shard=4):
        given = {"--data": tmp_path / data, "--out": tmp_path / out, "--vae": vae, "--image-size": size}
        shared = [word for pair in given.items() for word in pair]
        main([str(each) for each in (*shared, "--shard-size", shard, "--batch", 3, "--workers", 0, *options)])
        return tmp_path / out

    return command


@pytest.fixture
def refusal(encode, capsys):
    """The one line with which the command ends."""

    def refused(*options, **changes):
        with pytest.raises(SystemExit) as stopped:
            encode(*options, **changes)
        code = stopped.value.code
        message = code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]
        assert code != 0 and "\n" not in message
        return message

    return refused


@pytest.fixture(scope="session")
def posterior(vae):
    """mean and std (C, h, w) of an image, by diffusers alone."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae)

    @torch.no_grad()
    def of(x):
        found = model.encode(x[None]).latent_dist
        return found.mean[0], found.std[0]

    return of
