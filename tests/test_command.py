"""Arguments of commands, from the shell and from a file, and what commands print."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ditfast.command import Parser, by_option, in_options, option_of, words
from ditfast.counted import counted
from ditfast.entry import command
from ditfast.failure import in_brief

COMMANDS = ["doctor", "encode", "evaluate", "export", "flops", "integrations/hub/__main__", "sample", "train"]


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    given = ["--out=~/runs", "--data", "~/images", "--out=a~/b", "~", "--cfg", "1", "a=~/b", "two\nlines"]
    home = ["--out=/home/ada/runs", "--data", "/home/ada/images", "--out=a~/b", "/home/ada", "--cfg", "1", "a=~/b"]
    assert words(given) == [*home, "two\nlines"]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_takes_its_words_from_there(name):
    folder = Path(__file__).parents[1] / "ditfast"
    source = (folder / f"{name}.py").read_text(encoding="utf-8")
    source += (folder / "sampling/options.py").read_text(encoding="utf-8") if name == "sample" else ""
    assert "words(" in source
    assert "Parser(prog=" in source.replace("(\n        prog", "(prog") or name == "train"  # tyro has its own


def test_a_mistyped_option_is_named_before_a_missing_one(capsys):
    parser = Parser(prog="p")
    parser.add_argument("--needed", required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--need=1", "--", "--stpes"]).rest == ["--stpes"]
    for given, said in (
        (["--stpes", "3"], "unrecognized arguments: --stpes; did you mean '--steps'?"),
        (["--needed", "1", "--stpes=3"], "unrecognized arguments: --stpes=3; did you mean '--steps'?"),
        (["--elsewhere"], "unrecognized arguments: --elsewhere"),
        (["--steps", "3"], "the following arguments are required: --needed"),
        (["--needed", "1", "--steps", "x"], "argument --steps: invalid int value: 'x'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(given)
        assert capsys.readouterr().err == f"p: error: {said}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_during_imports(name, tmp_path):
    """No traceback, and the status 130, in a shell, of what an interrupt has ended."""
    (tmp_path / "torch.py").write_text("import signal; signal.raise_signal(signal.SIGINT); raise SystemExit(3)")
    run = [sys.executable, "-m", f"ditfast.{name.removesuffix('/__main__').replace('/', '.')}"]
    how = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "capture_output": True, "text": True}
    done = subprocess.run(run, preexec_fn=_hear_interrupts, **how)
    expected = (130, "interrupted\n") if name == "doctor" else (-signal.SIGINT, "")  # which imports it in main
    assert (done.returncode, done.stderr) == expected


def _hear_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background


def test_an_interrupt_that_nothing_catches(capsys):
    @command()
    def main():
        raise KeyboardInterrupt(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 143 and capsys.readouterr().err == "interrupted\n"


def test_an_error_that_nothing_expects(capsys):
    """Inductor's errors hold a compiler's command line and its whole output."""

    @command()
    def main():
        output = "\n".join(f"a.cpp:{i}: note: {'x' * 1000}" for i in range(5000))
        raise RuntimeError(
            f"CppCompileError: C++ compile error\n\nCommand:\ng++ {'x' * 9999}\n{output}\na.cpp:1: error: no y"
        )

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == "error: RuntimeError: CppCompileError: C++ compile error: a.cpp:1: error: no y"
    said = capsys.readouterr().err
    assert said.startswith("Traceback ") and "in main" in said and said.endswith("a.cpp:1: error: no y\n")
    assert len(said) < 50_000


@pytest.mark.parametrize(
    "text, said", [("", "ValueError"), ("a\nb", "ValueError: a"), ("x" * 400, f"ValueError: {'x' * 287}…")]
)
def test_an_error_in_brief(text, said):
    assert in_brief(ValueError(text)) == said


def test_a_terminal_with_few_characters():
    """Pipes and terminals have this encoding if the locale is not UTF-8."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for text, name, *options in ((b"\\u2026", "sample", "--help"), (b"\\xb2", "flops", "--model", "DiT-S/8")):
        done = subprocess.run(
            [sys.executable, "-m", f"ditfast.{name}", *options], env=environment, capture_output=True
        )
        assert done.returncode == 0 and text in done.stdout, done.stderr


@pytest.mark.parametrize(
    "content, flags",
    [
        ("ema_warmup: off", ["--ema-warmup", "off"]),  # a bool to YAML 1.1
        ("ema_warmup: 'on'\ncompile: on\nflip: No", ["--ema-warmup", "on", "--compile", "--no-flip"]),
        ("out: 007\ndata: no", ["--out", "007", "--data", "no"]),
        ("out: ~/runs\nclip: ~\nmodel: null\nvae:", ["--out", "/home/ada/runs"]),
        ("lr: 1e-4\nsteps: 400_000", ["--lr", "1e-4", "--steps", "400_000"]),
        ("betas: [0.9, 0.95]", ["--betas", "0.9", "0.95"]),
        ("", []),
    ],
)
def test_a_file(tmp_path, monkeypatch, content, flags):
    pytest.importorskip("yaml")
    from ditfast.training.config_file import flags_from_yaml

    monkeypatch.setenv("HOME", "/home/ada")
    (tmp_path / "run.yaml").write_text(content)
    assert flags_from_yaml(tmp_path / "run.yaml") == flags


def test_a_run_reads_back_what_it_wrote(tmp_path):
    pytest.importorskip("tyro")
    from ditfast.train import parse_config
    from ditfast.training.config import Config
    from ditfast.training.config_file import to_yaml

    config = Config(
        ema_warmup="off",
        flip=False,
        compile=True,
        lr=3e-5,
        betas=(0.8, 0.95),
        clip=1.0,
        out="007",
        data="no",
        cfg=1e-5,
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse_config(["--config", str(tmp_path / "config.yaml")])[0] == config


@pytest.mark.parametrize(
    "number, said",
    [(0, "0 images"), (1, "1 image"), (2, "2 images"), (50_000, "50,000 images")],
)
def test_numbers_with_nouns(number, said):
    assert counted(number, "image") == said
    assert counted(number, "class", "classes").endswith("class" if number == 1 else "classes")


def test_errors_about_arguments_name_options():
    assert option_of("last_step_size") == "--last-step-size"
    for text, said in (
        ("image_size of digits must be 8", "--image-size of digits must be 8"),
        ("name must be one of a, b", "--sampler must be one of a, b"),
        ("steps=4 is odd", "--steps=4 is odd"),
        ("stepsize must be 1", "stepsize must be 1"),
        ("the steps must be 1", "the steps must be 1"),
        ("", ""),
    ):
        assert in_options(text, "steps", "image_size", name="sampler") == said
    with (
        pytest.raises(KeyError, match="--sampler must be") as raised,
        by_option(ValueError, KeyError, name="sampler"),
    ):
        raise ValueError("name must be")
    assert isinstance(raised.value.__cause__, ValueError)


def test_help_keeps_names_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    parser = Parser(prog="p", description="one\n  two")
    parser.add_argument("--sampler", help="flow-euler, " * 9)
    text = parser.format_help()
    assert "one\n  two" in text and text.count("flow-euler") == 9
