"""What the command rejects, in one line that names the option, before it writes anything."""

import sys

import numpy as np
import pytest
import torch
from tiny_models import save_vae

from ditfast import DiT
from ditfast.sample import main
from ditfast.sampling import recorded
from ditfast.sampling.sampler import SAMPLERS

ONE = ("--num-samples", 1)
SAMPLER = f"--sampler must be one of {', '.join(SAMPLERS)}, or a scheduler class in diffusers, for"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--classes", 1, 7), r"--classes must be in [0, 6], got 7"),
        (("--classes", -1), r"--classes must be in [0, 6], got -1"),
        (("--classes", 1, "--num-samples", 1), "not allowed with argument"),
        ((), "one of the arguments --classes --num-samples is required"),
        (("--num-samples", 0), "--num-samples must be at least 1, got 0"),
        (("--num-samples", 4 * 10**9), "--num-samples must be at most 10000000, got 4000000000"),
        (
            (*ONE, "--grid", "g.png", "--grid-scale", 10**6),
            "--grid-scale 1000000 makes the grid 8000000 x 8000000",
        ),
        ((*ONE, "--image-size", 10**9), "--image-size must be at most 65536, got 1000000000"),
        ((*ONE, "--npz", "x" * 300), "--npz cannot be xxx"),
        ((*ONE, "--grid", ""), "--grid must be a path, got ''"),
        ((*ONE, "--batch", 0), "--batch must be at least 1, got 0"),
        ((*ONE, "--steps", 0), "--steps must be at least 1, got 0"),
        ((*ONE, "--steps", 1001), "--steps must be in [1, 1000] for ddpm, got 1001"),
        (
            (*ONE, "--sampler", "ddim", "--steps", 1001),
            "--steps must be in [1, 1000] for ddim, got 1001",
        ),
        ((*ONE, "--sampler", "dpm+"), f"{SAMPLER} a diffusion model, got 'dpm+'; did you mean 'dpm++'?"),
        ((*ONE, "--sampler", "ddmp"), "did you mean 'ddpm'?"),
        ((*ONE, "--sampler", ""), f"{SAMPLER} a diffusion model, got ''"),
        ((*ONE, "--sampler", "FlowMatchEulerDiscreteScheduler"), "--sampler's class must have"),
        ((*ONE, "--sampler", "euler", "--steps", 1001), "--steps must be from 1 to 1000 for EulerD"),
        (
            (*ONE, "--sampler", "pndm", "--steps", 30),
            "--steps must divide 1000 and be at least",
        ),
        ((*ONE, "--cfg", 0.5), "--cfg must be at least 1, got 0.5"),
        ((*ONE, "--cfg", "nan"), "--cfg must be at least 1, got nan"),
        ((*ONE, "--cfg-channels", 4), "--cfg-channels must be in [1, 3], got 4"),
        ((*ONE, "--cfg-interval", 0.7, 0.3), "--cfg-interval must be 0 <= LO <= HI <= 1, got 0.7 0.3"),
        ((*ONE, "--cfg-interval", 0, 100), "--cfg-interval must be"),
        ((*ONE, "--seeds", 1, 2), "--seeds must list one seed per sample: expected 1, got 2"),
        ((*ONE, "--seeds", 2**32), "--seeds must be in [0, 4294967295]"),
        (("--num-samples", 2, "--seed", 2**32 - 1), "--seed must be in [0, 4294967295]"),
        ((*ONE, "--seed", -1), "--seed must be in [0, 4294967295], got -1"),
        ((*ONE, "--image-size", 0), "--image-size must be a positive multiple of 1, got 0"),
        ((*ONE, "--image-size", 9), "--image-size must be a positive multiple of 2 for this model, got 9 x 9"),
        ((*ONE, "--image-size", 8, 8, 8), "--image-size must be a side, or height and width, got 3 numbers"),
        ((*ONE, "--num-heads", 0), "--num-heads must be at least 1, got 0"),
        ((*ONE, "--num-heads", 5), "--num-heads must divide"),
        ((*ONE, "--grid", "/nowhere/at/all.png"), "--grid must be a file in a folder that exists"),
        ((*ONE, "--npz", "/"), "--npz must be a file"),
        ((*ONE, "--grid", "a.png", "--gif", "./a.png"), "--gif must be another file than --grid, got ./a.png"),
        ((*ONE, "--npz", "/", "--overwrite"), "--npz must be a file"),
        ((*ONE, "--decoder", "none"), "invalid choice: 'none'"),
    ],
)
def test_bad_options(refusal, options, message, tmp_path):
    assert message in refusal(*options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "--ckpt is required, or --demo, which needs no weights"),
        (("--one-step",), "--one-step needs --demo"),
        (("--dmeo",), "unrecognized arguments: --dmeo; did you mean '--demo'?"),
        (("--num-sample=3", "--sed=7"), "unrecognized arguments: --sed=7; did you mean '--seed'?"),
        (("--nothing",), "unrecognized arguments: --nothing"),
    ],
)
def test_first_steps(refusal_of, capsys, words, message):
    assert refusal_of(main)([*words]).endswith(f"error: {message}") or message.startswith("--one-step")
    assert capsys.readouterr().out == ""


