"""Folders with weights in parts and variants, and paths that do not exist."""

import json
import re

import pytest
import torch

from ditfast import DiT
from ditfast.checkpoints import folders, read_sampling
from ditfast.checkpoints.folders import is_hub_name
from ditfast.checkpoints.load import read_source, vae_beside
from ditfast.sampling.autoencoder import latents_of, load_vae


@pytest.fixture
def theirs():
    """A diffusers model whose blocks share their embedders, as ours do."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8}
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**sizes, num_layers=2, sample_size=8, num_embeds_ada_norm=5)
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    second.load_state_dict(first.state_dict())
    return model


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_diffusers_parts_and_variants(kit, tmp_path, theirs, ending, variant, shards):
    theirs.save_pretrained(tmp_path / "whole")
    size = {} if shards == 1 else {"max_shard_size": "100KB"}
    theirs.save_pretrained(tmp_path / "x", variant=variant, safe_serialization=ending == "safetensors", **size)
    assert len(list((tmp_path / "x").glob(f"*.{ending}"))) == shards
    expected = DiT.from_pretrained(tmp_path / "whole")
    kit.same(DiT.from_pretrained(tmp_path / "x"), expected)
    if variant:
        kit.same(DiT.from_pretrained(tmp_path / "x", variant=variant), expected)
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model.bin of variant 'bf16'"):
        DiT.from_pretrained(tmp_path / "x", variant="bf16")


def as_variant(folder, name):
    (folder / "model.safetensors").rename(folder / f"model.{name}.safetensors")


def test_which_variant_is_read(kit, tmp_path):
    plain, half, other = kit.tiny(seed=1), kit.tiny(seed=2).half(), kit.tiny(seed=3)
    half.save_pretrained(tmp_path)
    as_variant(tmp_path, "fp16")
    kit.same(DiT.from_pretrained(tmp_path), half)  # the only one
    other.save_pretrained(tmp_path, overwrite=True)
    as_variant(tmp_path, "non_ema")
    with pytest.raises(ValueError, match="holds several variants: variant must be one of fp16, non_ema"):
        DiT.from_pretrained(tmp_path)
    plain.save_pretrained(tmp_path, overwrite=True)
    kit.same(DiT.from_pretrained(tmp_path), plain)
    kit.same(DiT.from_pretrained(tmp_path, variant="fp16"), half)


def in_parts(folder):
    """Split the folder's weights into two files; return the path of their index."""
    files = __import__("safetensors.torch").torch
    state = files.load_file(folder / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(names.values()):
        files.save_file({name: state[name] for name in names if names[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda map: map.pop("pos_embed"), None, ""),  # the files' own contents count
        (lambda map: map.clear(), ValueError, "must have a weight_map of names of files beside it"),
        (lambda map: map.update(pos_embed="../secret.safetensors"), ValueError, "must have a weight_map of names"),
        (lambda map: map.update(pos_embed="gone.safetensors"), FileNotFoundError, "lists gone.safetensors, which"),
    ],
)
def test_an_index(kit, tmp_path, change, error, message):
    kit.tiny().save_pretrained(tmp_path)
    index = in_parts(tmp_path)
    kit.same(DiT.from_pretrained(tmp_path), kit.tiny())
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    if error is None:
        return kit.same(DiT.from_pretrained(tmp_path), kit.tiny())
    with pytest.raises(error, match=message):
        DiT.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_invalid_index(kit, tmp_path, text):
    kit.tiny().save_pretrained(tmp_path)
    in_parts(tmp_path).write_text(text)
    with pytest.raises(ValueError, match="index.json (is not valid JSON|must hold a JSON object)"):
        DiT.from_pretrained(tmp_path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Records requests to the Hub; a/dit is the folder "there", from which a download copies the requested files."""
    import fnmatch
    import shutil

    import huggingface_hub

    there, here, asked = tmp_path / "there", tmp_path / "here", []

    def snapshot(repo, allow_patterns, local_files_only):
        assert not local_files_only
        asked.append(repo)
        for path in there.rglob("*"):
            name = str(path.relative_to(there))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, here / name)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(folders, "why_no_hub", lambda: None)
    monkeypatch.chdir(tmp_path)
    return there, here, asked


@pytest.mark.parametrize("subfolder", ["", "transformer"])
@pytest.mark.parametrize("kind", ["whole", "parts", "variant"])
def test_only_what_is_read_is_downloaded(kit, hub, kind, subfolder):
    there, here, _ = hub
    folder = there / subfolder
    kit.tiny().save_pretrained(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"the same in another format")
    in_parts(folder) if kind == "parts" else None
    if kind == "variant":
        (folder / "diffusion_pytorch_model.bin").unlink()
        as_variant(folder, "fp16")
    kit.same(DiT.from_pretrained("a/dit", subfolder=subfolder), kit.tiny())
    expected = {"whole": 2, "parts": 4, "variant": 2}[kind]
    assert sum(path.is_file() for path in here.rglob("*")) == expected


def test_only_one_variant_is_downloaded(kit, hub):
    there, here, _ = hub
    kit.tiny(seed=2).save_pretrained(there)
    as_variant(there, "fp16")
    kit.tiny(seed=1).save_pretrained(there, overwrite=True)
    kit.same(DiT.from_pretrained("a/dit", variant="fp16"), kit.tiny(seed=2))
    assert sorted(path.name for path in here.iterdir()) == ["config.json", "model.fp16.safetensors"]


@pytest.fixture
def pipeline(theirs):
    """Write a diffusers pipeline of the layout of facebook/DiT-XL-2-256; return what its model equals."""
    import diffusers

    def write(folder, **options):
        vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        diffusers.DiTPipeline(theirs, vae, diffusers.DDIMScheduler()).save_pretrained(folder, **options)
        return DiT.from_pretrained(folder / "transformer")

    return write


@pytest.mark.parametrize("where", ["folder", "hub", "variant on the hub"])
def test_the_transformer_of_a_pipeline(kit, hub, pipeline, where):
    there, here, _ = hub
    expected = pipeline(there, **({"variant": "fp16"} if "variant" in where else {}))
    source = there if where == "folder" else "a/dit"
    kit.same(DiT.from_pretrained(source), expected)
    assert read_source(source)[0]["hidden_size"] == 32 and read_sampling(source) == {}
    assert vae_beside(str(source)) == f"{source}/vae" and vae_beside(f"{there}/transformer") is None
    if where == "folder":
        return
    assert sorted(path.name for path in here.rglob("*") if path.suffix != ".safetensors" and path.is_file()) == [
        "config.json",
        "model_index.json",
    ]
    assert latents_of("a/dit/vae") == (4, 1) and load_vae("a/dit/vae", "cpu").config.latent_channels == 4


def test_a_pipeline_without_a_dit(hub, pipeline):
    there, *_ = hub
    pipeline(there)
    part = there / "transformer" / "config.json"
    part.write_text(json.dumps({**json.loads(part.read_text()), "_class_name": "PixArtTransformer2DModel"}))
    with pytest.raises(ValueError, match="diffusers' PixArtTransformer2DModel is no DiT"):
        DiT.from_pretrained(there)
    index = json.loads((there / "model_index.json").read_text())
    del index["transformer"]
    (there / "model_index.json").write_text(json.dumps(index))
    for source in (there, "a/dit"):
        with pytest.raises(FileNotFoundError, match="is a DiTPipeline of diffusers without a transformer"):
            DiT.from_pretrained(source)


@pytest.mark.parametrize(
    "source",
    ["runs/gone", "runs/gone.pt", "rusn/model", "results/x.pt", "x.safetensors", "./a/b", "~/a", "a/b/c", "a"],
)
def test_a_mistyped_path_never_asks_the_hub(hub, tmp_path, source):
    (tmp_path / "runs" / "model").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"'{re.escape(source)}' is not a file, a folder or a name on"):
        DiT.from_pretrained(source)
    assert not hub[2]


def test_the_intended_path_is_suggested(hub, tmp_path):
    (tmp_path / "runs" / "model").mkdir(parents=True)
    for wrong in ("runs/modle", tmp_path / "runs" / "mode"):
        with pytest.raises(FileNotFoundError, match="did you mean '.*runs/model'"):
            DiT.from_pretrained(wrong)
    with pytest.raises(FileNotFoundError, match="did you mean 'DiT-XL-2-256x256.pt'"):
        DiT.from_pretrained("DiT-XL-2-256.pt")


def test_names_on_the_hub(hub, tmp_path):
    assert is_hub_name("facebook/DiT-XL-2-256") and is_hub_name("a/dit-v1.5")
    assert not is_hub_name(tmp_path / "a") and not is_hub_name("facebook")


def test_the_model_inside_a_run_is_suggested(kit, tmp_path):
    kit.tiny().save_pretrained(tmp_path / "run" / "model")
    for read in (DiT.from_pretrained, read_sampling):
        with pytest.raises(FileNotFoundError, match="run' holds no .*; did you mean '.*run/model'"):
            read(tmp_path / "run")


@pytest.mark.parametrize("inside", ["checkpoint.json", "checkpoints/step-00000002/checkpoint.json"])
def test_a_training_run_without_a_model(tmp_path, inside):
    (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / inside).write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"python -m ditfast.export {tmp_path} MODEL exports a model"):
        DiT.from_pretrained(tmp_path)
