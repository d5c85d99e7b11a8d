"""Every config that is read: arguments of `DiT`, config.json, diffusers' config, YAML, the records of folders."""

import json
from pathlib import Path

from fuzzing.case import Case
from fuzzing.kit import MODEL, RUN
from fuzzing.values import DIT_TAKES, HOSTILE, pick, short

BROKEN_JSON = (b"", b"{", b"[]", b"4", b"null", b'"x"', b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000)
BROKEN_YAML = (
    b"\xff\xfe\x00", b"- 4", b"4", b"steps: [", b"steps: !!python/object/apply:os.getcwd []",
    b"[" * 2000, b"{" * 2000,
    b"a: &a [x]\nsteps: *b", b"stepz: 3", b"steps: 1\n---\nsteps: 2", b"3: 4", b"? [a]\n: 1", b"null: 1",
)  # fmt: skip
# names of diffusers' config, and ours
THEIRS = {
    "sample_size": "input_size", "patch_size": "patch_size", "in_channels": "in_channels", "num_layers": "depth",
    "num_attention_heads": "num_heads", "num_embeds_ada_norm": "num_classes", "norm_eps": "norm2_eps",
}  # fmt: skip
TOLD_BY_WEIGHTS = {  # a file's weights fit only this value
    "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_classes": 7,
    "learn_sigma": True, "conditioning": "adaln_zero",
}  # fmt: skip


def make_case(rng, kit) -> Case:
    kinds = (_arguments, _arguments, _config_json, _config_json, _diffusers, _broken, _yaml, _yaml, _latents, _run)
    return rng.choice(kinds)(rng, kit)


def _arguments(rng, kit):
    """One argument of `DiT`, on the CPU or on the meta device."""
    name = rng.choice([*DIT_TAKES])
    value, bad = pick(rng, name)
    device = rng.choice(("cpu", "meta"))

    def run():
        import torch

        from ditfast import DiT

        with torch.device(device):
            DiT(**{**MODEL, name: value})

    return Case(f"DiT({name}={short(value)}) on {device}", run, bad, _names(name))


def _names(name):
    """What an error about an argument may name."""
    others = {"hidden_size": ("num_heads",), "input_size": ("patch_size",), "patch_size": ("input_size",)}
    return (name, *others.get(name, ()))


def _from_pretrained(folder):
    from ditfast import DiT

    return lambda: DiT.from_pretrained(folder)


def _config_json(rng, kit):
    name = rng.choice([*DIT_TAKES, "an_unknown_name"])
    value, bad = pick(rng, name) if name in DIT_TAKES else (1, True)
    folder = kit.copy("model")
    if name in TOLD_BY_WEIGHTS and not bad:
        same = value == TOLD_BY_WEIGHTS[name] or value in ([8, 8], (8, 8))
        bad = None if same and bad is None else not same
    if name == "mlp_ratio" and bad is False:
        bad = int(32 * value) != 128
    if name == "class_dropout_prob" and bad is False:
        bad = value == 0
    if name == "second_time" and bad is False:
        bad = value
    _change(folder / "config.json", name, value)
    says = (*_names(name), "weights do not fit", "config.json")
    return Case(f"config.json: {name}={short(value)}", _from_pretrained(folder), bad, says)


def _diffusers(rng, kit):
    name = rng.choice([*THEIRS, "attention_head_dim", "out_channels", "activation_fn", "dropout"])
    folder = kit.copy("diffusers")
    if name in THEIRS:
        value, bad = pick(rng, THEIRS[name])
        if name in ("norm_eps",):
            pass
        elif name == "num_attention_heads":
            bad = value != 2 if type(value) is int else True
        else:
            bad = type(value) is not int or value != TOLD_BY_WEIGHTS[THEIRS[name]]
            bad = None if name == "sample_size" and DIT_TAKES["input_size"](value) else bad
    else:
        value = rng.choice(HOSTILE)
        bad = None if name == "dropout" or value is None else True  # 0, False and 0.0 are the same
    _change(folder / "config.json", name, value)
    says = (name, THEIRS.get(name, name), "weights", "config.json", "hidden_size", "num_heads")
    return Case(f"diffusers' config.json: {name}={short(value)}", _from_pretrained(folder), bad, says)