def test_the_autoencoder_is_loaded_after_the_checks(refusal, save, tmp_path, monkeypatch):
    """It is the largest file of most runs, and may be a download."""
    vae, model = save_vae(tmp_path / "vae", 0), save(tmp_path / "latent", in_channels=4)
    torch.save(DiT.from_pretrained(model).state_dict(), tmp_path / "bare.pt")
    monkeypatch.setattr(recorded, "load_vae", lambda *_: pytest.fail("loaded"))
    options = ("--vae", vae, "--grid", tmp_path / "g.png")
    for more, at, message in (
        ((), tmp_path / "bare.pt", "give num_heads"),
        ((), None, "--decoder vae takes 4 channels, the model has 3"),
        (("--classes", 9), model, "--classes must be in [0, 6], got 9"),
        (("--cfg-channels", 5), model, "--cfg-channels must be in [1, 4], got 5"),
        (("--sampler", "nothing"), model, f"{SAMPLER} a diffusion model, got 'nothing'"),
        (("--grid-scale", 10**6), model, "--grid-scale 1000000 makes"),
    ):
        given = more if "--classes" in more else (*ONE, *more)
        assert message in refusal(*given, *options, **({"model": at} if at else {}), decoder="vae")


def test_guidance_without_a_null_class(run, refusal, save, tmp_path):
    model = save(tmp_path / "sure", class_dropout_prob=0)
    assert "--cfg 4 needs a null class" in refusal(*ONE, model=model)
    assert "class_dropout_prob=0" in refusal(*ONE, "--cfg", 1.5, model=model)
    assert len(run(*ONE, "--cfg", 1, model=model)) == 1


def test_no_such_checkpoint(refusal, tmp_path):
    assert "--ckpt" in refusal(*ONE, model=tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    assert "cut.pt" in refusal(*ONE, model=tmp_path / "cut.pt")


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE must be an integer, got 'x' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, got 0 in the environment"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be an integer, got '-1' in the environment"),
        ({"RANK": "1"}, "RANK must be below WORLD_SIZE=1, got 1 in the environment"),
    ],
)
def test_an_environment_not_from_torchrun(refusal, monkeypatch, tmp_path, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in refusal(*ONE)
    assert not list(tmp_path.iterdir())


def test_out_is_a_file(refusal, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "is not a folder" in refusal(*ONE)
    assert "cannot write" in refusal(*ONE, out="out/in")


def test_no_such_vae(refusal, tmp_path):
    options = (*ONE, "--vae", tmp_path / "none")
    assert "--vae must be ema, mse or a folder" in refusal(*options, decoder="vae")
    (tmp_path / "none").mkdir()
    assert "none cannot be loaded" in refusal(*options, decoder="vae")


@pytest.mark.parametrize("package, options", [("diffusers", {"decoder": "vae"}), ("tqdm", {}), ("PIL.Image", {})])
def test_a_missing_package_is_named(refusal, monkeypatch, tmp_path, package, options):
    (tmp_path / "vae").mkdir()
    monkeypatch.setitem(sys.modules, package, None)
    vae = ("--vae", tmp_path / "vae") if options else ()
    message = refusal(*ONE, *vae, **options)
    assert f"{package.replace('PIL.Image', 'Pillow')} is not installed: pip install 'ditfast[sample]'" in message


def test_channels_that_the_decoder_does_not_support(refusal, save, tmp_path):
    model = save(tmp_path / "latent", in_channels=4)
    assert "--decoder pixel takes 1 or 3 channels, the model has 4" in refusal(*ONE, model=model)


def test_non_finite_values(refusal, ckpt, tmp_path):
    model = DiT.from_pretrained(ckpt)
    torch.nn.init.constant_(model.final_layer.linear.bias, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    assert "not finite" in refusal("--num-samples", 2, model=tmp_path / "nan")
    assert not list((tmp_path / "out").glob("*.png"))


def test_what_a_file_does_not_contain_is_an_option(run, refusal, tmp_path):
    """The error names the option; with it, the command behaves as on a folder."""
    torch.manual_seed(0)
    model = DiT(input_size=(4, 12), hidden_size=32, depth=1, num_heads=2, in_channels=3, num_classes=5)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "x.pt")
    size = ("--image-size", 4, 12)
    assert "give num_heads, here --num-heads N" in refusal(*ONE, *size, model=tmp_path / "x.pt")
    assert "here --image-size HEIGHT WIDTH" in refusal(*ONE, "--num-heads", 2, model=tmp_path / "x.pt")
    images = run(*ONE, *size, "--num-heads", 2, model=tmp_path / "x.pt")
    assert images.shape == (1, 4, 12, 3) and (images == run(*ONE, model=tmp_path / "folder", out="plain")).all()
    assert "num_heads was 2, is 4" in refusal(*ONE, *size, "--num-heads", 4, model=tmp_path / "x.pt")
    torch.save({"ema": model.state_dict(), "args": {"num_heads": 2, "input_size": (4, 12)}}, tmp_path / "y.pt")
    assert (run(*ONE, model=tmp_path / "y.pt", out="args") == images).all()


def test_a_mistyped_path(refusal, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert "--ckpt runs/modle: 'runs/modle' is not a file, a folder" in (text := refusal(*ONE, model="runs/modle"))
    assert text.endswith("did you mean 'runs/model'?")


def test_an_image_is_not_replaced_by_a_grid(run, refusal, tmp_path):
    images = run(*ONE)
    message = refusal(*ONE, "--overwrite", "--grid", tmp_path / "out" / "000000.png")
    assert "--grid must not be an image of --out, got " in message
    np.testing.assert_array_equal(run(*ONE, "--grid", tmp_path / "out.png"), images)
