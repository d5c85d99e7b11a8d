"""A run records how to sample from its model, and scales latents as the autoencoder's config says."""

import json

import pytest
import torch
from tiny_models import save_vae

from ditfast import DiT, encode, sample
from ditfast.data import open_data
from ditfast.export import main as export
from ditfast.ranks import Ranks
from ditfast.sampling.autoencoder import describe_vae, load_vae
from ditfast.training.checkpoint import ABOUT
from ditfast.training.encoder import Encoder

SIZE = 8
CLASSES = ["dark", "light", "middle"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """An autoencoder with its own latent scale and shift."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("vae")
    save_vae(folder, 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.7, "shift_factor": 0.25}))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for label in CLASSES:
        (folder / label).mkdir()
        for i in range(2):
            pixels = torch.randint(0, 255, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture
def latents(kit, images, vae):
    folder = kit.folder / "latents"
    encode.main(["--data", str(images), "--image-size", str(SIZE), "--vae", str(vae), "--out", str(folder)])
    return folder


FLAGS = ("--model", "DiT-S/2", "--steps", 1)


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_a_run_on_latents(kit, images, vae, latents, kind, capsys):
    data = ("--data", images, "--image-size", SIZE) if kind == "images" else ("--data", latents)
    out = kit.train("run", *data, "--vae", vae, *FLAGS, "--noise-schedule", "squaredcos_cap_v2")
    expected = {**describe_vae(load_vae(str(vae), "cpu"))}
    assert expected["scale"] == 0.7 and expected["shift"] == 0.25
    model = DiT.from_pretrained(out / "model")
    assert model.sampling == {
        "objective": "diffusion",
        "noise_schedule": "squaredcos_cap_v2",
        "vae": expected,
        "classes": CLASSES,
    }
    options = ["--ckpt", str(out / "model"), "--vae", str(vae), "--num-samples", "1", "--steps", "1"]
    sample.main([*options, "--out", str(kit.folder / "samples")])
    assert json.loads((kit.folder / "samples/settings.json").read_text())["noise_schedule"] == "squaredcos_cap_v2"


def test_a_run_on_latents_records_the_autoencoder_without_loading_it(kit, latents, vae):
    out = kit.train("run", "--data", latents, *FLAGS)
    assert DiT.from_pretrained(out / "model").sampling["vae"] == describe_vae(load_vae(str(vae), "cpu"))


def test_a_run_on_pixels(kit):
    out = kit.train("run", "--steps", 2)
    expected = {"objective": "diffusion", "noise_schedule": "linear", "vae": None, "classes": list("0123456789")}
    assert DiT.from_pretrained(out / "model").sampling == expected
    export([str(out), str(kit.folder / "last"), "--weights", "model"])
    assert DiT.from_pretrained(kit.folder / "last").sampling == expected
    options = [
        "--ckpt",
        str(out / "model"),
        "--num-samples",
        "1",
        "--steps",
        "1",
        "--out",
        str(kit.folder / "samples"),
    ]
    sample.main(options)
    assert json.loads((kit.folder / "samples/settings.json").read_text())["decoder"] == "pixel"


def test_latents_are_scaled_equally_in_files_and_in_every_step(images, vae, latents):
    """(z - shift) * scale, computed by diffusers alone."""
    from diffusers import AutoencoderKL

    source, files = open_data(str(images), SIZE, flip=False), open_data(str(latents), flip=False)
    x = torch.stack([source.read(i, None)[0] for i in range(source.count)])
    with torch.no_grad():
        found = AutoencoderKL.from_pretrained(vae).encode(x).latent_dist
    mean, std = (found.mean - 0.25) * 0.7, found.std * 0.7
    live = Encoder(str(vae), source, seed=0, batch=len(x), ranks=Ranks())
    kept = Encoder(str(vae), files, seed=0, batch=len(x), ranks=Ranks())
    drawn = torch.stack([live.encode(x, step) for step in range(100)])
    read = torch.stack(
        [torch.stack([files.read(i, torch.Generator().manual_seed(k))[0] for i in range(len(x))]) for k in range(100)]
    )
    for each in (drawn, read):
        noise = (each - mean) / std
        assert noise.mean().abs() < 0.05 and abs(noise.std() - 1) < 0.05
    assert live.vae == kept.vae
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(vae).decode(drawn[0] / 0.7 + 0.25).sample
    for encoder in (live, kept):
        torch.testing.assert_close(encoder.decode(drawn[0]), expected, atol=1e-5, rtol=1e-5)


def test_older_latents_have_no_shift(latents):
    index = latents / "latents.json"
    about = json.loads(index.read_text())
    assert (about["scale"], about["shift"]) == (0.7, 0.25) and len(about["vae_sha256"]) == 64
    new = open_data(str(latents), flip=False)
    for name in ("shift", "vae_sha256"):
        del about[name]
    index.write_text(json.dumps(about))
    old = open_data(str(latents), flip=False)
    assert old.vae == {"sha256": None, "scale": 0.7, "shift": 0.0}
    assert "shift" not in old.identity and new.identity["shift"] == 0.25
    pair = [source.read(0, torch.Generator().manual_seed(0))[0] for source in (old, new)]
    torch.testing.assert_close(pair[0] - pair[1], torch.full_like(pair[0], 0.25 * 0.7))


def test_an_older_checkpoint_resumes_and_is_exported(kit, refused):
    """It has the schedule and a checksum of the autoencoder instead of `sampling`."""
    out = kit.train("run", "--steps", 1, "--noise-schedule", "squaredcos_cap_v2")
    path = out / "checkpoints" / "step-00000001" / ABOUT
    about = json.loads(path.read_text())
    schedule = about.pop("sampling")["noise_schedule"]
    del about["checksum"], about["cpu"]  # nor its own checksum, nor the CPU's kernels
    path.write_text(json.dumps({**about, "vae": None, "noise_schedule": schedule}))
    assert "noise_schedule was 'squaredcos_cap_v2', is 'linear'" in refused("--resume", out)
    export([str(out), str(kit.folder / "old")])
    assert DiT.from_pretrained(kit.folder / "old").sampling["noise_schedule"] == schedule
    kit.train("run", "--steps", 2, "--noise-schedule", "squaredcos_cap_v2", "--resume", "auto")
    assert DiT.from_pretrained(out / "model").sampling["vae"] is None


def test_an_autoencoder_with_another_scale(kit, images, vae, refused):
    """The same weights with another scale or shift make other latents."""
    data = ("--data", images, "--image-size", SIZE, "--vae", vae, *FLAGS)
    out = kit.train("run", *data)
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    try:
        assert "sampling's vae was" in refused(*data, "--resume", out)
    finally:
        (vae / "config.json").write_text(json.dumps(config))
