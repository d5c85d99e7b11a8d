"""DiT.from_pretrained and save_pretrained."""

import json
import math
import subprocess
import sys

import pytest
import torch

import ditfast.checkpoints.files
from ditfast.checkpoints import infer_config, load_into
from ditfast.models import DiT, DiT_models, get_2d_sincos_pos_embed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"input_size": (4, 12), "learn_sigma": False}, {"conditioning": "cross_attention", "norm2_eps": 1e-5}],
)
@torch.no_grad()
def test_round_trip_is_bit_equal(kit, tmp_path, changes, dtype):
    model = kit.tiny(**changes).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = DiT.from_pretrained(tmp_path / "new" / "folder")
    kit.same(loaded, model)
    assert loaded.config == model.config and not loaded.training
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["pos_embed"]
    x, t, y = kit.batch(*model.x_embedder.img_size)
    assert torch.equal(loaded(x.to(dtype), t, y), model(x.to(dtype), t, y))
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"config.json", "model.safetensors"}


def test_execution_settings_are_not_saved(kit, tmp_path):
    kit.tiny(backend="reference", recompute_mlp=True).save_pretrained(tmp_path)
    assert DiT.from_pretrained(str(tmp_path)).backend is None
    again = DiT.from_pretrained(tmp_path, backend="reference", recompute_mlp=True)
    assert again.backend == "reference" and again.blocks[1].mlp.recompute


def test_nothing_is_overwritten_unless_requested(kit, tmp_path):
    first, second = kit.tiny(seed=1), kit.tiny(seed=2)
    first.save_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match="model.safetensors exists; overwrite=True replaces it"):
        second.save_pretrained(tmp_path)
    kit.same(DiT.from_pretrained(tmp_path), first)
    loaded = DiT.from_pretrained(tmp_path)
    second.save_pretrained(tmp_path, overwrite=True)
    kit.same(DiT.from_pretrained(tmp_path), second)
    kit.same(loaded, first)  # no longer tied to the file


def test_a_full_disk_leaves_what_was_there(kit, tmp_path, monkeypatch):
    first = kit.tiny(seed=1)
    first.save_pretrained(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        kit.tiny(seed=2).save_pretrained(tmp_path, overwrite=True)
    kit.same(DiT.from_pretrained(tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 4, "input_size": 16, "learn_sigma": False, "in_channels": 3},
        {"conditioning": "adaln", "depth": 3},
        {"conditioning": "cross_attention"},
        {"conditioning": "in_context", "num_classes": 1},
        {"mlp_ratio": 1.25},
        {"hidden_size": 104, "mlp_ratio": math.nextafter(63 / 104, 1)},  # 104 * (63 / 104) is less than 63
    ],
)
@torch.no_grad()
def test_config_is_inferred_from_a_file(kit, tmp_path, changes):
    model = kit.tiny(**changes)
    torch.save({"ema": model.state_dict()}, tmp_path / "x.pt")
    loaded = DiT.from_pretrained(tmp_path / "x.pt", num_heads=4)
    kit.same(loaded, model)
    assert loaded.config == model.config


@pytest.mark.parametrize("name", ["DiT-XL/2", "DiT-L/4", "DiT-B/8", "DiT-S/2"])
def test_config_of_the_presets(name):
    with torch.device("meta"):
        model = DiT_models[name](input_size=64)
    assert model.config.items() >= infer_config(model.state_dict()).items()


def test_settings_that_weights_do_not_determine_are_required(kit):
    with pytest.raises(ValueError, match="heads of a model with hidden_size=32: give num_heads"):
        infer_config(kit.tiny().state_dict())
    state = kit.tiny(input_size=(4, 12)).state_dict()
    with pytest.raises(
        ValueError, match=r"weights are for 12 patches, which is not a square: give input_size=\(height, width\)"
    ):
        infer_config(state, num_heads=4)
    assert infer_config(state, num_heads=4, input_size=(4, 12))["input_size"] == (4, 12)
    state = kit.tiny(class_dropout_prob=0.0).state_dict()
    assert infer_config(state, num_heads=4, class_dropout_prob=0)["num_classes"] == 5


def test_weights_of_another_model(kit, tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="these are not the weights of a DiT: x_embedder.proj.weight is missing"):
        DiT.from_pretrained(tmp_path / "x.pt")
    state = kit.tiny().state_dict()
    with pytest.raises(ValueError, match=r"not the weights of a DiT: pos_embed has shape \(16, 32\)"):
        infer_config(state | {"pos_embed": state["pos_embed"][0]}, num_heads=4)


