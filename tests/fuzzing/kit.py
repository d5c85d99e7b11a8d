"""What cases are made of: small models, images, latents and a run, created once and copied before being broken."""

import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from tiny_models import save_dit, save_vae

MODEL = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=1, num_heads=2, num_classes=7)
RUN = "--data digits --depth 1 --hidden-size 24 --num-heads 3 --patch-size 2 --batch 2 --sample-every 0 --workers 0"


def features(images):
    """uint8 (B, 3, H, W) -> (B, 4): an extractor for `ditfast.evaluate`."""
    flat = images.flatten(2).double()
    return torch.cat([flat.mean(2), flat.std(2)[:, :1]], 1)


class Kit:
    """Paths of intact things below ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        quiet = open(os.devnull, "w")  # noqa: SIM115 - loggers that are set up meanwhile keep it
        with redirect_stdout(quiet), redirect_stderr(quiet):
            self._make()

    def copy(self, name: str) -> Path:
        """Copy a file or folder of the kit to the current folder."""
        source, target = self.folder / name, Path(name)
        return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def _make(self):
        from ditfast import DiT, encode, evaluate, sample, train
        from ditfast.checkpoints import to_diffusers

        here = self.path
        torch.manual_seed(0)
        save_dit(here("model"), **MODEL)
        save_vae(here("vae"), 0)
        state = DiT.from_pretrained(here("model")).state_dict()
        torch.save(state, here("model.pt"))
        config = DiT.from_pretrained(here("model")).config
        _save_diffusers(self.folder / "diffusers", *to_diffusers(config, state))
        _save_images(self.folder)
        sample.main(f"--ckpt {here('model')} --decoder pixel --num-samples 4 --steps 1 --cfg 1 "
                    f"--out {here('samples')} "
                    f"--npz {here('samples.npz')} --grid {here('grid.png')}".split())  # fmt: skip
        evaluate.main(f"--samples {here('pictures')} --features fuzzing.kit:features --reference {here('samples')} "
                      f"--save-stats {here('statistics.npz')}".split())  # fmt: skip
        encode.main(f"--data {here('images')} --vae {here('vae')} --image-size 8 --workers 0 --shard-size 4 "
                    f"--out {here('latents')}".split())  # fmt: skip
        train.main(f"{RUN} --steps 2 --save-every 1 --log-every 1 --out {here('run')}".split())


def _save_diffusers(folder, config, state):
    import json

    from safetensors.torch import save_file

    folder.mkdir()
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel", **config}))


def _save_images(folder):
    """Save two classes of three images, four pictures of the samples' size, and one in each format."""
    from PIL import Image

    rng = np.random.default_rng(0)

    def picture(width, height):
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))

    for name in ("images/a", "images/b", "pictures", "formats"):
        (folder / name).mkdir(parents=True)
    for i in range(3):
        picture(9 + i, 12).save(folder / "images" / "a" / f"{i}.png")
        picture(20, 10 + i).save(folder / "images" / "b" / f"{i}.jpg")
    for i in range(4):
        picture(8, 8).save(folder / "pictures" / f"{i}.png")
    for ending in ("bmp", "jpg", "png", "ppm", "tif", "webp"):
        picture(24, 17).save(folder / "formats" / f"0.{ending}")
