"""Image files and npz archives, intact and broken, read like training, sampling and evaluation do."""

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from fuzzing.case import Case

FORMATS = ("bmp", "jpg", "png", "ppm", "tif", "webp")


def make_case(rng, kit) -> Case:
    return rng.choice([_broken_file, _broken_file, _odd_file, _no_file, _npz, _resume, _image_folder])(rng, kit)


def _read(path) -> None:
    """Read the image for training and for evaluation: both can read it, or neither."""
    from ditfast.data import Unreadable
    from ditfast.data.folder import Images
    from ditfast.evaluation import EvaluationError
    from ditfast.evaluation.images import open_images

    outcomes = []
    folder = Path(path).parents[1]
    try:
        x, _ = Images(folder, 8).read(0, torch.Generator().manual_seed(0))
        assert x.shape == (3, 8, 8) and x.isfinite().all() and x.abs().max() <= 1
    except Unreadable as error:
        outcomes.append(error)
    try:
        images = open_images("--samples", Path(path).parent)
        for array in images.read(range(images.count)):
            assert array.dtype == np.uint8 and array.shape == (*images.size, 3)
    except EvaluationError as error:
        outcomes.append(error)
    assert len(outcomes) != 1 or "too elongated" in str(outcomes[0]), outcomes
    if outcomes:
        raise outcomes[0]


def _place(name, content: bytes) -> Path:
    path = Path("data", "a", name)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def _broken_file(rng, kit):
    """A good file, truncated, with changed bytes, or with trailing data."""
    ending = rng.choice(FORMATS)
    content = bytearray(Path(kit.path(f"formats/0.{ending}")).read_bytes())
    kind, bad = rng.choice(("whole", "cut", "bytes", "longer", "header")), None
    if kind == "whole":
        bad = False
    elif kind == "cut":
        keep = rng.randrange(len(content))
        bad = True if keep < 0.9 * len(content) - 64 and ending not in ("tif", "bmp") or keep < 4 else None
        del content[keep:]
    elif kind == "bytes":
        for _ in range(rng.randrange(1, 9)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == "longer":
        content += rng.randbytes(rng.randrange(1, 999))
    else:
        content[: rng.randrange(1, 40)] = rng.randbytes(40)
    path = _place(f"0.{ending}", bytes(content))
    return Case(f"{ending}: {kind}, {len(content)} bytes", lambda: _read(path), bad, "0." + ending)


def _png(width, height, depth=8, colour=2, data=b"", compressed=True) -> bytes:
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(data) if compressed else data
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _odd_file(rng, kit):
    """Sizes and depths that a header can claim, and files of other kinds."""
    rows = b"".join(b"\0" + bytes(12) for _ in range(4))
    name, content, bad = rng.choice([
        ("no pixels", _png(0, 4), True),
        ("a bomb", _png(60_000, 60_000), True),
        ("more than there is", _png(2**31 - 1, 2**31 - 1), True),
        ("a long line", _png(30_000, 1, data=b"\0" + bytes(90_000)), True),
        ("too little data", _png(400, 400, data=rows), True),
        ("no depth", _png(4, 4, depth=3, data=rows), True),
        ("no compression", _png(4, 4, data=b"nothing", compressed=False), True),
        ("small", _png(4, 4, data=rows), False),
        ("grey of 16 bits", _png(4, 4, 16, 0, b"".join(b"\0" + bytes(8) for _ in range(4))), False),
        ("text", b"no image", True),
        ("nothing", b"", True),
        ("a PPM of 10^9", b"P6 1000000000 1000000000 255\n" + bytes(99), True),
        ("a PPM of -1", b"P6 -1 -1 255\n" + bytes(99), True),
        ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", True),
    ])  # fmt: skip
    path = _place("0.png", content)
    return Case(f"image: {name}", lambda: _read(path), bad, "0.png")


def _no_file(rng, kit):
    """Something that has an image's name but is not an image."""
    kind = rng.choice(("folder", "pipe", "link to nothing", "circle", "unreadable", "device", "long name"))
    Path("data/a").mkdir(parents=True)
    path = Path("data/a/0.png")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to("nothing")
    elif kind == "circle":
        path.symlink_to("0.png")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "unreadable":
        path.write_bytes(_png(4, 4))
        path.chmod(0)
    else:
        path = Path("data/a", "x" * 240 + ".png")
        path.write_bytes(b"no image")
    bad = None if kind == "unreadable" and os.getuid() == 0 else True
    return Case(f"an image that is a {kind}", lambda: _read(path), bad, ("data/a", "data"))


def _image_folder(rng, kit):
    """Invalid folders of images."""
    from ditfast.data import open_data

    folder, kind = kit.copy("images"), rng.choice(("whole", "beside", "empty class", "no class", "size", "channels"))
    size, options = 8, {}
    if kind == "beside":
        (folder / "0.png").write_bytes(_png(4, 4))
    elif kind == "empty class":
        (folder / "c").mkdir()
    elif kind == "no class":
        folder = Path(kit.path("pictures"))
    elif kind == "size":
        size = rng.choice([0, -1, None, 8.0, "8", True, 10**9, 10**30])
    elif kind == "channels":
        options = {"channels": rng.choice([0, 2, 4, None, "3", [3]])}
    says = {"beside": "0.png", "empty class": "c", "size": "image_size", "channels": "channels"}.get(kind, "pictures")

    def run():
        open_data(folder, size, **options).read(0, torch.Generator())

    return Case(f"a folder of images: {kind} {size} {options}", run, kind != "whole", says)


def _npz(rng, kit):
    """Archives of images and of statistics."""
    name = rng.choice(("samples.npz", "statistics.npz"))
    path = kit.copy(name)
    kind, bad = rng.choice(("whole", "cut", "bytes", "array")), None
    if kind == "whole":
        bad = False
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size - 30)])
        bad = True
    elif kind == "bytes":
        content = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 9)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
    else:
        kind, member, array = _array(rng, name)
        with zipfile.ZipFile(kit.path(name)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for each in old.namelist():
                new.writestr(each, array if each == member else old.read(each))
        bad = True
    option = "--samples" if name == "samples.npz" else "--reference"
    line = [
        "--samples",
        kit.path("pictures"),
        "--reference",
        kit.path("samples"),
        "--features",
        "fuzzing.kit:features",
    ]
    line[line.index(option) + 1] = str(path)

    def run():
        from ditfast import evaluate

        evaluate.main([*line, "--metrics", "fid"])

    return Case(f"{name}: {kind}", run, bad, option, True)


def _array(rng, name):
    """A name, and an array that cannot be this member of an archive."""
    if name == "samples.npz":
        shape = rng.choice([(4, 8, 8), (4, 8, 8, 4), (0, 8, 8, 3), (4, 8, 8, 3, 1), ()])
        claims = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**4, 10**4, 3)}
        return rng.choice([
            (f"shape {shape}", "arr_0.npy", _npy(np.zeros(shape, np.uint8))),
            ("floats", "arr_0.npy", _npy(np.zeros((4, 8, 8, 3)))),
            ("objects", "arr_0.npy", _npy(np.array([{}] * 4), True)),
            ("a claim", "arr_0.npy", _npy_claim(claims)),
            ("no array", "arr_0.npy", b"nothing"),
        ])  # fmt: skip
    member = rng.choice(("mu.npy", "sigma.npy"))
    good = np.zeros(4) if member == "mu.npy" else np.eye(4)
    claims = {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**20)}
    return rng.choice([
        (f"{member} of text", member, _npy(np.full(good.shape, "x"))),
        (f"{member} of nan", member, _npy(good * np.nan)),
        (f"{member} complex", member, _npy(good + 1j)),
        (f"{member} of objects", member, _npy(good.astype(object), True)),
        (f"{member} of booleans", member, _npy(np.full(good.shape, "2020-01-01", "datetime64[D]"))),
        (f"{member} of another size", member, _npy(good[:3])),
        (f"{member}: a claim", member, _npy_claim(claims)),
        (f"{member}: a bomb", member, _npy_claim({**claims, "shape": (2**29,)}) + bytes(2**26)),
        ("count of text", "count.npy", _npy(np.array("many"))),
        ("count of several", "count.npy", _npy(np.array([1, 2]))),
        ("count of -1", "count.npy", _npy(np.array(-1))),
    ])  # fmt: skip


