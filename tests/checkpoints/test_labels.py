"""A different number of classes: new rows for the labels, everything else unchanged."""

import argparse
import warnings

import pytest
import torch

from ditfast import DiT

TABLE = "y_embedder.embedding_table.weight"


def load(source, **changes):
    """Return the model and the log."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = DiT.from_pretrained(source, **changes)
    assert all("\n" not in str(each.message) and each.filename == __file__ for each in said)
    return model, [str(each.message) for each in said]


def same_but_for_the_table(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected if name != TABLE)
    return got[TABLE], expected[TABLE]


def save_file(model, path, **args):
    torch.save({"ema": model.state_dict(), "args": argparse.Namespace(num_heads=4, **args)}, path)
    return path


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("count", [3, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_new_classes(kit, tmp_path, kind, count, dtype):
    model = kit.tiny().to(dtype)
    model.sampling = {"objective": "flow", "path_type": "VP", "prediction": "noise", "classes": list("abcde")}
    model.save_pretrained(tmp_path / "folder")
    source = tmp_path / "folder" if kind == "folder" else save_file(model, tmp_path / "x.pt", num_classes=5)
    loaded, said = load(source, num_classes=count)
    table, old = same_but_for_the_table(loaded, model)
    assert table.dtype == dtype and table.shape == (count + 1, 32) and loaded.y_embedder.num_classes == count
    assert torch.equal(table[-1], old[-1])  # the null label's
    if count == 5:
        assert torch.equal(table, old) and not said
        return
    assert said == [f"new: the rows of {count} labels instead of 5; all else is as in the checkpoint"]
    assert "classes" not in loaded.sampling and loaded.config["num_classes"] == count
    assert 0.01 < table[:-1].float().std() < 0.03  # as a new model's
    assert len(torch.unique(table, dim=0)) == count + 1 and not any((row == old).all(1).any() for row in table[:-1])


def test_new_rows_depend_on_the_seed(kit, tmp_path):
    kit.tiny().save_pretrained(tmp_path)
    tables = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        tables.append(load(tmp_path, num_classes=9)[0].state_dict()[TABLE])
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("count", [5, 9])
@pytest.mark.parametrize("had", [True, False])
def test_the_null_label_comes_and_goes(kit, tmp_path, had, count, kind):
    """With the same classes, their rows stay; an existing null label is kept, or dropped if not wanted."""
    model = kit.tiny(class_dropout_prob=0.1 if had else 0.0)
    model.save_pretrained(tmp_path / "folder")
    source = tmp_path / "folder" if kind == "folder" else save_file(model, tmp_path / "x.pt", num_classes=5)
    changed, said = load(source, num_classes=count, class_dropout_prob=0.0 if had else 0.2)
    table, old = same_but_for_the_table(changed, model)
    assert table.shape == (count + (not had), 32)
    assert torch.equal(table[:5], old[:5]) == (count == 5)
    rows = "the rows of 9 labels instead of 5"
    expected = {
        (True, 5): "the row of the null label is dropped; all else is as in the checkpoint",
        (True, 9): f"new: {rows}; all else is as in the checkpoint",
        (False, 5): "new: the row of the null label; all else is as in the checkpoint",
        (False, 9): f"new: {rows} and the row of the null label; all else is as in the checkpoint",
    }
    assert said == [expected[had, count]]


def test_a_file_without_arguments_whose_null_label_is_dropped(kit, tmp_path):
    model = kit.tiny()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    changed, said = load(tmp_path / "x.pt", num_heads=4, num_classes=5, class_dropout_prob=0.0)
    table, old = same_but_for_the_table(changed, model)
    assert torch.equal(table, old[:5]) and said[0].startswith("the row of the null label is dropped")


@pytest.mark.parametrize("rows", [5, 6])
def test_whether_a_file_has_a_null_label_is_assumed_aloud(kit, tmp_path, rows):
    """A table of 5 rows may have 5 classes, or 4 and the null label: the last row is another label's then."""
    model = kit.tiny(class_dropout_prob=0.0 if rows == 5 else 0.1)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    loaded, said = load(tmp_path / "x.pt", num_heads=4)
    assert loaded.config["num_classes"] == rows - 1
    assert said == [
        f"the last of {rows} rows of labels is assumed to be the null label's: if not, class_dropout_prob=0"
    ]
    assert said == load(tmp_path / "x.pt", num_heads=4, num_classes=9)[1][0].split("; ")[:1]
    told, nothing = load(tmp_path / "x.pt", num_heads=4, class_dropout_prob=0)
    assert told.config["num_classes"] == told.y_embedder.num_classes == rows and not nothing
    for known in ({"num_classes": rows - 1}, {"class_dropout_prob": 0.1}):
        assert not load(tmp_path / "x.pt", num_heads=4, **known)[1]
    for args in ({"num_classes": rows}, {"num_classes": rows - 1}, {"class_dropout_prob": 0.0}):
        loaded, said = load(save_file(model, tmp_path / "y.pt", **args))
        assert loaded.config["num_classes"] == args.get("num_classes", rows) and not said


def test_an_unchanged_model_logs_nothing(kit, tmp_path):
    kit.tiny().save_pretrained(tmp_path)
    assert load(tmp_path)[1] == load(tmp_path, num_classes=5, input_size=16)[1] == []


def test_a_broken_table_is_not_replaced_silently(kit, tmp_path):
    model = kit.tiny()
    model.save_pretrained(tmp_path)
    model.y_embedder.embedding_table = torch.nn.Embedding(4, 32)
    files = __import__("safetensors.torch").torch
    files.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"embedding_table.weight is \(4, 32\) float32 in the weights, \(10, 32\)"):
        load(tmp_path, num_classes=9)


@torch.no_grad()
def test_other_classes_for_a_diffusers_model(kit, tmp_path):
    """These always have a null label."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    diffusers.DiTTransformer2DModel(**sizes, sample_size=8, num_embeds_ada_norm=5).save_pretrained(tmp_path)
    model, (said,) = load(tmp_path, num_classes=3)
    table, old = same_but_for_the_table(model, DiT.from_pretrained(tmp_path))
    assert said.startswith("new: the rows of 3 labels instead of 5") and torch.equal(table[3], old[5])
    assert model(*kit.batch()[:2], torch.tensor([0, 1, 2, 3])).shape == (4, 8, 8, 8)
