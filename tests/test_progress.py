"""What commands print of their progress: a bar on a terminal, lines in a log."""

import sys

import pytest

from ditfast.progress import progress


def printed(capsys, terminal: bool, monkeypatch) -> str:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress(3, "image", "samples") as bar:
        for _ in range(3):
            bar.update()
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def needs_tqdm():
    pytest.importorskip("tqdm")


def test_lines_in_a_log(capsys, monkeypatch):
    first, last = printed(capsys, False, monkeypatch).splitlines()
    assert first.startswith("samples: 0/3 image [") and last.startswith("samples: 3/3 image [")


def test_a_line_for_each_minute_of_a_log(capsys, monkeypatch):
    monkeypatch.setattr("ditfast.progress.EVERY", 0)
    lines = printed(capsys, False, monkeypatch).splitlines()
    assert [line[:12] for line in lines] == [f"samples: {i}/3" for i in (0, 1, 2, 3, 3)]


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    assert "\rsamples: 100%|" in printed(capsys, True, monkeypatch)


def test_nothing_where_it_is_hidden(capsys):
    with progress(0, "image", hidden=True) as bar:
        bar.update()
    assert not capsys.readouterr().err
