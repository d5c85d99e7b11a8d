"""Runs that start from another model's weights."""

import argparse

import pytest
import torch
from tiny_models import save_dit

from ditfast import DiT
from ditfast.train import parse_config
from ditfast.training import loop
from ditfast.training.init import make_model, read_init

TABLE = "y_embedder.embedding_table.weight"
FLAGS = ("--steps", 2, "--save-every", 1)
OTHERS = {"timestep_freq_shift": 1, "norm2_eps": 1e-5, "mlp_ratio": 2.0}  # not set by any option


@pytest.fixture
def model(kit):
    return save_dit(kit.folder / "model", in_channels=1, **OTHERS)


@pytest.fixture
def begun(monkeypatch):
    """Each run's weights before its first step, by name, and their average."""
    seen, step = [], loop.Run._step

    def watch(run, batch):
        if not seen or seen[-1][0] is not run:
            seen.append(
                (run, {name: p.detach().clone() for name, p in loop.unwrap(run.loss_step).named_parameters()})
            )
        return step(run, batch)

    monkeypatch.setattr(loop.Run, "_step", watch)
    return seen


def test_everything_but_the_labels_comes_from_the_model(kit, model, begun, capsys):
    out = kit.bare("run", "--init", model, *FLAGS)
    (run, weights), expected = begun[0], DiT.from_pretrained(model).state_dict()
    assert run.weights.average.keys() == weights.keys() - {"pos_embed"}
    assert all(torch.equal(weights[name], expected[name]) for name in expected if name != TABLE)
    assert weights[TABLE].shape == (11, 32) and torch.equal(weights[TABLE][10], expected[TABLE][7])
    line = f"starting from {model}; new: the rows of 10 labels instead of 7; all else is as in the checkpoint"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    made = DiT.from_pretrained(out / "model")
    assert made.config.items() >= {**OTHERS, "hidden_size": 32, "num_heads": 2, "num_classes": 10}.items()
    assert made.sampling.items() >= {"objective": "diffusion", "noise_schedule": "linear", "vae": None}.items()
    assert made.sampling["classes"] == list("0123456789")


def test_as_many_classes_keep_all_weights(kit, begun, capsys):
    model = save_dit(kit.folder / "ten", in_channels=1, num_classes=10)
    kit.bare("run", "--init", model, *FLAGS)
    expected = DiT.from_pretrained(model).state_dict()
    assert all(torch.equal(begun[0][1][name], value) for name, value in expected.items())
    assert f"starting from {model}; all of its weights are kept" in capsys.readouterr().out


def test_a_resumed_run_does_not_start_again(kit, model, begun, capsys):
    whole = kit.bare("whole", "--init", model, "--steps", 4)
    kit.bare("run", "--init", model, *FLAGS)
    capsys.readouterr()
    kit.bare("run", "--init", model, "--steps", 4, "--resume", "auto")
    said = capsys.readouterr().out
    assert "(step 2)" in said and "starting from" not in said
    assert kit.losses(kit.folder / "run") == kit.losses(whole)


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
def test_weights_in_half_precision_are_trained_in_float32(kit, model, begun, precision):
    DiT.from_pretrained(model).half().save_pretrained(kit.folder / "half")
    kit.bare("run", "--init", kit.folder / "half", "--precision", precision, *FLAGS)
    run, _ = begun[0]
    assert {value.dtype for value in (*run.weights.masters.values(), *run.weights.average.values())} == {
        torch.float32
    }