def _npy(array, pickled=False):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=pickled)
    return file.getvalue()


def _npy_claim(header):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _resume(rng, kit):
    """`ditfast.sample` again in a folder with a broken file: images are made anew, settings are refused."""
    folder = kit.copy("samples")
    image = folder / "000002.png"
    whole = image.read_bytes()
    kind = rng.choice(("whole", "missing", "cut", "text", "grey", "size", "settings", "older settings"))
    if kind == "missing":
        image.unlink()
    elif kind == "cut":
        image.write_bytes(whole[: rng.randrange(len(whole) - 20)])
    elif kind == "text":
        image.write_text("mine")
    elif kind == "grey":
        image.write_bytes(_png(8, 8, colour=0, data=b"".join(b"\0" + bytes(8) for _ in range(8))))
    elif kind == "size":
        image.write_bytes(_png(4, 4, data=b"".join(b"\0" + bytes(12) for _ in range(4))))
    elif kind == "settings":
        (folder / "settings.json").write_text(rng.choice(["", "[]", "4", "{", "null", "[" * 100_000, '{"steps": 1}']))
    elif kind == "older settings":
        settings = json.loads((folder / "settings.json").read_text())
        (folder / "settings.json").write_text(json.dumps({**settings, "steps": 7}))
    line = f"--ckpt {kit.path('model')} --decoder pixel --num-samples 4 --steps 1 --cfg 1 --out samples --npz all.npz"

    def run():
        from ditfast import sample

        sample.main([*line.split(), "--grid", "grid.png"])
        assert image.read_bytes() == whole
        assert Path("all.npz").read_bytes() == Path(kit.path("samples.npz")).read_bytes()

    return Case(f"samples: {kind}", run, "settings" in kind, "--out", True)
