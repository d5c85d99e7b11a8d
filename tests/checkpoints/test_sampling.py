"""`sampling` in config.json: valid contents, who writes it, who reads it."""

import argparse
import copy
import json

import pytest
import torch

from ditfast import DiT
from ditfast.checkpoints import read_sampling
from ditfast.checkpoints.files import RELEASED

VAE = {"sha256": "ab" * 32, "scale": 0.3611, "shift": 0.1159}
WHOLE = {
    "objective": "diffusion",
    "noise_schedule": "squaredcos_cap_v2",
    "vae": VAE,
    "classes": ["ant", "bee", "cat", "d", "e"],
}
OLD = {"objective": "diffusion", "noise_schedule": "linear"}
FLOW = {"objective": "flow", "path_type": "GVP", "prediction": "noise"}


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "sampling",
    [
        WHOLE,
        OLD,
        FLOW,
        {**OLD, "vae": None},
        {**OLD, "vae": {"sha256": None, "scale": [1, 2, 3, 4.5], "shift": [0.0] * 4}},
    ],
)
def test_round_trip(kit, tmp_path, sampling):
    model = kit.tiny()
    model.sampling = sampling
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["sampling"] == sampling == read_sampling(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert loaded.sampling == sampling and "sampling" not in loaded.config
    assert copy.deepcopy(loaded).sampling == sampling


def test_what_nobody_said_is_not_recorded(kit, tmp_path):
    """A model from a loop of one's own: whatever a record said, it would be followed, and might be wrong."""
    model = kit.tiny()
    model.save_pretrained(tmp_path / "new")
    DiT.from_pretrained(tmp_path / "new").save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "new", tmp_path / "again"):
        assert "sampling" not in config_of(folder) and read_sampling(folder) == {}
        assert DiT.from_pretrained(folder).sampling == model.sampling == {}
    told = DiT.from_pretrained(tmp_path / "new", objective="diffusion")
    assert told.sampling == OLD


def test_models_do_not_share_it(kit):
    first = kit.tiny()
    first.sampling["objective"] = "diffusion"
    assert kit.tiny().sampling == {}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"noise_schedul": "linear"}, "unknown field 'noise_schedul' of sampling; did you mean 'noise_schedule'"),
        ({"noise_schedule": "cosine"}, "sampling's noise_schedule must be one of linear, .*, got 'cosine'"),
        ({"path_type": "GVP"}, "sampling's path_type does not belong to the objective 'diffusion', got 'GVP'"),
        ({"objective": "flow"}, "sampling's noise_schedule does not belong to the objective 'flow', got 'squared"),
        ({"objective": "meanflow"}, "second_time must be true for sampling's objective 'meanflow', got False"),
        ({"objective": None}, "sampling's objective must be a string, got None"),
        ({"guidance": 2.0}, "sampling's guidance must be a number of at least 0, of a meanflow model, got 2.0"),
        ({"vae": "ema"}, "sampling's vae must have sha256, scale, shift, got 'ema'"),
        ({"vae": {"scale": 1, "shift": 0}}, "sampling's vae must have sha256, scale, shift, got"),
        ({"vae": {**VAE, "scale": [1, 2]}}, r"sampling's vae must have a number as scale, or 4, got \[1, 2\]"),
        ({"vae": {**VAE, "shift": "0"}}, "sampling's vae must have a number as shift, or 4, got '0'"),
        ({"classes": ["a"]}, r"sampling's classes must be the names of 5 classes, got \['a'\]"),
        ({"classes": "abcde"}, "sampling's classes must be the names of 5 classes, got 'abcde'"),
    ],
)
def test_invalid_values(kit, tmp_path, change, message):
    model = kit.tiny()
    model.sampling = WHOLE
    model.save_pretrained(tmp_path)
    config = config_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "sampling": {**WHOLE, **change}}))
    for read in (DiT.from_pretrained, read_sampling):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
    model.sampling = {**WHOLE, **change}
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_not_an_object(kit, tmp_path):
    kit.tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config_of(tmp_path), "sampling": "linear"}))
    with pytest.raises(ValueError, match="sampling must be an object, got str"):
        DiT.from_pretrained(tmp_path)