def test_a_training_checkpoint_of_the_original(kit, begun):
    """With another size: its arguments contain the number of heads, and that there is a null label."""
    model = DiT.from_pretrained(save_dit(kit.folder / "model", in_channels=1))
    args = argparse.Namespace(num_heads=2, num_classes=7)
    torch.save({"ema": model.state_dict(), "args": args}, kit.folder / "x.pt")
    kit.bare("run", "--init", kit.folder / "x.pt", "--label-drop", 0, *FLAGS)
    table = begun[0][1][TABLE]
    assert begun[0][0].config.num_heads == 2 and table.shape == (10, 32)
    assert torch.equal(begun[0][1]["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight)


def test_a_file_without_arguments(kit, begun, capsys):
    """Whether its ten rows are the data's ten classes is not known; without a null label in the run, they are."""
    model = DiT.from_pretrained(save_dit(kit.folder / "m", in_channels=1, num_classes=10, class_dropout_prob=0.0))
    torch.save(model.state_dict(), kit.folder / "x.pt")
    flags = ("--init", kit.folder / "x.pt", "--num-heads", 2, *FLAGS)
    kit.bare("assumed", *flags)
    line = (
        "the last of 10 rows of labels is assumed to be the null label's: if not, --label-drop 0; new: the rows of 10"
    )
    assert line in capsys.readouterr().out
    kit.bare("told", *flags, "--label-drop", 0)
    assert "all of its weights are kept" in capsys.readouterr().out
    assert torch.equal(begun[1][1][TABLE], model.state_dict()[TABLE])


def test_the_schedule_comes_from_the_model_unless_given(kit):
    model = DiT.from_pretrained(save_dit(kit.folder / "model", in_channels=1))
    model.sampling["noise_schedule"] = "squaredcos_cap_v2"
    model.save_pretrained(kit.folder / "cosine")
    for name, flags in (("squaredcos_cap_v2", ()), ("linear", ("--noise-schedule", "linear"))):
        out = kit.bare(name, "--init", kit.folder / "cosine", *FLAGS, *flags)
        assert DiT.from_pretrained(out / "model").sampling["noise_schedule"] == name


def test_another_size_of_the_images(kit, begun):
    model = save_dit(kit.folder / "model", in_channels=1, input_size=16)
    kit.bare("run", "--init", model, *FLAGS)
    assert begun[0][1]["pos_embed"].shape == (1, 16, 32)


@pytest.mark.parametrize(
    "changes, flags, said",
    [
        ({}, ("--depth", 3), "has depth 2, so --depth must be 2, got 3"),
        ({}, ("--num-heads", 4), "has num_heads 2, so --num-heads must be 2, got 4"),
        ({}, ("--model", "DiT-S/2"), "has depth 2, so --depth must be 2, got 12"),
        ({}, ("--no-learn-sigma",), "has learn_sigma True, so --learn-sigma must be True, got False"),
        (
            {"conditioning": "adaln"},
            ("--conditioning", "adaln_zero"),
            "has conditioning adaln, so --conditioning",
        ),
        ({"in_channels": 3}, (), r"weights do not fit the model: x_embedder.proj.weight is (32, 3, 2, 2) float32"),
    ],
)
def test_incompatible_models(kit, changes, flags, said):
    model = save_dit(kit.folder / "model", **{"in_channels": 1, **changes})
    with pytest.raises(SystemExit) as stopped:
        kit.bare("run", "--init", model, *FLAGS, *flags)
    text = str(stopped.value)
    assert text.startswith(f"error: --init {model}") and said in text and "\n" not in text
    assert not (kit.folder / "run").exists()


@pytest.mark.parametrize("trained, now, differs", [("a", "b", True), ("a", "a", False), ("a", None, False)])
def test_latents_from_another_autoencoder_are_reported(kit, trained, now, differs):
    model = DiT.from_pretrained(save_dit(kit.folder / "model"))
    model.sampling["vae"] = {"sha256": trained, "scale": 1.0, "shift": 0.0}
    model.save_pretrained(kit.folder / "latent")
    config, _ = parse_config(["--init", str(kit.folder / "latent")])
    start = read_init(config)
    _, line = make_model(config, {}, {"sha256": now, "scale": 1.0, "shift": 0.0}, start)
    assert line.endswith("; it was trained on latents from another autoencoder") == differs


def test_no_such_model(refused, kit):
    text = refused("--init", kit.folder / "gone")
    assert text.startswith(f"error: --init {kit.folder / 'gone'}: '") and "is not a file, a folder" in text


def test_dry_run(kit, model, capsys):
    kit.bare("run", "--init", model, "--dry-run")
    text = capsys.readouterr().out
    assert f"start    {model}, with 7 classes" in text and "DiT 2 x 32, patch 2, adaln_zero" in text
    assert not (kit.folder / "run").exists()