def changed(state, **changes):
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"pos_embed": torch.ones(1, 4, 32)},
            r"pos_embed is \(1, 4, 32\) float32 in the weights, \(1, 16, 32\) float32",
        ),
        ({"final_layer.linear.bias": None}, "final_layer.linear.bias is missing in the weights"),
        ({"extra": torch.ones(2)}, r"extra is \(2,\) float32 in the weights, missing in the model"),
        ({"x_embedder.proj.bias": torch.ones(32).int()}, r"x_embedder.proj.bias is \(32,\) int32"),
    ],
)
def test_wrong_weights_do_not_change_the_model(kit, changes, message, meta):
    model = kit.tiny(seed=1)
    if meta:
        model = model.to("meta")
    state = changed(kit.tiny(seed=2).state_dict(), **changes)
    with pytest.raises(ValueError, match=f"the weights do not fit the model: {message}"):
        load_into(model, state)
    if meta:
        assert all(p.is_meta for p in model.parameters())
    else:
        kit.same(model, kit.tiny(seed=1))


def test_the_error_counts_what_differs(kit, tmp_path):
    kit.tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 1}))
    with pytest.raises(
        ValueError, match=r"blocks.1.\S+ is \(.*\) float32 in the weights, missing in .*; 9 more differ"
    ):
        DiT.from_pretrained(tmp_path)


def test_load_into_keeps_dtype(kit):
    model = kit.tiny(seed=1).double()
    load_into(model, kit.tiny(seed=2).state_dict())
    kit.same(model, kit.tiny(seed=2).double())


@pytest.mark.parametrize(
    "config, message",
    [
        ('{"hidden_sise": 32}', "unknown config key 'hidden_sise' for DiT; did you mean 'hidden_size'?"),
        ("[1]", "config.json must hold a JSON object, got list"),
        ("{", "config.json is not valid JSON"),
    ],
)
def test_bad_config(kit, tmp_path, config, message):
    kit.tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        DiT.from_pretrained(tmp_path)


def test_unknown_change(kit, tmp_path):
    kit.tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown config key 'image_size' for DiT; did you mean"):
        DiT.from_pretrained(tmp_path, image_size=64)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_folder(kit, tmp_path, missing):
    kit.tiny().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {missing}"):
        DiT.from_pretrained(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file, a folder or a name on the Hugging Face Hub"):
        DiT.from_pretrained(tmp_path / "gone")


def test_hub(kit, tmp_path, monkeypatch):
    import huggingface_hub

    kit.tiny().save_pretrained(tmp_path / "transformer")
    wanted = []

    def snapshot(repo, allow_patterns, **_):
        wanted.extend(allow_patterns)
        return {"a/dit": str(tmp_path)}[repo]

    monkeypatch.setattr(ditfast.checkpoints.folders, "why_no_hub", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    kit.same(DiT.from_pretrained("a/dit", subfolder="transformer"), kit.tiny())
    assert wanted[:2] == ["transformer/config.json", "transformer/model.safetensors"]  # not a pipeline's VAE

    def offline(repo, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="'a/dit' is not a local file or folder, and .* Hub: no connection"):
        DiT.from_pretrained("a/dit")


def test_released_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        state = DiT_models["DiT-S/8"]().state_dict()
    state = {name: torch.zeros(value.shape) for name, value in state.items()}
    monkeypatch.setattr(ditfast.checkpoints.files.torch.hub, "load_state_dict_from_url", lambda *_, **__: state)
    monkeypatch.setattr(ditfast.checkpoints.files, "why_no_answer", lambda url: None)
    assert DiT.from_pretrained("DiT-XL-2-256x256.pt").config["num_heads"] == 6


@torch.no_grad()
@pytest.mark.parametrize("size", [16, (4, 12), (2, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_input_size(kit, tmp_path, size, dtype):
    model = kit.tiny().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path, input_size=size)
    height, width = (size, size) if size == 16 else size
    expected = torch.from_numpy(get_2d_sincos_pos_embed(32, (height // 2, width // 2)))[None].to(dtype)
    assert torch.equal(loaded.pos_embed, expected)
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    x, t, y = kit.batch(height, width)
    assert loaded(x.to(dtype), t, y).shape == (4, 8, height, width)


def test_learned_position_is_not_replaced_silently(kit, tmp_path):
    model = kit.tiny()
    model.pos_embed.data.add_(1)
    model.save_pretrained(tmp_path)
    kit.same(DiT.from_pretrained(tmp_path), model)
    kit.same(DiT.from_pretrained(tmp_path, input_size=(8, 8)), model)
    with pytest.raises(ValueError, match=r"pos_embed must be the sines and cosines of a \(4, 4\) grid"):
        DiT.from_pretrained(tmp_path, input_size=(4, 16))


def test_a_file_for_a_rectangle_with_a_square_number_of_patches(kit, tmp_path):
    model = kit.tiny(input_size=(4, 16))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    kit.same(DiT.from_pretrained(tmp_path / "x.pt", num_heads=4, input_size=(4, 16)), model)


def test_subclass(kit, tmp_path):
    class Mine(DiT):
        def __init__(self, *, extra=1, **kwargs):
            super().__init__(**kwargs)
            self.extra = extra

    kit.tiny().save_pretrained(tmp_path)
    loaded = Mine.from_pretrained(tmp_path, extra=3)
    assert type(loaded) is Mine and loaded.extra == 3


def test_the_model_does_not_need_the_hub():
    code = "import sys, ditfast.models, ditfast.checkpoints; print({'huggingface_hub'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
