"""A checkpoint's sampling settings are used; options that contradict them are rejected unless allowed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_dit, save_vae

from ditfast import DiT
from ditfast.fingerprint import sha256
from ditfast.sampling.autoencoder import Scaling, load_vae, scaling_of

TWO = ("--classes", 1, 2, "--cfg", 1)
ALLOW = "--allow-mismatch"


def record(folder, **changes) -> str:
    """Add fields to the checkpoint's ``sampling``; None removes a field."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["sampling"] = {k: v for k, v in (config["sampling"] | changes).items() if v is not None or k == "vae"}
    path.write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """Two autoencoders; the first has its own scale and shift."""
    from diffusers import AutoencoderKL

    folders = [save_vae(tmp_path_factory.mktemp("vae") / name, seed) for seed, name in enumerate("ab")]
    rescale(folders[0], scaling_factor=0.7, shift_factor=0.25)
    assert AutoencoderKL.from_pretrained(folders[0]).config.shift_factor == 0.25
    return folders


def rescale(vae, **config):
    path = Path(vae) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


@pytest.fixture
def latent(tmp_path):
    return save_dit(tmp_path / "latent", in_channels=4)


def settings(folder) -> dict:
    return json.loads((folder / "settings.json").read_text())


def test_the_schedule_comes_from_the_model(run, refusal, tmp_path):
    model = save_dit(tmp_path / "model")
    linear = run(*TWO, model=model, out="linear")
    record(model, noise_schedule="squaredcos_cap_v2")
    cosine = run(*TWO, model=model, out="cosine")
    assert settings(tmp_path / "cosine")["noise_schedule"] == "squaredcos_cap_v2" and (cosine != linear).any()
    same = run(*TWO, "--noise-schedule", "squaredcos_cap_v2", model=model, out="same")
    np.testing.assert_array_equal(same, cosine)
    given = (*TWO, "--noise-schedule", "linear")
    assert "--noise-schedule linear is not the model's, squaredcos_cap_v2" in refusal(*given, model=model, out="no")
    assert not (tmp_path / "no").exists()
    np.testing.assert_array_equal(run(*given, ALLOW, model=model, out="told"), linear)