def _broken(rng, kit):
    """A file that should be a JSON object but is not."""
    content = rng.choice(BROKEN_JSON)
    name, file = rng.choice([
        ("model", "config.json"), ("diffusers", "config.json"), ("latents", "latents.json"),
        ("run", "checkpoints/step-00000002/checkpoint.json"),
    ])  # fmt: skip
    folder = kit.copy(name)
    (folder / file).write_bytes(content)
    if name == "run":  # the older one is intact
        return Case(f"{file}: {short(content)}", lambda: _export(folder), False)
    if name == "latents":
        return Case(f"{file}: {short(content)}", lambda: _open_latents(folder), True, file)
    return Case(f"{name}/{file}: {short(content)}", _from_pretrained(folder), True, file)


def _yaml(rng, kit):
    """--config of `ditfast.train`."""
    if rng.random() < 0.3:
        content = rng.choice(BROKEN_YAML)
        Path("run.yaml").write_bytes(content)
        what, bad, says = short(content), True, "--config"
    else:
        name = rng.choice(["steps", "depth", "num_heads", "lr", "ema", "batch", "seed", "learn_sigma", "clip", "out"])
        value = rng.choice(HOSTILE)
        Path("run.yaml").write_text(json.dumps({name: value}))
        what, says = f"{name}: {short(value)}", (f"--{name.replace('_', '-')}", "--config")
        bad = None if name in ("out", "learn_sigma") or _may_be(name, value) else True
    line = [word for word in RUN.split() if word not in ("--depth", "--num-heads", "--batch")]
    line = [
        "--data",
        "digits",
        "--hidden-size",
        "24",
        "--patch-size",
        "2",
        "--sample-every",
        "0",
        "--workers",
        "0",
        "--out",
        "out",
        "--dry-run",
    ]

    def run():
        from ditfast import train

        train.main(["--config", "run.yaml", *line])

    return Case(f"YAML {what}", run, bad, says, True)


def _may_be(name, value):
    if value is None or value == "":  # the default
        return True
    if name in ("lr", "ema", "clip"):
        return value is None or type(value) in (int, float, str)
    low, high = {"seed": (0, 2**64 - 1), "steps": (1, 10**30), "batch": (1, 10**5)}.get(name, (1, 5))
    return value == "8" or type(value) is int and low <= value <= high


def _latents(rng, kit):
    """The index that `ditfast.encode` wrote."""
    folder, name = (
        kit.copy("latents"),
        rng.choice(("shape", "classes", "count", "scale", "image_size", "shards", "format")),
    )
    path = folder / "latents.json"
    whole, value = json.loads(path.read_text())[name], rng.choice(HOSTILE)
    if name == "shards" and rng.random() < 0.7:
        entry = {**whole[0], rng.choice(("file", "count")): value}
        value = [entry, *whole[1:]]
    _change(path, name, value)
    unclear = {"scale": type(value) in (int, float) and abs(value) < 10, "image_size": isinstance(value, int)}
    bad = None if unclear.get(name) or value == whole else True
    return Case(
        f"latents.json: {name}={short(value)}", lambda: _open_latents(folder), bad, ("latents.json", "latents-")
    )


def _open_latents(folder):
    import torch

    from ditfast.data import open_data

    source = open_data(folder)
    for index in range(source.count):
        x, label = source.read(index, torch.Generator().manual_seed(0))
        assert x.isfinite().all() and x.shape == source.shape and 0 <= label < source.num_classes


def _run(rng, kit):
    """checkpoint.json of the newer of two checkpoints: damaged, so that the older is used; or from another run."""
    folder = kit.copy("run")
    path = folder / "checkpoints" / "step-00000002" / "checkpoint.json"
    name, value = rng.choice(("model", "files", "step", "samples", "data", "seed")), rng.choice(HOSTILE)
    whole = json.loads(path.read_text())
    if name == "model":
        field = rng.choice([*DIT_TAKES])
        value = {**whole["model"], field: value}
    _change(path, name, value)
    return Case(f"checkpoint.json: {name}={short(value)}", lambda: _export(folder), None)


def _export(folder):
    from ditfast.export import export
    from ditfast.training.checkpoint import checkpoint_at

    checkpoint = checkpoint_at(folder)
    export(checkpoint, Path("exported"))
    assert checkpoint.name in ("step-00000001", "step-00000002")


def _change(path, name, value):
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
