"""Latents drawn from the files that encode writes."""

import json
import pickle

import pytest
import torch

from ditfast.data import DataError, Unreadable, open_data
from ditfast.data.folder import Images
from ditfast.data.latents import Latents
from ditfast.data.stream import stream_batches

safetensors = pytest.importorskip("safetensors.torch")
load_file, save_file = safetensors.load_file, safetensors.save_file


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(tree, encode):
    return encode()


def change(folder, **values):
    path = folder / "latents.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_sample_is_drawn_from_the_posterior_of_the_image_or_its_mirror_image(tree, folder, posterior):
    source, images = Latents(folder), Images(tree, 12, flip=False)
    assert source.shape == (4, 6, 6) and source.num_classes == 3 and source.count == 11
    flips = set()
    for index in range(11):
        own = generator(index)
        flip = bool(torch.rand((), generator=own) < 0.5)
        eps = torch.randn(4, 6, 6, generator=own)
        x, label = images.read(index, None)
        mean, std = posterior(x.flip(2) if flip else x)
        z, y = source.read(index, generator(index))
        torch.testing.assert_close(z, (mean + std * eps) * 0.18215, atol=1e-5, rtol=1e-5)
        assert z.dtype == torch.float32 and y == label and type(y) is int
        flips.add(flip)
    assert flips == {False, True}


def test_moments_of_the_draws(tree, folder, posterior):
    source, index, n = Latents(folder, flip=False), 6, 4000
    mean, std = posterior(Images(tree, 12, flip=False).read(index, None)[0])
    drawn = torch.stack([source.read(index, generator(seed))[0] for seed in range(n)]) / 0.18215
    error = (drawn.mean(0) - mean) / (std / n**0.5)  # 144 values, in standard errors
    assert error.abs().max() < 5 and error.std() > 0.5
    assert ((drawn.std(0) / std - 1) * (2 * n) ** 0.5).abs().max() < 5


def test_half_are_mirrored(tree, folder, posterior):
    source, index, n = Latents(folder), 6, 1000
    x = Images(tree, 12, flip=False).read(index, None)[0]
    (mean, _), (mirrored, _) = posterior(x), posterior(x.flip(2))
    drawn = torch.stack([source.read(index, generator(seed))[0] for seed in range(n)]) / 0.18215
    towards = ((drawn.mean(0) - mean) * (mirrored - mean)).sum() / (mirrored - mean).square().sum()
    assert 0.3 < towards < 0.7  # 0 without mirror images, 1 with nothing else


def test_every_epoch_draws_anew_and_reproducibly(folder):
    source, settings = Latents(folder), {"seed": 0, "batch": 11}
    first, second = (next(stream_batches(source, start=start, **settings)) for start in (0, 11))
    places = [first.indices.tolist().index(index) for index in second.indices.tolist()]
    assert (first.x[places] - second.x).abs().flatten(1).max(1).values.min() > 1e-3
    assert torch.equal(first.x, next(stream_batches(source, start=0, **settings)).x)
    assert torch.equal(first.y[places], second.y)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_read_the_same(folder, workers):
    source, settings = Latents(folder), {"seed": 0, "start": 3, "batch": 5}
    source.read(0, generator(0))  # a file is open
    alone, split = stream_batches(source, **settings), stream_batches(source, workers=workers, **settings)
    for _ in range(4):
        assert torch.equal(next(alone).x, next(split).x)


def test_it_can_be_pickled(folder):
    source = Latents(folder)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.read(5, generator(1))[0], source.read(5, generator(1))[0])


def test_half_precision_is_read_as_float32(tree, encode, folder):
    half, exact = Latents(encode("--dtype", "fp16", out="half")), Latents(folder)
    z, expected = half.read(4, generator(0))[0], exact.read(4, generator(0))[0]
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, expected, atol=2e-3, rtol=2e-3)
    assert not torch.equal(z, expected)


def test_open_data_and_identity(tree, folder, other_vae, encode):
    source = open_data(str(folder), 12, flip=False)
    identity = source.identity
    assert isinstance(source, Latents) and not source.flip and source.classes == ["ant", "bee", "cat"]
    assert json.loads(json.dumps(identity)) == identity
    assert identity["kind"] == "latents" and identity["count"] == 11 and identity["vae"] == "tiny"
    assert identity["data"]["image_size"] == 12
    assert open_data(str(encode(out="other", vae=other_vae)), flip=False).identity != identity
    with pytest.raises(DataError, match="image_size of .*out must be 12, got 256"):
        open_data(str(folder), 256)
    with pytest.raises(DataError, match="takes flip and image_size, got channels"):
        open_data(str(folder), channels=1)