def test_a_model_without_settings_accepts_any_schedule(run, tmp_path):
    model = Path(save_dit(tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    del config["sampling"]
    (model / "config.json").write_text(json.dumps(config))
    run(*TWO, model=model, out="a")
    run(*TWO, "--noise-schedule", "squaredcos_cap_v2", model=model, out="b")
    assert [settings(tmp_path / name)["noise_schedule"] for name in "ab"] == ["linear", "squaredcos_cap_v2"]


def test_images_of_another_size_than_the_trained_one(run, refusal, tmp_path):
    torch.save(
        {"ema": DiT.from_pretrained(save_dit(tmp_path / "m")).state_dict(), "args": {"num_heads": 2}},
        tmp_path / "x.pt",
    )
    for model in (tmp_path / "m", tmp_path / "x.pt"):
        message = "--image-size 12 x 8 is not that of the model's training, 8 x 8: --allow-mismatch samples anyway"
        assert message in refusal(*TWO, "--image-size", 12, 8, model=model)
        assert run(*TWO, "--image-size", 8, model=model, out=f"{model.name}-8", steps=1).shape == (2, 8, 8, 3)
    assert run(*TWO, "--image-size", 12, 8, ALLOW, model=model, steps=1).shape == (2, 12, 8, 3)


def test_guidance_of_a_model_that_guides_itself(run, refusal, tmp_path):
    model = save_dit(tmp_path / "mean", second_time=True)
    record(model, objective="meanflow", noise_schedule=None, guidance=2.5)
    run("--classes", 1, model=model, steps=None)
    given = ("--classes", 1, "--cfg", 1.5)
    message = "--cfg 1.5 guides twice: the model was trained to guide itself, by 2.5: --allow-mismatch samples anyway"
    assert message in refusal(*given, model=model, steps=None)
    run(*given, ALLOW, model=model, steps=None, out="twice")


def test_what_is_assumed_is_said(run, tmp_path, capsys):
    """Weights of a flow and of a diffusion have the same names and shapes."""
    state = DiT.from_pretrained(model := save_dit(tmp_path / "model")).state_dict()
    for name, args in (("bare", {}), ("sit", {"path_type": "Linear", "prediction": "velocity"})):
        torch.save({"ema": state, "args": {"num_heads": 2, **args}}, tmp_path / f"{name}.pt")
    DiT.from_pretrained(tmp_path / "bare.pt").save_pretrained(tmp_path / "loop")  # as from a loop of one's own
    said = {}
    for name in ("bare.pt", "sit.pt", "model", "loop"):
        run(*TWO, model=tmp_path / name, out=f"of {name}", steps=1)
        said[name] = "records no objective" in (text := capsys.readouterr().err)
        assert (
            not said[name]
            or "sampled as diffusion, linear noise schedule; for SiT's weights, --objective flow" in text
        )
    assert said == {"bare.pt": True, "sit.pt": False, "model": False, "loop": True}
    run(*TWO, "--objective", "diffusion", model=tmp_path / "bare.pt", out="told", steps=1)
    assert "records no objective" not in capsys.readouterr().err and model


def test_a_null_label_is_assumed_unless_denied(run, refusal, tmp_path, capsys):
    """A file whose seven rows are seven classes; six of a table of seven, by default."""
    model = DiT.from_pretrained(save_dit(tmp_path / "model", class_dropout_prob=0.0))
    torch.save({"model": model.state_dict(), "args": {"num_heads": 2}}, tmp_path / "bare.pt")
    options = {"model": tmp_path / "bare.pt", "steps": 1}
    run("--classes", 5, "--cfg", 1, **options)
    line = (
        "the last of 7 rows of labels is assumed to be the null label's: if not, class_dropout_prob=0, here --no-nu"
    )
    assert line in capsys.readouterr().err
    assert "--classes must be in [0, 5], got 6" in refusal("--classes", 6, **options)
    deny = "--no-null-label", "--cfg", 1
    assert "null_label was null, is false" in refusal("--classes", 5, *deny, **options)
    np.testing.assert_array_equal(
        run("--classes", 6, *deny, out="told", **options),
        run("--classes", 6, "--cfg", 1, model=tmp_path / "model", out="f", steps=1),
    )
    assert "null label" not in capsys.readouterr().err
    assert "--cfg 4 needs a null class" in refusal("--classes", 5, "--no-null-label", out="no", **options)


def test_another_objective_is_not_sampled(refusal, tmp_path):
    model = record(save_dit(tmp_path / "model"), objective="consistency")
    assert "was trained for the objective 'consistency', which has no sampler here" in refusal(
        *TWO, ALLOW, model=model
    )


def test_a_model_of_pixels_needs_no_decoder(run, refusal, vaes, tmp_path):
    model = record(save_dit(tmp_path / "model"), vae=None)
    options = ("--ckpt", model, "--steps", 2, "--out", tmp_path / "out", *TWO)
    from ditfast.sample import main

    main([str(each) for each in options])
    assert settings(tmp_path / "out")["decoder"] == "pixel"
    assert "--decoder vae does not fit this model, which was trained with pixel" in refusal(
        *TWO, "--vae", vaes[0], model=model, decoder="vae"
    )


def test_another_autoencoder_is_rejected(run, refusal, vaes, latent, tmp_path):
    known = {"sha256": sha256(load_vae(vaes[0], "cpu")), "scale": 0.7, "shift": 0.25}
    record(latent, vae=known)
    options = {"model": latent, "decoder": "vae"}
    right = run(*TWO, "--vae", vaes[0], **options)
    assert "b is not the autoencoder that the model was trained with: --allow" in refusal(
        *TWO, "--vae", vaes[1], out="b", **options
    )
    assert "--decoder pixel does not fit this model" in refusal(*TWO, model=latent, decoder="pixel", out="c")
    other = run(*TWO, "--vae", vaes[1], ALLOW, out="b", **options)
    assert (other != right).any()
    rescale(vaes[0], scaling_factor=0.1)  # the model's own numbers count
    try:
        np.testing.assert_array_equal(run(*TWO, "--vae", vaes[0], out="again", **options), right)
    finally:
        rescale(vaes[0], scaling_factor=0.7)


def test_scale_and_shift_come_from_the_autoencoder(run, vaes, latent, tmp_path):
    """Compared with diffusers alone: x / scaling_factor + shift_factor is decoded."""
    from diffusers import AutoencoderKL

    from ditfast.sampling.sampler import Guidance, Sampler, sample
    from ditfast.sampling.start import draw_start

    images = run("--classes", 2, "--cfg", 1, "--vae", vaes[0], model=latent, decoder="vae")
    model, starts = DiT.from_pretrained(latent), [draw_start(0, (4, 8, 8), 7, label=2)]
    x = sample(model, Sampler("ddpm", 4, True, False), Guidance(1, 0, 1, 3), starts, "cpu")
    with torch.no_grad():
        decoded = AutoencoderKL.from_pretrained(vaes[0]).decode(x / 0.7 + 0.25).sample
    expected = (127.5 * decoded + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def test_mean_and_deviation_by_channel(vaes, tmp_path):
    """Scaled like in diffusers' pipelines: (z - mean) * scaling_factor / std."""
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 4.0]
    vae = save_vae(tmp_path / "vae", 0)
    rescale(vae, latents_mean=mean, latents_std=std, scaling_factor=0.5)
    z = torch.randn(2, 4, 3, 3)
    scaling = scaling_of(load_vae(vae, "cpu"))
    per = [torch.tensor(each).view(1, 4, 1, 1) for each in (mean, std)]
    torch.testing.assert_close(scaling.apply(z), (z - per[0]) * 0.5 / per[1])
    torch.testing.assert_close(scaling.undo(scaling.apply(z)), z)
    torch.testing.assert_close(Scaling(*json.loads(json.dumps(scaling))).apply(z), scaling.apply(z))


def test_invalid_statistics(refusal, latent, tmp_path):
    vae = save_vae(tmp_path / "vae", 0)
    rescale(vae, latents_mean=[0.0] * 4)
    message = refusal(*TWO, "--vae", vae, model=latent, decoder="vae")
    assert "latents_mean and latents_std must be one number per latent channel, 4 here, without" in message


def test_an_autoencoder_of_another_kind_or_with_missing_weights(refusal, latent, vaes, tmp_path):
    import shutil

    files = __import__("safetensors.torch").torch
    cut = tmp_path / "cut"
    shutil.copytree(vaes[1], cut)
    state = files.load_file(cut / "diffusion_pytorch_model.safetensors")
    state.pop("decoder.conv_in.bias")
    files.save_file(state, cut / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    shared = {"model": latent, "decoder": "vae"}
    assert "cut lacks 1 weight, decoder.conv_in.bias first" in refusal(*TWO, "--vae", cut, **shared)
    rescale(cut, _class_name="AutoencoderDC")
    assert "cut must be an AutoencoderKL, got an AutoencoderDC" in refusal(*TWO, "--vae", cut, **shared)
    rescale(cut, _class_name="AutoencoderKL", block_out_channels=[8, 8])
    assert "cut cannot be loaded" in refusal(*TWO, "--vae", cut, **shared)


@pytest.mark.parametrize("change", ["half", "bfloat16"])
def test_a_half_precision_variant_of_an_autoencoder(vaes, tmp_path, change):
    from diffusers import AutoencoderKL

    vae = getattr(AutoencoderKL.from_pretrained(vaes[1]), change)()
    vae.save_pretrained(tmp_path / "a", variant="fp16")
    vae.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    first, second = (load_vae(str(tmp_path / name), "cpu") for name in "ab")
    assert first.dtype == second.dtype == torch.float32 and sha256(first) == sha256(second)
    assert sha256(first) != sha256(load_vae(vaes[1], "cpu"))


@pytest.mark.parametrize("channels, guided", [(1, 1), (3, 3), (4, 3), (16, 16), (32, 32)])
@torch.no_grad()
def test_guidance_covers_all_channels_unless_there_are_four(channels, guided, tmp_path):
    from ditfast.sample import make_guidance, parse_options
    from ditfast.training.preview import default_cfg_channels

    model = DiT.from_pretrained(save_dit(tmp_path / "model", in_channels=channels))
    assert make_guidance(parse_options(["--ckpt", "x", "--num-samples", "1", "--cfg", "4"]), model).channels == guided
    assert default_cfg_channels(channels) == guided
    x, t, y = torch.randn(2, channels, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 7])
    plain, changed = (model.forward_with_cfg(x, t, y, scale)[0] for scale in (1.0, 4.0))
    differ = (plain != changed).flatten(1).any(1)  # by channel, the variance's last
    assert differ.tolist() == [True] * guided + [False] * (2 * channels - guided)
