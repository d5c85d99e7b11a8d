"""Command lines: a good one for each command, in most cases with one bad option."""

import os
import sys
from typing import NamedTuple

from fuzzing.case import Case
from fuzzing.kit import RUN

HUGE, LONG = "99999999999999999999", "x" * 300
NO_COUNT = ("0", "-1", "x", "1.5", "nan", "", "-" + HUGE)  # for an integer of at least 1
NO_NUMBER = ("nan", "-1", "x", "", "1,5", "-inf")
NO_PATH = ("nowhere", "/dev/null/x", LONG, "nowhere/" + LONG, "x" * 5000)
NO_FOLDER = (*NO_PATH, "file.txt", "/dev/null", "/dev/zero")


class Command(NamedTuple):
    base: dict[str, str | None]  # options and values; None for a flag; positional arguments have names, too
    good: dict[str, tuple]  # other good values
    bad: dict[str, tuple]  # bad values


RANKS = {"WORLD_SIZE": ("x", "0", "-1", "1.5"), "RANK": ("x", "-1", "1"), "LOCAL_RANK": ("x", "-1")}

COMMANDS = {
    "sample": Command(
        {"--ckpt": "{model}", "--decoder": "pixel", "--steps": "1", "--num-samples": "2", "--out": "out"},
        {
            "--steps": ("2", "3"),
            "--batch": ("1", HUGE),
            "--seed": ("0", "7", str(2**32 - 2)),
            "--cfg": ("1", "1.5"),
            "--cfg-interval": ("0 1", "0.5 0.5"),
            "--cfg-channels": ("1", "3"),
            "--dtype": ("bf16", "fp32"),
            "--grid": ("grid.png",),
            "--grid-columns": ("1", HUGE),
            "--grid-scale": ("1", "4"),
            "--npz": ("all.npz",),
            "--noise-schedule": ("linear",),
            "--image-size": ("8",),
            "--overwrite": (None,),
            "--out": ("deep/out", "ünï", "with space"),
        },
        {
            "--steps": (*NO_COUNT, "1001", HUGE),
            "--num-samples": (*NO_COUNT, "4000000000", HUGE),
            "--batch": NO_COUNT,
            "--seed": ("-1", str(2**32), str(2**64), HUGE, "x", "1.5"),
            "--seeds": ("1", "1 2 3", "-1 2", f"1 {2**32}", "x y"),
            "--sampler": ("", "dpm", "x" * 300, "DDIMSchedule", "FlowMatchEulerDiscreteScheduler", "../ddim", "ode"),
            "--noise-schedule": ("cosine", "", "squaredcos_cap_v2"),
            "--objective": ("x", "", "flow", "meanflow"),
            "--time-shift": (*NO_NUMBER, "0", "2"),
            "--cfg": (*NO_NUMBER, "0.99", "inf", "1e999"),
            "--cfg-interval": ("1 0", "-1 1", "0 nan", "0", "x y"),
            "--cfg-channels": (*NO_COUNT, "4", HUGE),
            "--dtype": ("fp64", ""),
            "--image-size": (*NO_COUNT, "7", "16", "1000000000", HUGE),
            "--sampling-method": ("", "rk4", LONG),
            "--atol": (*NO_NUMBER, "1"),
            "--diffusion-form": ("", "sigma"),
            "--last-step": ("", "None", "Mean"),
            "--last-step-size": (*NO_NUMBER, "0.1"),
            "--decoder": ("none", "vae"),
            "--vae": (),
            "--ckpt": (*NO_PATH, "{images}", "{samples.npz}", "{pictures}/0.png", "/dev/zero", "{run}"),
            "--out": (
                "file.txt",
                "file.txt/x",
                LONG,
                "deep/" + LONG,
                "x" * 5000,
                "/dev/null",
                "/proc/nothing",
                "{images}",
            ),
            "--grid": ("nowhere/x.png", ".", LONG, "/dev/null/x.png", "file.txt"),
            "--gif": ("nowhere/x.gif", ".", LONG, "/dev/null/x.gif", "file.txt", "fine.gif"),  # of one step
            "--grid-columns": NO_COUNT,
            "--grid-scale": (*NO_COUNT, "1000000", HUGE),
            "--npz": ("nowhere/x.npz", ".", LONG, "file.txt", "/dev/null/x"),
            "--nothing": ("1",),
            **RANKS,
        },
    ),
    "train": Command(
        {**dict(zip(RUN.split()[::2], RUN.split()[1::2], strict=True)), "--steps": "1", "--out": "out"},
        {
            "--seed": ("0", str(2**63)),
            "--lr": ("0", "1e-3"),
            "--ema": ("0", "0.5"),
            "--clip": ("1", "1e30"),
            "--warmup": ("0", HUGE),
            "--keep": ("1", HUGE),
            "--save-every": ("1", HUGE),
            "--conditioning": ("adaln", "in_context", "cross_attention"),
            "--resume": ("auto",),
            "--objective": ("diffusion", "flow", "meanflow"),
            "--dry-run": (None,),
            "--no-learn-sigma": (None,),
            "--recompute-mlp": (None,),
            "--backend": ("reference", "auto"),
        },
        {
            "--data": (*NO_FOLDER, "", "digts", "{pictures}"),
            "--image-size": ("9", *NO_COUNT, HUGE),
            "--vae": NO_FOLDER,
            "--num-classes": ("0", "9", "-1", "x"),
            "--workers": ("-1", "x", "1000000", HUGE),
            "--unreadable": ("x", ""),
            "--model": ("DiT-XL/3", "", "XL", LONG),
            "--depth": (*NO_COUNT, "1000000000", HUGE),
            "--hidden-size": (*NO_COUNT, "25", "26", "1000000000", "1200000000000", HUGE),
            "--num-heads": (*NO_COUNT, "5", HUGE),
            "--patch-size": (*NO_COUNT, "3", "16", HUGE),
            "--conditioning": ("adaln-zero", ""),
            "--label-drop": (*NO_NUMBER, "1", "1.5"),
            "--noise-schedule": ("cosine",),
            "--objective": ("x", ""),
            "--path-type": ("linear", ""),
            "--prediction": ("x", ""),
            "--time-sampling": ("normal", ""),
            "--time-std": (*NO_NUMBER, "1000"),
            "--time-shift": (*NO_NUMBER, "0"),
            "--interval-ratio": (*NO_NUMBER, "1.5"),
            "--adaptive-power": (*NO_NUMBER, "inf"),
            "--target-cfg": (*NO_NUMBER, "inf"),
            "--target-mix": (*NO_NUMBER, "1"),
            "--target-from": (*NO_NUMBER, "1.5"),
            "--steps": NO_COUNT,
            "--batch": (*NO_COUNT, "1000000000000", HUGE),
            "--accumulate": (*NO_COUNT, "3", HUGE),
            "--lr": (*NO_NUMBER, "inf"),
            "--warmup": ("-1", "x"),
            "--weight-decay": (*NO_NUMBER, "inf"),
            "--clip": (*NO_NUMBER, "0", "inf"),
            "--ema": (*NO_NUMBER, "1", "1.1"),
            "--seed": ("-1", "x", str(2**64), "1" + "0" * 30),
            "--precision": ("fp16", ""),
            "--parallel": ("fsdp", "x"),
            "--checkpointing": ("half",),
            "--backend": ("zzz", "", "cuda", "triton"),
            "--out": ("file.txt", "file.txt/x", LONG, "deep/" + LONG, "x" * 5000, "/dev/null", "/proc/nothing"),
            "--resume": ("nowhere", LONG, "{images}", "x" * 5000),
            "--save-every": NO_COUNT,
            "--keep": NO_COUNT,
            "--log-every": NO_COUNT,
            "--sample-every": ("-1", "x"),
            "--sample-steps": (*NO_COUNT, "1001"),
            "--cfg": (*NO_NUMBER, "0.5", "inf"),
            "--on-nonfinite": ("x",),
            "--config": (*NO_FOLDER, "{model}/model.safetensors", "{images}"),
            "--nothing": ("1",),
            **RANKS,
        },
    ),
    "encode": Command(
        {"--data": "{images}", "--vae": "{vae}", "--image-size": "8", "--workers": "0", "--out": "out"},
        {
            "--batch": ("1", HUGE),
            "--shard-size": ("1", "4", HUGE),
            "--dtype": ("fp16",),
            "--overwrite": (None,),
            "--unreadable": ("skip",),
        },
        {
            "--data": (*NO_FOLDER, "{pictures}", "{model}"),
            "--vae": (*NO_FOLDER, "{images}", "{model}"),
            "--image-size": (*NO_COUNT, "7", "1000000000", HUGE),
            "--batch": NO_COUNT,
            "--shard-size": NO_COUNT,
            "--dtype": ("bf16", ""),
            "--workers": ("-1", "x", "1000000", HUGE),
            "--unreadable": ("x",),
            "--out": ("file.txt", "file.txt/x", LONG, "x" * 5000, "/dev/null", "/proc/nothing", "{images}"),
            **RANKS,
        },
    ),
    "evaluate": Command(
        {"--samples": "{pictures}", "--reference": "{samples}", "--features": "fuzzing.kit:features"},
        {
            "--num-samples": ("4",),  # from which precision takes neighbors
            "--batch": ("1", HUGE),
            "--metrics": ("fid", "fid precision"),
            "--json": (None,),
            "--reference": ("{samples.npz}", "{statistics.npz}"),
            "--samples": ("{samples.npz}",),
        },
        {
            "--samples": (*NO_FOLDER, "{vae}", "{model.pt}", "{statistics.npz}/x"),
            "--reference": (*NO_FOLDER, "{vae}", "{model.pt}", "{model}"),
            "--features": ("nowhere:fn", "os:nothing", "a:b:c", "{model.pt}", "{model}", "os:sep", LONG, "x" * 5000),
            "--metrics": ("fod", "is", "sfid", ""),
            "--num-samples": (*NO_COUNT, "1", "5", HUGE),
            "--batch": NO_COUNT,
            "--device": ("", "zzz", "cuda", "cuda:99", "meta", "cpu:x", "x" * 300),
            "--save-stats": ("file.txt", "nowhere/x.npz", LONG, ".", "/dev/null"),
            "--inception": ("nowhere", "{model.pt}"),
            "--ckpt": ("{model}",),
            "--nothing": ("1",),
            "WORLD_SIZE": ("x", "2"),
        },
    ),
    "export": Command(
        {"checkpoint": "{run}", "folder": "out"},
        {"--weights": ("ema", "model"), "--overwrite": (None,), "checkpoint": ("{run}/checkpoints",)},
        {
            "checkpoint": (*NO_FOLDER, "{images}", "{model}"),
            "folder": ("file.txt", "file.txt/x", "{model}", LONG, "x" * 5000, "/dev/null", "/proc/nothing"),
            "--weights": ("x", "", "last"),
        },
    ),
    "doctor": Command({}, {"--json": (None,)}, {"--nothing": ("1",), "--verify": ("--json",), "x": ("x",)}),
}
POSITIONAL = ("checkpoint", "folder", "x")
SAYS = {  # refusals that name something else
    "--decoder": ("--decoder", "--vae"),
    "checkpoint": "",
    "folder": "",
    "--ckpt": ("--ckpt", "--samples"),
    "--inception": ("--inception", "--features"),
    "--nothing": "--nothing",
    "--hidden-size": ("--hidden-size", "--num-heads", "hidden_size"),
    "--data": ("--data", "data", "image_size"),
    "--image-size": ("--image-size", "image_size", "input_size"),
    "x": "x",
    "--verify": "--verify",
    "--patch-size": ("--patch-size", "patch_size"),
    "--accumulate": ("--accumulate", "accumulate"),
}


