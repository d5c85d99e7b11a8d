"""What the documents promise: commands and flags that exist, links that work, examples that run."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditfast import DiT

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "docs", "csrc", "examples/scaling", "benchmarks/results", "benchmarks/results/aot", "tests/golden")
PAGES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]
PAGES += sorted(ROOT.glob("ditfast/assets/*/README.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
FLAG = re.compile(r"--[a-z][\w-]*")
# README's commands that are not run, and why
NOT_RUN = {
    "pip install": "needs the network",
    "make": "installs everything, which takes minutes",
    "python benchmarks/gpu_suite.py": "needs a GPU",
    "python -m ditfast.train": "takes minutes; another test runs it with fewer steps",
    "python -m ditfast.evaluate": "reads files that cannot be distributed",
}

NOT_PASTED = {
    "hub.md": "needs a package of the name kernels, and its folder OUT",
    "README.md": "has a test of its own",
}


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's shell blocks, without comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


def inline_commands(page: Path) -> list[list[str]]:
    """The same in running text: `python …` between backticks, if it is a whole command."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"`((?:python|torchrun|pip|make|\w+=\w+ python) [^`]+)`", text)
    return [[word for word in shlex.split(line) if word != "…"] for line in found]


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """The module or file that one of this project's commands runs, and its arguments."""
    for i, word in enumerate(words):
        if word == "-m" and "".join(words[i + 1 : i + 2]).startswith("ditfast"):
            return words[i + 1], words[i + 2 :]
        if word.endswith(".py") and (ROOT / word).is_file():
            return word, words[i + 1 :]
    return None


def flags_of(name: str) -> set[str]:
    """The flags in the help of one of this project's modules or files, run in this process, where torch is loaded."""
    run, what = (runpy.run_path, str(ROOT / name)) if name.endswith(".py") else (runpy.run_module, name)
    path, arguments, out = sys.path[:], sys.argv, io.StringIO()
    sys.argv = [name, "--help"]
    sys.path.insert(0, str((ROOT / name).parent))
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            run(what, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = arguments, path
    assert not ended.value.code, ended.value.code
    return {*FLAG.findall(out.getvalue())}


def used() -> dict[str, dict[str, str]]:
    """Flags of this project's commands as used in the pages: program -> flag -> page."""
    found: dict[str, dict[str, str]] = {}
    for page in PAGES:
        for words in (*commands(page), *inline_commands(page)):
            name, arguments = program(words) or (None, [])
            if name and page.name != "CHANGELOG.md":  # includes earlier versions
                flags = {word.split("=")[0]: page.name for word in arguments if FLAG.match(word)}
                found[name] = flags | found.get(name, {})
    return {name: flags for name, flags in found.items() if flags}


USED = used()


def test_commands_were_found():
    assert {"ditfast.sample", "ditfast.train", "ditfast.doctor", "benchmarks/bench_block.py"} <= USED.keys()
    assert {"--data", "--resume", "--compile"} <= USED["ditfast.train"].keys()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:runpy")  # warns that the module is already imported
@pytest.mark.parametrize("name", sorted(USED))
def test_flags_exist(name):
    known = flags_of(name)
    unknown = {flag: page for flag, page in USED[name].items() if flag not in known}
    assert not unknown, f"{name} has no such flags"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pyproject = (ROOT / "pyproject.toml").read_text()
    for words in (*commands(page), *inline_commands(page)):
        text = " ".join(words)
        for extra in re.findall(r"\.\[([\w,]+)\]", text):
            assert all(re.search(rf"^{name} = \[", pyproject, re.MULTILINE) for name in extra.split(",")), text
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, text
        for word in words[1:]:
            if word.endswith(".py") and word.split("/")[0] in ("benchmarks", "examples", "tests", ".github"):
                assert (ROOT / word).is_file(), text


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and the site generate them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = [title.lower() for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_have_targets(page):
    for path, anchor in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} does not exist"
        assert not anchor or anchor in anchors(target), f"{path} has no heading {anchor}"


def test_the_formatters_have_one_version():
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    hooks = re.findall(r"/([\w-]+)\n +rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert dict(hooks) == {"ruff-pre-commit": pinned["ruff"], "mirrors-clang-format": pinned["clang-format"]}


@pytest.fixture
def elsewhere(tmp_path):
    """Run a command in a temporary folder that contains the repository's commands and nothing else."""
    for name in ("benchmarks", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(*words):
        command = [sys.executable if word == "python" else word for word in words]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": scripts}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    run.folder = tmp_path
    return run


SNIPPETS = [(page, text) for page in PAGES for text in blocks(page, "python") if page.name not in NOT_PASTED]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # of diffusers and torch.jit; what counts is that it runs
@pytest.mark.parametrize("text", [text for _, text in SNIPPETS], ids=[page.stem for page, _ in SNIPPETS])
def test_each_snippet_runs_as_pasted(text, tmp_path, monkeypatch):
    """Alone, in a folder that has the weights it reads and nothing else."""
    for name in re.findall(r"^model = .*from_pretrained\(\"(\S+\.pt)\"", text, re.MULTILINE):
        torch.save(DiT(depth=1, hidden_size=384, num_heads=6).state_dict(), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(text, {})


def test_the_example(capsys):
    example, *_ = blocks(ROOT / "README.md", "python")
    assert len(example.strip().splitlines()) == 6
    printed = re.search(r"print\(.*\)  # (.+)", example)[1]
    exec(example, {})
    assert capsys.readouterr().out.strip() == printed


@pytest.mark.slow
def test_the_commands_run(elsewhere):
    texts = [" ".join(words) for words in (*commands(ROOT / "README.md"), *inline_commands(ROOT / "README.md"))]
    runs = [text for text in dict.fromkeys(texts) if not text.startswith((*NOT_RUN,))]
    assert len(runs) >= 4
    for text in runs:
        elsewhere(*text.split())
    assert (elsewhere.folder / "demo.png").stat().st_size > 1000


@pytest.mark.slow
def test_training_runs(elsewhere):
    (words,) = [words for words in commands(ROOT / "README.md") if "ditfast.train" in words]
    words[words.index("--steps") + 1] = "20"
    elsewhere(*words)
    assert (elsewhere.folder / "runs/digits/model/model.safetensors").is_file()
