"""A folder of class folders."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast.data import DataError, Unreadable, open_data
from ditfast.data.folder import Images
from ditfast.data.image_files import decode_image
from ditfast.data.preprocess import center_crop, to_tensor
from ditfast.data.stream import stream_batches


def save(path, seed, width=12, height=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


FILES = ("ant/b.png", "ant/deep/er/a.JPEG", "ant/a.png", "zebra/é 1.webp", "bee/2.bmp", "bee/10.png", "bee/1.jpg")
ORDER = ("ant/a.png", "ant/b.png", "ant/deep/er/a.JPEG", "bee/1.jpg", "bee/10.png", "bee/2.bmp", "zebra/é 1.webp")
LABELS = [0, 0, 0, 1, 1, 1, 2]


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    for seed, name in enumerate(FILES):
        save(folder / name, seed)
    for passed_over in ("ant/notes.txt", "ant/._a.png", ".cache/x.png", "labels.csv"):
        (folder / passed_over).parent.mkdir(exist_ok=True)
        (folder / passed_over).write_text("no image")
    return folder


def test_classes_and_files_are_in_order(tree):
    images = Images(tree, 8)
    assert images.classes == ["ant", "bee", "zebra"] and images.num_classes == 3 and images.count == 7
    assert [str(images.path(i).relative_to(tree)) for i in range(7)] == list(ORDER)
    assert [images.read(i, torch.Generator())[1] for i in range(7)] == LABELS


def test_classes_are_in_the_order_of_imagefolder(tmp_path):
    """By code point: not by number, nor by a language's alphabet."""
    for seed, name in enumerate(("2", "10", "1", "é", "b", "B", "_", "a b")):
        save(tmp_path / name / "x.png", seed)
    (tmp_path / ".hidden").mkdir()
    assert Images(tmp_path, 8).classes == ["1", "10", "2", "B", "_", "a b", "b", "é"]


def test_an_elongated_image_has_no_square_crop(tree):
    """Scaled, its long side would be a thousand times the sample's."""
    for height in (3000, 3001):
        save(tree / "ant/a.png", 0, 3, height)
        images = Images(tree, 6)
        if height == 3000:
            assert images.read(0, torch.Generator())[0].shape == (3, 6, 6)
    with pytest.raises(Unreadable, match=r"ant/a\.png is too elongated to crop to a square: 3 x 3001"):
        images.read(0, torch.Generator())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_is_the_cropped_image(tree, channels):
    images = Images(tree, 6, channels=channels, flip=False)
    assert images.shape == (channels, 6, 6)
    for index in range(7):
        x, _ = images.read(index, None)
        assert x.dtype == torch.float32 and x.shape == images.shape
        assert torch.equal(x, to_tensor(center_crop(decode_image(tree / ORDER[index], channels), 6)))


def test_half_of_the_images_are_mirrored(tree):
    plain = Images(tree, 6, flip=False).read(3, None)[0]
    images, mirrored = Images(tree, 6), 0
    for seed in range(200):
        x, _ = images.read(3, torch.Generator().manual_seed(seed))
        assert torch.equal(x, plain) or torch.equal(x, plain.flip(2))
        mirrored += int(torch.equal(x, plain.flip(2)))
        assert torch.equal(x, images.read(3, torch.Generator().manual_seed(seed))[0])
    assert 65 < mirrored < 135  # 5 standard deviations


def test_identity_depends_on_the_names(tree):
    images = Images(tree, 8)
    identity = images.identity
    assert json.loads(json.dumps(identity)) == identity == Images(str(tree), 8).identity
    assert identity["count"] == 7 and identity["classes"] == 3 and identity["image_size"] == 8
    assert Images(tree, 9).identity != identity != Images(tree, 8, flip=False).identity
    (tree / "bee").rename(tree / "wasp")
    renamed = Images(tree, 8).identity
    assert renamed["class_names"] != identity["class_names"]
    (tree / "wasp/2.bmp").rename(tree / "zebra/2.bmp")
    moved = Images(tree, 8).identity
    assert moved["class_names"] == renamed["class_names"] and moved["file_names"] != renamed["file_names"]


def test_identity_does_not_depend_on_the_location(tree):
    before = Images(tree, 8).identity
    assert Images(tree.rename(tree.with_name("moved")), 8).identity == before


def test_it_is_small_for_many_images(tmp_path, monkeypatch):
    """Workers receive the names as a single object."""
    save(tmp_path / "tree/a/x.png", 0)
    many = [b"n01440764_%05d.JPEG" % i for i in range(20_000)]
    monkeypatch.setattr("ditfast.data.folder.image_names", lambda folder: iter(many))
    images = Images(tmp_path / "tree", 8)
    assert images.path(19_999).name == "n01440764_19999.JPEG" and images.path(0).name == "n01440764_00000.JPEG"
    assert len(pickle.dumps(images)) < 20_000 * (20 + 8) + 2000


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_in_the_stream(tree, workers):
    path = tree / "bee/10.png"
    path.write_bytes(path.read_bytes()[:200])
    settings = {"seed": 0, "start": 0, "batch": 7, "workers": workers}
    with pytest.raises(Unreadable, match=r"bee/10\.png cannot be read: "):
        next(stream_batches(Images(tree, 8), **settings))
    batch = next(stream_batches(Images(tree, 8), unreadable="skip", **settings))
    assert len(batch.skipped) == 1 and str(path) in batch.skipped[0]
    assert sorted(batch.indices.tolist()) == [0, 1, 2, 3, 5, 5, 6]


def test_open_data(tree):
    images = open_data(str(tree), 8, channels=1, flip=False)
    assert isinstance(images, Images) and images.shape == (1, 8, 8) and not images.flip
    with pytest.raises(DataError, match="takes channels and flip and image_size, got mirror"):
        open_data(str(tree), 8, mirror=True)
    with pytest.raises(DataError, match="image_size of a folder of images must be at least 1, got None"):
        open_data(str(tree))
    with pytest.raises(DataError, match=r"or a folder .*, got '.*nowhere'"):
        open_data(tree / "nowhere", 8)


@pytest.mark.parametrize("size", [0, -8, 8.0])
def test_a_bad_size(tree, size):
    with pytest.raises(DataError, match=f"must be at least 1, got {size}"):
        Images(tree, size)


def test_bad_channels(tree):
    with pytest.raises(DataError, match="channels must be 1 or 3, got 4"):
        Images(tree, 8, channels=4)


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match="folder must be a folder of images, got '.*nowhere'"):
        Images(tmp_path / "nowhere", 8)


def test_no_class_folders(tmp_path):
    save(tmp_path / "flat/a.png", 0)
    with pytest.raises(DataError, match="flat contains no class folders: images must be in .*<class>"):
        Images(tmp_path / "flat", 8)


def test_images_next_to_class_folders(tree):
    save(tree / "stray.png", 0)
    with pytest.raises(DataError, match=r"an image outside the class folders: stray\.png"):
        Images(tree, 8)


def test_an_empty_class_folder_is_named(tree):
    (tree / "cat/deep").mkdir(parents=True)
    (tree / "cat/deep/readme.txt").write_text("")
    with pytest.raises(DataError, match="cat contains no images"):
        Images(tree, 8)


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_links_are_followed_but_not_in_cycles(tree):
    os.symlink(tree / "bee", tree / "linked")
    images = Images(tree, 8)
    assert images.classes[2] == "linked" and images.count == 10
    os.symlink(tree / "ant", tree / "ant/again")
    with pytest.raises(DataError, match="again cannot be read: [^\n]*links"):
        Images(tree, 8)