def test_a_class_with_fewer_arguments_accepts_it(kit, tmp_path):
    class Mine(DiT):
        def __init__(self, **kwargs):
            assert "sampling" not in kwargs
            super().__init__(**kwargs)

    model = kit.tiny()
    model.sampling = OLD
    model.save_pretrained(tmp_path)
    assert Mine.from_pretrained(tmp_path).sampling == OLD


def test_objectives(kit, tmp_path):
    model = kit.tiny()
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    model.sampling = OLD
    model.save_pretrained(tmp_path / "diffusion")
    model.sampling = FLOW
    model.save_pretrained(tmp_path / "flow")
    assert DiT.from_pretrained(tmp_path / "flow", objective="flow").sampling == FLOW
    bare = {"num_heads": 4}
    assert DiT.from_pretrained(tmp_path / "bare.pt", **bare).sampling == {}
    told = DiT.from_pretrained(tmp_path / "bare.pt", objective="flow", **bare).sampling
    assert told == {"objective": "flow", "path_type": "Linear", "prediction": "velocity"}
    for folder, objective, rule in (
        ("flow", "diffusion", "objective must be 'flow', the model's training objective, got 'diffusion'"),
        ("diffusion", "flow", "objective must be 'diffusion', the model's training objective, got 'flow'"),
        ("bare.pt", "meanflow", "second_time must be true for sampling's objective 'meanflow', got False"),
        ("bare.pt", "flows", "objective must be one of diffusion, flow, meanflow, got 'flows'; did you mean 'flow'"),
    ):
        with pytest.raises(ValueError, match=rule):
            DiT.from_pretrained(tmp_path / folder, objective=objective, **(bare if folder == "bare.pt" else {}))


def test_a_model_with_a_second_time_means_meanflow(kit, tmp_path):
    model = kit.tiny(second_time=True)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    loaded = DiT.from_pretrained(tmp_path), DiT.from_pretrained(tmp_path / "bare.pt", num_heads=4)
    assert [each.sampling for each in (model, *loaded)] == [{"objective": "meanflow"}] * 3
    assert read_sampling(tmp_path / "bare.pt") == {"objective": "meanflow"}
    model.sampling = {"objective": "meanflow", "guidance": 2.5}
    model.save_pretrained(tmp_path / "guided")
    assert DiT.from_pretrained(tmp_path / "guided").sampling == model.sampling == read_sampling(tmp_path / "guided")
    model.sampling["guidance"] = "2.5"
    with pytest.raises(ValueError, match="guidance must be a number of at least 0, of a meanflow model, got '2.5'"):
        model.save_pretrained(tmp_path / "no")


def test_the_released_weights_are_known_by_name(kit, tmp_path):
    assert read_sampling(RELEASED[0]) == OLD  # without a download
    for name in (RELEASED[0], "other.pt"):
        torch.save(kit.tiny().state_dict(), tmp_path / name)
    assert [read_sampling(tmp_path / name) for name in (RELEASED[0], "other.pt")] == [OLD, {}]


def test_the_checkpoints_of_sits_training(kit, tmp_path):
    """They contain the script's arguments, which identify the flow; a bare state dict does not."""
    state, path = kit.tiny().state_dict(), tmp_path / "0000100.pt"
    args = argparse.Namespace(path_type="GVP", prediction="score", loss_weight=None, model="SiT-XL/2")
    torch.save({"model": state, "ema": state, "args": args}, path)
    expected = {"objective": "flow", "path_type": "GVP", "prediction": "score"}
    assert DiT.from_pretrained(path, num_heads=4).sampling == read_sampling(path) == expected
    with pytest.raises(ValueError, match="objective must be 'flow', the model's training objective"):
        DiT.from_pretrained(path, num_heads=4, objective="diffusion")
