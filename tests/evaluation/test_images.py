"""The extractor's input: the files' pixels, in order, and not all at once."""

import os
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast.evaluation import EvaluationError
from ditfast.evaluation.features import load_extractor
from ditfast.evaluation.images import evenly_spaced, open_images, read_batches


def formula(i, height=6, width=10):
    """The images of preprocessing.json."""
    row, column, channel = np.ogrid[:height, :width, :3]
    return ((31 * i + 7 * row * (i + 1) + 13 * column + 50 * channel * (row + 1)) % 256).astype(np.uint8)


def features(data, images):
    extractor = load_extractor(data["waves"], None, "cpu")
    numbers = range(images.count)
    return torch.cat([extractor(batch)["features"] for batch in read_batches(images, numbers, 2)]).numpy()


@pytest.mark.parametrize("kind", ["folder", "nested", "npz", "compressed"])
def test_pixels_reach_the_extractor_unchanged(data, golden, tmp_path, kind):
    images = np.stack([formula(i) for i in range(3)])
    path = tmp_path / "images"
    if kind in ("folder", "nested"):
        for i, name in enumerate(("a.png", "b/0.PNG", "c.png") if kind == "nested" else ("1.png", "2.png", "3.png")):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path / name)
        for passed_over in ("notes.txt", "._1.png", ".thumbnails/2.png"):
            (path / passed_over).parent.mkdir(exist_ok=True)
            (path / passed_over).write_text("no image")
    else:
        path = tmp_path / "images.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(path, labels=np.arange(3), arr_0=images)
    found = open_images("--samples", path)
    assert (found.count, found.size) == (3, (6, 10))
    np.testing.assert_array_equal(np.stack(list(found.read(range(3)))), images)
    np.testing.assert_allclose(features(data, found), golden["rgb"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P"])
def test_other_modes_become_rgb(data, golden, tmp_path, mode):
    for i in range(3):
        grey = Image.fromarray(formula(i)[..., 0])
        image = grey.convert("RGBA" if mode == "RGBA" else mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(40)  # dropped, not blended
        image.save(tmp_path / f"{i}.png")
        assert Image.open(tmp_path / f"{i}.png").mode == mode
    found = features(data, open_images("--samples", tmp_path))
    np.testing.assert_allclose(found, golden["grey"], rtol=1e-4, atol=1e-6)


def test_jpeg_is_read_and_its_orientation_ignored(tmp_path):
    smooth = np.linspace(0, 255, 6 * 10).reshape(6, 10, 1).repeat(3, 2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(smooth).save(tmp_path / "a.JPG", format="JPEG", quality=95, exif=exif)
    (found,) = open_images("--samples", tmp_path).read([0])
    assert found.shape == (6, 10, 3) and np.abs(found.astype(int) - smooth).max() < 12


@pytest.mark.parametrize("kind", ["real", "real.npz"])
def test_numbers_choose_images(data, kind):
    images = open_images("--samples", data[kind])
    everything = np.stack(list(images.read(range(40))))
    for size, numbers in ((3, [0, 5, 6, 30, 39]), (4, range(8)), (100, range(40))):
        found = list(read_batches(images, numbers, size))
        assert all(len(batch) == size for batch in found[:-1]) and 0 < len(found[-1]) <= size
        expected = everything[list(numbers)].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(torch.cat(found).numpy(), expected)


def test_spread_is_even_and_complete():
    assert evenly_spaced(5, 9) == [0, 1, 2, 3, 4] and evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert len(set(evenly_spaced(1_281_167, 10_000))) == 10_000


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_never_entirely_in_memory(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (400, 64, 64, 3), dtype=np.uint8)
    save(tmp_path / "i.npz", arr_0=images)
    tracemalloc.start()
    try:
        total = sum(
            int(batch.sum()) for batch in read_batches(open_images("--samples", tmp_path / "i.npz"), range(400), 8)
        )
        assert tracemalloc.get_traced_memory()[1] < images.nbytes / 5
    finally:
        tracemalloc.stop()
    assert total == images.sum(dtype=np.int64)


def refused(path, read=False):
    with pytest.raises(EvaluationError) as error:
        images = open_images("--samples", path)
        if read:
            list(images.read(range(images.count)))
    return str(error.value)


def test_invalid_folders(tmp_path, data):
    assert "nowhere does not exist" in refused(tmp_path / "nowhere")
    assert "contains no images (.bmp, .jpeg, .jpg, .pgm, .png, " in refused(tmp_path)
    Image.fromarray(formula(0)).save(tmp_path / "a.png")
    Image.fromarray(formula(0, 5, 7)).save(tmp_path / "b.png")
    message = refused(tmp_path)
    assert "same size, got 10 x 6 in " in message and "a.png and 7 x 5 in " in message and "b.png" in message


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and links")
def test_special_files_are_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    assert refused(tmp_path / "pipe.npz") == f"--samples {tmp_path / 'pipe.npz'} is neither a folder nor a file"
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "folder", tmp_path / "folder/again")
    assert re.search("^--samples: .*again cannot be read: [^\n]*links", refused(tmp_path / "folder"))


def test_invalid_pictures(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"not an image")
    assert "a.png is not an image" in refused(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])  # the header is intact
    assert "a.png cannot be read" in refused(tmp_path, read=True)


def test_invalid_npz_files(tmp_path):
    path = tmp_path / "i.npz"
    np.savez(path, images=np.zeros((2, 3, 3, 3), np.uint8), labels=np.zeros(2))
    assert "has no images, arr_0, only images, labels" in refused(path)
    for array in (np.zeros((2, 3, 3, 3)), np.zeros((2, 3, 3), np.uint8), np.zeros((0, 3, 3, 3), np.uint8)):
        np.savez(path, arr_0=array)
        assert f"arr_0 must be uint8 (N, H, W, 3), got {array.dtype} {array.shape}" in refused(path)
    np.savez(path, arr_0=np.array([{}]))  # pickled data is not read
    assert "arr_0 must be uint8 (N, H, W, 3), got object (1,)" in refused(path)
    np.savez(path, arr_0=np.zeros((20, 8, 8, 3), np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert f"{path} is truncated or not an npz" in refused(path)
    path.write_bytes(whole[:1000] + b"\x01" + whole[1001:])
    assert f"{path} is truncated or not an npz: Bad CRC-32" in refused(path, read=True)
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (2, 3, 3, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(53))
    assert "truncated: arr_0 (2, 3, 3, 3) has 53 bytes" in refused(path)