def make_case(rng, kit) -> Case:
    name = rng.choices([*COMMANDS], weights=[10, 8, 4, 5, 3, 1])[0]
    command = COMMANDS[name]
    options = dict(command.base)
    for option in rng.sample([*command.good], min(len(command.good), rng.randrange(3))):
        options[option] = rng.choice(command.good[option])
    spoiled = None
    if rng.random() < 0.8:
        spoiled = rng.choice([option for option, values in command.bad.items() if values])
        options[spoiled] = rng.choice(command.bad[spoiled])
        if spoiled in ("--seeds", "--seed"):
            options.pop("--seed" if spoiled == "--seeds" else "--seeds", None)
        if spoiled == "--grid-scale":
            options.setdefault("--grid", "grid.png")
    environment = {each: options.pop(each) for each in RANKS if each in options}
    if spoiled in environment and environment[spoiled] == "1":
        says = ("RANK", "WORLD_SIZE")
    else:
        says = SAYS.get(spoiled, spoiled or "")
    if spoiled and len(options.get(spoiled) or "") > 4:  # a path is just as clear
        says = (*([says] if isinstance(says, str) else says), options[spoiled].strip("{}").split("/")[-1])
    bad = spoiled is not None
    if spoiled in ("--out", "--parallel", "--resume") and "--dry-run" in options:
        bad = None
    if spoiled == "folder":
        options.pop("--overwrite", None)  # the kit must not be overwritten
    line = [word for option, value in _shuffled(rng, options) for word in _words(option, value, kit)]
    what = " ".join([*(f"{k}={v}" for k, v in environment.items()), name, *map(repr, line)])
    return Case(what, lambda: _run(name, line, environment), bad, says, True)


def _shuffled(rng, options):
    """Shuffle the options; positional arguments keep their order."""
    named = [pair for pair in options.items() if pair[0] not in POSITIONAL]
    rng.shuffle(named)
    return [pair for pair in options.items() if pair[0] in POSITIONAL] + named


def _words(option, value, kit):
    several = option in ("--seeds", "--cfg-interval", "--metrics")
    values = [] if value is None else value.split() if several and value else [value]
    values = [kit.path(v[1:].replace("}", "")) if v.startswith("{") else v for v in values]
    return values if option in POSITIONAL else [option, *values]


def _run(name, line, environment):
    from importlib import import_module

    open("file.txt", "w").close()
    os.environ.update(environment)
    main = import_module(f"ditfast.{name}").main
    if name != "doctor":
        return main(line)
    sys.argv = ["doctor", *line]
    main()
