"""A folder's labels are printed before anything is made of it."""

import io
import os
import sys

import pytest

from ditfast import train
from ditfast.command import words
from ditfast.data import open_data
from ditfast.data.classes import print_classes


class Named:
    def __init__(self, *classes):
        self.classes = list(classes)


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (("1", "10", "2"), "classes: 0 1, 1 10, 2 2\n"),  # folder 10 has the label 1
        (("0", "1", "2"), ""),
        ([f"n{i}" for i in range(11)], f"classes: {', '.join(f'{i} n{i}' for i in range(11))}\n"),
        ([f"n{i}" for i in range(12)], f"classes: {', '.join(f'{i} n{i}' for i in range(10))}, …, 11 n11\n"),
    ],
)
def test_labels_and_names_are_one_line(classes, line, capsys):
    print_classes(Named(*classes))
    assert capsys.readouterr().out == line


def test_a_name_that_the_terminal_cannot_display(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    words([])
    print_classes(Named("é", "猫", os.fsdecode(b"\xff")))
    out.flush()
    assert out.buffer.getvalue() == b"classes: 0 \xe9, 1 \\u732b, 2 \\udcff\n"


def test_encoding_and_training_print_them(tree, encode, capsys):
    line = "classes: 0 ant, 1 bee, 2 cat\n"
    folder = encode()
    assert capsys.readouterr().out.startswith(line)
    pytest.importorskip("tyro")
    for data, options in ((tree, ("--image-size", "8")), (folder, ())):
        train.main(["--data", str(data), *options, "--dry-run", "--model", "DiT-S/2"])
        assert capsys.readouterr().out.startswith(line)


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("glyphs", "matplotlib")])
def test_built_in_data_has_names_too(name, package):
    pytest.importorskip(package)
    source = open_data(name)
    assert len(source.classes) == source.num_classes and all(isinstance(each, str) for each in source.classes)
