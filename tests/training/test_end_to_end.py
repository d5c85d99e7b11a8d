"""From images to a score: encode, train on the latents, sample, decode, evaluate."""

import json

import pytest
import torch

from ditfast import encode, evaluate, sample, train
from ditfast.data import open_data
from ditfast.optional import import_optional
from ditfast.ranks import Ranks
from ditfast.training.encoder import Encoder

SIZE = 16


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL that halves images once."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4, "sample_size": SIZE}
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(**kinds, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for label in ("dark", "light", "middle"):
        (folder / label).mkdir()
        for i in range(5):
            pixels = torch.randint(0, 255, (SIZE, SIZE + 3, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / label / f"{i}.png")
    return folder


def flags(kit, name, *more):
    options = ("--model", "DiT-S/2", "--patch-size", 2, "--lr", "1e-3", "--sample-every", 4, "--sample-steps", 2)
    return [name, *options, "--steps", 4, *more]


def test_the_whole_pipeline(kit, images, vae, capsys):
    latents, samples = kit.folder / "latents", kit.folder / "samples"
    encode.main(["--data", str(images), "--image-size", str(SIZE), "--vae", str(vae), "--out", str(latents)])
    out = kit.train(*flags(kit, "run", "--data", latents, "--vae", vae))
    assert kit.lines(out)[-1]["loss"] < 2
    common = ["--ckpt", str(out / "model"), "--vae", str(vae), "--num-samples", "12", "--steps", "3", "--cfg", "1.5"]
    sample.main([*common, "--sampler", "ddim", "--out", str(samples)])
    torch.jit.script(Features()).save(str(kit.folder / "features.pt"))
    capsys.readouterr()
    command = ["--samples", str(samples), "--reference", str(images), "--features", str(kit.folder / "features.pt")]
    evaluate.main([*command, "--metrics", "fid", "--json", "--trust-torchscript"])
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["metrics"]["fid"] < 1e6


class Features(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def test_encoding_in_every_step_draws_from_the_same_posteriors(kit, images, vae):
    encode.main(["--data", str(images), "--image-size", str(SIZE), "--vae", str(vae), "--out", str(kit.folder / "l")])
    kept = import_optional("safetensors.torch").load_file(next((kit.folder / "l").glob("*.safetensors")))
    source = open_data(str(images), SIZE, flip=False)
    order = torch.arange(source.count)
    x = torch.stack([source.read(int(i), torch.Generator())[0] for i in order])
    encoder = Encoder(str(vae), source, seed=0, batch=len(order), ranks=Ranks())
    drawn = torch.stack([encoder.encode(x, step) for step in range(200)]) / 0.18215  # (200, n, C, h, w)
    noise = (drawn - kept["mean"]) / kept["std"]
    assert noise.mean().abs() < 0.01 and abs(noise.std() - 1) < 0.01 and not torch.equal(drawn[0], drawn[1])
    half = Encoder(str(vae), source, seed=0, batch=2 * len(order), ranks=Ranks(1, 2))
    whole = Encoder(str(vae), source, seed=0, batch=2 * len(order), ranks=Ranks())
    torch.testing.assert_close(half.encode(x, 3), whole.encode(torch.cat([x, x]), 3)[len(x) :])


def test_a_run_that_encodes_in_every_step(kit, images, vae):
    live = kit.train(*flags(kit, "live", "--data", images, "--image-size", SIZE, "--vae", vae))
    moved = vae.rename(vae.with_name("moved"))
    try:
        kit.train(*flags(kit, "live", "--data", images, "--image-size", SIZE, "--vae", moved, "--resume", live))
    finally:
        moved.rename(vae)


def test_latents_of_another_autoencoder(kit, images, vae, refused):
    diffusers = pytest.importorskip("diffusers")
    encode.main(["--data", str(images), "--image-size", str(SIZE), "--vae", str(vae), "--out", str(kit.folder / "l")])
    torch.manual_seed(1)
    other = kit.folder / "other"
    diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(vae)).save_pretrained(other)
    assert "does not have the weights that encoded the data" in refused(
        "--data", kit.folder / "l", "--vae", other, "--model", "DiT-S/2"
    )
    kit.train(*flags(kit, "run", "--data", kit.folder / "l", "--steps", 2))
    encode.main(
        ["--data", str(images), "--image-size", str(SIZE), "--vae", str(other), "--out", str(kit.folder / "m")]
    )
    text = refused("--data", kit.folder / "m", "--model", "DiT-S/2", "--resume", kit.folder / "run")
    assert "data's vae" in text


def test_classes_that_do_not_match(kit, images, refused):
    text = refused("--data", images, "--image-size", SIZE, "--num-classes", 1000)
    assert text == f"error: --num-classes is 1000, but --data {images} has 3"


def test_channels_of_pixels(kit, images, capsys):
    train.main(["--data", str(images), "--image-size", str(SIZE), "--dry-run", "--model", "DiT-S/4"])
    assert f"samples of 3 x {SIZE} x {SIZE}" in capsys.readouterr().out