@pytest.mark.parametrize(
    "name, value",
    [
        ("shape", -1),
        ("shape", [4, 6, 2**40]),
        ("classes", {}),
        ("count", float("inf")),
        ("count", 12),
        ("scale", float("nan")),
        ("shift", ["x"]),
        ("image_size", []),
        ("shards", [{"file": "/dev/zero", "count": 11}]),
        ("shards", [{"file": "latents-00000.safetensors", "count": -1}]),
        ("unreadable", 4),
    ],
)
def test_a_field_that_encode_does_not_write(folder, name, value):
    change(folder, **{name: value})
    with pytest.raises(DataError, match=f"latents.json is damaged: {name} must be "):
        Latents(folder)


def test_a_missing_shard(folder):
    (folder / "latents-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"latents-00001\.safetensors is missing: encode again"):
        Latents(folder)


@pytest.mark.parametrize("length", [-1, -1000, 20, 0])
def test_a_truncated_shard(folder, length):
    path = folder / "latents-00001.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"latents-00001\.safetensors is damaged: delete it"):
        Latents(folder)


def test_a_shard_of_another_size(folder):
    path = folder / "latents-00001.safetensors"
    save_file({name: value[:3].clone() for name, value in load_file(path).items()}, path)
    with pytest.raises(DataError, match=r"latents-00001\.safetensors is damaged: .*\[3, 4, 6, 6\]"):
        Latents(folder)


def test_another_format(folder):
    change(folder, format=2)
    with pytest.raises(DataError, match=r"latents\.json has format 2, but this version of ditfast reads 1"):
        Latents(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "7"])
def test_a_broken_index(folder, content):
    (folder / "latents.json").write_text(content)
    with pytest.raises(DataError, match=r"latents\.json cannot be read: "):
        Latents(folder)


def test_an_incomplete_index(folder):
    (folder / "latents.json").write_text('{"format": 1, "shape": [4, 6, 6]}')
    with pytest.raises(DataError, match=r"latents\.json lacks vae, .*shards: encode again"):
        Latents(folder)


def test_an_unrelated_folder(tmp_path):
    with pytest.raises(DataError, match=r"contains no latents\.json"):
        Latents(tmp_path)


def test_a_shard_that_disappears_during_use(folder):
    source = pickle.loads(pickle.dumps(Latents(folder)))  # as in a worker: no file is open
    (folder / "latents-00001.safetensors").unlink()
    with pytest.raises(Unreadable, match=r"latents-00001\.safetensors cannot be read: .") as raised:
        source.read(5, generator(0))
    assert "\n" not in str(raised.value)
    settings = {"seed": 0, "start": 0, "batch": 11, "unreadable": "skip"}
    batch = next(stream_batches(source, **settings))
    assert not set(batch.indices.tolist()) & {4, 5, 6, 7} and len(batch.skipped) == 4 + 3 + 2 + 1


def damage(folder, name, older=False):
    """Change one element of a tensor in the second shard's file, and nothing else."""
    path = folder / "latents-00001.safetensors"
    held = load_file(path)
    if older:
        held.pop("checksums")
    held[name][(2,) * min(1, held[name].ndim) + (0,) * (held[name].ndim - 1)] += 7
    save_file(held, path)


@pytest.mark.parametrize(("name", "flips"), [("mean", [False]), ("std_flip", [True]), ("labels", [False, True])])
def test_a_damaged_latent_is_noticed_when_read(folder, name, flips):
    damage(folder, name)
    source, seeds = Latents(folder), {False: 0, True: 1}  # seeds whose first draw is this flip
    for seed in range(20):
        seeds[bool(torch.rand((), generator=generator(seed)) < 0.5)] = seed
    for flip, seed in seeds.items():
        if flip not in flips:
            source.read(6, generator(seed))
            continue
        with pytest.raises(Unreadable, match=r"image 2 in .*latents-00001\.safetensors is damaged: delete the file"):
            source.read(6, generator(seed))
    source.read(5, generator(0))
    assert len(next(stream_batches(source, seed=0, start=0, batch=11, unreadable="skip")).skipped) <= 1


def test_a_label_outside_the_classes(folder):
    damage(folder, "labels", older=True)
    with pytest.raises(
        DataError, match=r"the label of image 2 in .*latents-00001\.safetensors must be in \[0, 2\], got"
    ):
        Latents(folder).read(6, generator(0))


def test_shards_of_older_versions_have_no_checksums(folder):
    expected = Latents(folder).read(6, generator(0))[0]
    damage(folder, "labels", older=True)
    path = folder / "latents-00001.safetensors"
    held = load_file(path)
    held["labels"][2] -= 7
    save_file(held, path)
    assert torch.equal(Latents(folder).read(6, generator(0))[0], expected)


def test_a_shard_with_another_tensor(folder):
    path = folder / "latents-00001.safetensors"
    held = load_file(path)
    held["checksumz"] = held.pop("checksums")
    save_file(held, path)
    with pytest.raises(DataError, match=r"latents-00001\.safetensors is damaged: .*checksumz"):
        Latents(folder)
