"""Latents through a diffusers autoencoder."""

import numpy as np
import pytest
import torch
from tiny_models import save_vae

from ditfast import DiT
from ditfast.sampling.autoencoder import latents_of, load_vae
from ditfast.sampling.decode import make_decoder, to_uint8
from ditfast.sampling.sampler import Guidance, Sampler, sample
from ditfast.sampling.start import draw_start


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"), 1)


@pytest.fixture(scope="module")
def latent(save, tmp_path_factory):
    return save(tmp_path_factory.mktemp("latent") / "model", in_channels=4)


def test_images_equal_decoded_latents(run, vae, latent):
    from diffusers import AutoencoderKL

    options = ("--classes", 2, 5, "--cfg", 1.5, "--vae", vae)
    images = run(*options, model=latent, decoder="vae")
    assert images.shape == (2, 16, 16, 3) and images.std() > 3
    starts = [draw_start(seed, (4, 8, 8), 7, label=label) for seed, label in ((0, 2), (1, 5))]
    model, sampler = DiT.from_pretrained(latent), Sampler("ddpm", 4, True, False)
    latents = sample(model, sampler, Guidance(1.5, 0, 1, 3), starts, "cpu")
    with torch.no_grad():
        decoded = AutoencoderKL.from_pretrained(vae).decode(latents / 0.18215).sample
    expected = (127.5 * decoded + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def test_a_pipeline_of_diffusers_brings_its_own(run, refusal, vae, tmp_path):
    import diffusers

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    model = diffusers.DiTTransformer2DModel(**sizes, sample_size=8, num_embeds_ada_norm=5)
    parts = model, diffusers.AutoencoderKL.from_pretrained(vae), diffusers.DDIMScheduler()
    diffusers.DiTPipeline(*parts).save_pretrained(tmp_path / "pipe")
    images = run("--classes", 2, 4, model=tmp_path / "pipe", decoder="vae")
    shared = {"model": tmp_path / "pipe" / "transformer", "decoder": "vae"}
    np.testing.assert_array_equal(run("--classes", 2, 4, "--vae", vae, out="apart", **shared), images)
    assert images.shape == (2, 16, 16, 3) and (images[0] != images[1]).any()


def test_the_image_size_is_in_pixels(run, refusal, vae, latent):
    shared = {"model": latent, "decoder": "vae"}
    assert run("--num-samples", 1, "--vae", vae, "--image-size", 24, "--allow-mismatch", **shared).shape == (
        1,
        24,
        24,
        3,
    )
    message = refusal("--num-samples", 1, "--vae", vae, "--image-size", 24, 16, **shared)
    assert "--image-size 24 x 16 is not that of the model's training, 16 x 16: --allow-mismatch" in message
    message = refusal("--num-samples", 1, "--vae", vae, "--image-size", 25, **shared)
    assert "--image-size must be a positive multiple of 2, got 25" in message


def test_a_model_of_pixels_has_no_latents(refusal, vae):
    assert "--decoder vae takes 4 channels" in refusal("--num-samples", 1, "--vae", vae, decoder="vae")
    assert "--vae is for models of latents, but this is a model of" in refusal("--num-samples", 1, "--vae", vae)


def test_latents_are_decoded_the_same_in_any_batch(vae):
    from diffusers import AutoencoderKL

    decoder = make_decoder(load_vae(vae, "cpu"))
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = AutoencoderKL.from_pretrained(vae).encode(pictures).latent_dist.mode() * 0.18215
        together, alone = decoder(latents), decoder(latents[1:2])
    assert latents_of(vae) == (4, 2) and together.shape == pictures.shape
    np.testing.assert_array_equal(to_uint8(together)[1:2], to_uint8(alone))


def test_images_are_decoded_one_at_a_time(vae, monkeypatch):
    """A large batch for the sampler fits, whatever the autoencoder needs."""
    from diffusers.models.autoencoders.vae import Decoder

    sizes, forward = [], Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, x, *args: sizes.append(len(x)) or forward(self, x, *args))
    with torch.no_grad():
        make_decoder(load_vae(vae, "cpu"))(torch.randn(3, 4, 8, 8))
    assert sizes == [1, 1, 1]
