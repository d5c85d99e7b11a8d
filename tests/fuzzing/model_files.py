"""Files of weights and folders of runs: truncated, changed, too large, or something else."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from fuzzing.case import Case


def make_case(rng, kit) -> Case:
    return rng.choice((_safetensors, _safetensors, _pickle, _pickle, _bytes, _bytes, _run_folder, _run_folder))(
        rng, kit
    )


def _load(path, **known):
    from ditfast import DiT

    def run():
        model = DiT.from_pretrained(path, **known).float()
        with torch.no_grad():
            model(torch.zeros(1, 3, 8, 8), torch.tensor([1]), torch.tensor([1]))

    return run


def _spoil(rng, state: dict):
    """Change one tensor of a state dict in place; return what was done, and whether the result is bad."""
    name = rng.choice([*state])
    value = state[name]
    kind = rng.choice(
        ("missing", "another", "shape", "ints", "complex", "half", "float8", "empty", "expanded", "nothing")
    )
    if kind == "missing":
        del state[name]
    elif kind == "another":
        state["more." + name] = value
    elif kind == "shape":
        state[name] = torch.cat([value, value])
    elif kind in ("ints", "complex", "half", "float8"):
        state[name] = value.to(
            getattr(torch, {"ints": "int32", "complex": "complex64", "half": "half"}.get(kind, "float8_e4m3fn"))
        )
    elif kind == "empty":
        state[name] = value.new_zeros(0)
    elif kind == "expanded":
        state[name] = value.flatten()[:1].expand(10**9)
    bad = {"nothing": False, "half": None, "float8": None}.get(kind, True)
    return f"{name}: {kind}", bad, name


def _safetensors(rng, kit):
    """A model's folder with changed tensors or a changed header."""
    from safetensors.torch import load_file, save_file

    folder = kit.copy("model")
    path = folder / "model.safetensors"
    if rng.random() < 0.5:
        state = load_file(path)
        what, bad, name = _spoil(rng, state)
        save_file(
            {k: v.contiguous().clone() if v.numel() < 10**6 else v[:99].clone() for k, v in state.items()}, path
        )
        return Case(f"model.safetensors: {what}", _load(folder), bad, (name, "model.safetensors"))
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([each for each in header if each != "__metadata__"])
    field, value = rng.choice([
        ("shape", [10**9, 10**9]), ("shape", [2**63, 2]), ("shape", [-1, 4]), ("shape", "x"), ("dtype", "F1000"),
        ("dtype", "I64"), ("data_offsets", [0, 10**12]), ("data_offsets", [10, 0]), ("data_offsets", []),
        ("shape", None),
    ])  # fmt: skip
    header[name][field] = value
    text = json.dumps(header).encode()
    size = rng.choice([len(text), 2**63, 2**32, 0, len(text) + 9999]) if rng.random() < 0.3 else len(text)
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return Case(f"a header of safetensors: {name} {field}={value}, {size}", _load(folder), True, "model.safetensors")


class _Call:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _pickle(rng, kit):
    """Files from torch.save: state dicts, training checkpoints, other objects, code."""
    state = torch.load(kit.path("model.pt"), weights_only=True)
    what, bad, name = _spoil(rng, state)
    content, wrapping = state, rng.choice(("bare", "bare", "ema", "model", "other"))
    if wrapping in ("ema", "model"):
        content = {wrapping: state, "opt": {}, "step": 4}
    elif wrapping == "other":
        what, bad, name = "nothing", True, "model.pt"
        deep = []
        for _ in range(5000):
            deep = [deep]
        content = rng.choice([None, 4, [], {}, [state], {"ema": 3}, {4: state}, "x", torch.zeros(3),
                              {"state_dict": state},
                              {"ema": {}}, {"ema": {"a": 1}}, deep, _Call(), {"ema": _Call()}])  # fmt: skip
    try:
        torch.save(content, "model.pt")
    except RecursionError:
        Path("model.pt").write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    if what.startswith("y_embedder") and what.endswith("shape"):
        bad = None  # a model with more classes
    load = _load("model.pt", num_heads=2)

    def run():
        try:
            load()
        finally:
            assert not Path("executed").exists(), "a file's code was run"

    return Case(f"model.pt, {wrapping}: {what}", run, bad, (name, "model.pt", "weights"))


def _bytes(rng, kit):
    """Any file of weights, truncated or with changed bytes; archives that unpack to more than fits."""
    name = rng.choice(("model/model.safetensors", "model.pt", "model.pt"))
    known = {} if name.startswith("model/") else {"num_heads": 2}
    target = kit.copy("model") if name.startswith("model/") else kit.copy("model.pt")
    path = Path(name)
    content, bad, kind = bytearray(path.read_bytes()), None, rng.choice(("cut", "bytes", "pickle", "zip", "special"))
    if kind == "cut":
        del content[rng.randrange(len(content)) :]
        bad = True
    elif kind == "bytes":
        for _ in range(rng.randrange(1, 30)):
            content[rng.randrange(len(content) if rng.random() < 0.5 else 2000)] = rng.randrange(256)
    elif kind == "pickle":
        content, bad = pickle.dumps(rng.choice([None, {"a": 1}, [1] * 99, _Call()]), rng.choice((0, 2, 4))), True
    elif kind == "zip":
        content, bad = _bomb(Path(kit.path("model.pt")), rng), True
    elif kind == "special":
        path.unlink()
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/proc/self/mem", "nothing", path.name)))
        return Case(f"{name} is a link to {os.readlink(path)}", _load(target, **known), True, ("model", "no file"))
    path.write_bytes(content)
    return Case(f"{name}: {kind}, {len(content)} bytes", _load(target, **known), bad, ("model", "weights"))


def _bomb(path, rng):
    """A checkpoint with a member of 4 GiB of zeros, deflated to about 4 MB; smaller ones to save time."""
    file = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        victim = rng.choice([name for name in names if name.endswith((".pkl", "/0"))])
        for name in names:
            new.writestr(name, bytes(1 << 26) if name == victim else old.read(name))
    content = file.getvalue()
    claim = struct.pack("<I", 0xFFFFFFF0)  # nearly 4 GiB, in the directory
    place = content.rindex(victim.encode()) - 46
    return content[: place + 24] + claim + content[place + 28 :]


def _run_folder(rng, kit):
    """A run with two checkpoints and broken files: the older one is used, or none if both are broken."""
    folder = kit.copy("run")
    newer, older = (folder / "checkpoints" / f"step-0000000{i}" for i in (2, 1))
    both = rng.random() < 0.3
    done = [_break_file(rng, each) for each in ((newer, older) if both else (newer,))]
    bad = True if both and all(done) else (None if not all(done) else False)

    def run():
        from ditfast.export import export
        from ditfast.training.checkpoint import checkpoint_at

        found = checkpoint_at(folder)
        assert all(done) is False or found.name == "step-00000001", f"{found} is broken"
        export(found, Path("exported"))

    return Case(f"a run: {done}", run, bad, ("checkpoints", "whole"))


def _break_file(rng, checkpoint):
    """Break a file and return what was done, or an empty string if the file looks unchanged."""
    path = rng.choice([path for path in sorted(checkpoint.iterdir()) if path.name != "checkpoint.json"])
    kind, content = rng.choice(("missing", "cut", "byte", "folder", "device")), bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "byte":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/null")
    return f"{path.name} {kind}"
