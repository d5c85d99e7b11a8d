"""Encode a folder of images once, to train on latents.

    python -m ditfast.encode --data imagenet/train --image-size 256 --out latents
    torchrun --nproc-per-node 8 -m ditfast.encode --data imagenet/train --out latents

--data contains one folder of images per class. For each image, cropped as in the paper, and its mirror image, the
mean and std of the autoencoder's posterior are stored, so a new latent can be drawn in every epoch. To resume an
interrupted run, repeat the command.
"""

from ditfast.counted import counted
from ditfast.entry import before_imports, command

if __name__ == "__main__":
    before_imports()

import math
import os
import shlex
import sys
from argparse import Namespace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ditfast.command import Parser, by_option, option_of, words
from ditfast.data import DataError, Unreadable
from ditfast.data.classes import print_classes
from ditfast.data.folder import MOST, Images
from ditfast.data.shards import TENSORS, Shards
from ditfast.data.stream import MOST_WORKERS, load_batches
from ditfast.failure import explain
from ditfast.fingerprint import fingerprint
from ditfast.paths import check_paths
from ditfast.progress import progress
from ditfast.ranks import Ranks, exit_rank, joined_ranks
from ditfast.run_lock import FolderError, run_lock
from ditfast.sampling import SampleError
from ditfast.sampling.autoencoder import describe_vae, load_vae, vae_factor
from ditfast.signals import exit_status

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def run_rank(o: Namespace, ranks: Ranks) -> None:
    """Run the command on one rank."""
    check_folder(o.data)  # before the autoencoder, which may be a download
    encoder = PosteriorEncoder(o, ranks.device)
    with by_option(DataError, DataError, folder="data"):
        images = Images(o.data, o.image_size, encoder.vae.config.in_channels, flip=False)
    shards = Shards(o.out, encode_settings(o, encoder, images), images.count, o.shard_size)
    shards.check(o.overwrite)
    ranks.wait()  # until all have checked, before anything is changed
    if ranks.is_first:
        print_classes(images)
        shards.start(command=resume_command(o))
    ranks.wait()
    missing = shards.missing()
    ranks.wait()  # until all have looked, before a shard is added
    write_shards(o, ranks, encoder, images, shards, missing[ranks.rank :: ranks.world])
    ranks.wait()
    if ranks.is_first:
        index = shards.finish(images.classes)
        skipped = f", {len(index['unreadable'])} skipped" if index["unreadable"] else ""
        print(f"{counted(index['count'], 'image')} in {shards.path}{skipped}")


def check_folder(data: str) -> None:
    """Reject a folder of images that does not exist."""
    if not Path(data).is_dir():
        raise DataError(f"--data must be a folder of images, got {data!r}")


class PosteriorEncoder:
    """A float32 autoencoder.

    Attributes:
        vae: the AutoencoderKL.
        shape: (C, h, w) of a latent.
        dtype: of the outputs.

    Raises:
        DataError: its latents do not fit the image size.
    """

    def __init__(self, o: Namespace, device: str):
        torch.backends.cudnn.deterministic = True
        with by_option(SampleError, SampleError, "vae"):
            self.vae = load_vae(o.vae, device)
        self.device, self.dtype = device, DTYPES[o.dtype]
        factor = vae_factor(self.vae)
        if o.image_size % factor:
            raise DataError(f"--image-size must be a multiple of {factor} for --vae {o.vae}, got {o.image_size}")
        self.shape = (self.vae.config.latent_channels, o.image_size // factor, o.image_size // factor)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """mean, std, mean_flip and std_flip (b, C, h, w) of images x (b, C, S, S), on the CPU in ``dtype``."""
        made = {}
        for suffix, images in (("", x), ("_flip", x.flip(-1))):
            posterior = self.vae.encode(images.to(self.device)).latent_dist
            for name in ("mean", "std"):
                made[name + suffix] = getattr(posterior, name).to("cpu", self.dtype)
        if not all(each.isfinite().all() for each in made.values()):
            raise DataError("the autoencoder returns values that are not finite")
        return made

    def empty(self) -> dict[str, torch.Tensor]:
        """The result for zero images; convolutions reject empty batches."""
        return {name: torch.empty(0, *self.shape, dtype=self.dtype, device="cpu") for name in TENSORS}


def encode_settings(o: Namespace, encoder: PosteriorEncoder, images: Images) -> dict[str, Any]:
    """Everything that determines the latents; the path of the images and the batch size do not."""
    about = describe_vae(encoder.vae)
    return {
        "vae": Path(o.vae).name,
        "vae_checksum": fingerprint(encoder.vae),
        "vae_sha256": about["sha256"],
        "scale": about["scale"],
        "shift": about["shift"],
        "image_size": o.image_size,
        "shape": encoder.shape,
        "dtype": o.dtype,
        "data": {name: value for name, value in images.identity.items() if name != "flip"},
    }


def resume_command(o: Namespace) -> str:
    """The command that resumes this run."""
    names = ("data", "image_size", "vae", "out", "dtype", "shard_size", "unreadable")
    options = [word for name in names for word in (option_of(name), str(getattr(o, name)))]
    return shlex.join(["python", "-m", "ditfast.encode", *options])


def write_shards(
    o: Namespace, ranks: Ranks, encoder: PosteriorEncoder, images: Images, shards: Shards, mine: list[int]
) -> None:
    """Encode and write the shards ``mine`` of this rank, one after the other."""
    ranges = [(shard, shards.ranges[shard]) for shard in mine]
    plan = [(shard, each[i : i + o.batch]) for shard, each in ranges for i in range(0, len(each), o.batch)]
    if not plan:
        return
    read = load_batches(_Pictures(images, o.unreadable == "skip"), [indices for _, indices in plan], o.workers)
    total = sum(len(indices) for _, indices in plan)
    with progress(total, "image", hidden=ranks.rank > 0) as bar:
        for shard, batches in groupby(zip(plan, read, strict=True), key=lambda each: each[0][0]):
            parts = [{**encoder.empty(), "labels": torch.empty(0, dtype=torch.int64, device="cpu")}]
            unreadable: list[str] = []
            for (_, indices), (x, labels, broken) in batches:
                for name, reason in broken:
                    unreadable.append(name)
                    bar.write(f"skipped: {reason}", file=sys.stderr)
                if len(x):
                    parts.append({**encoder(x), "labels": labels})
                bar.update(len(indices))
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            shards.write(shard, tensors, unreadable)


class _Pictures:
    """Reads images by index: x (b, C, S, S), labels (b,), and (name, reason) of each broken one."""

    def __init__(self, images, skip):
        self.images, self.skip = images, skip

    def __getitems__(self, indices):
        items, broken = [], []
        for index in indices:
            try:
                items.append(self.images.read(index, None))
            except Unreadable as error:
                if not self.skip:
                    return DataError(f"{error}: use --unreadable skip to skip such images")
                broken.append((str(self.images.path(index).relative_to(self.images.folder)), str(error)))
        x = torch.stack([x for x, _ in items]) if items else torch.empty(0, *self.images.shape, device="cpu")
        return x, torch.tensor([y for _, y in items], dtype=torch.int64, device="cpu"), broken


def parse_options(arguments: list[str] | None) -> Namespace:
    """Options of the command; exits with status 2 and one line if one is invalid."""
    parser = Parser(prog="python -m ditfast.encode", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="folder with one folder of images per class")
    add("--out", required=True, metavar="DIR", help="output folder")
    add("--image-size", type=int, default=256, metavar="PIXELS", help="height and width (256)")
    add("--vae", default="ema", metavar="NAME", help="AutoencoderKL: ema, mse or a folder (ema)")
    add("--batch", type=int, default=32, metavar="B", help="images per batch (32)")
    add("--dtype", choices=DTYPES, default="fp32", help="dtype of the files; encoding runs in fp32 (fp32)")
    add("--shard-size", type=int, default=1024, metavar="N", help="images per file (1024)")
    workers = min(4, os.cpu_count() or 1)
    add("--workers", type=int, default=workers, metavar="N", help=f"processes that read images ({workers})")
    add("--unreadable", choices=("fail", "skip"), default="fail", help="skip broken images, or fail (fail)")
    add("--take-over", action="store_true", help="take over the folder from a run that is certainly dead")
    add("--overwrite", action="store_true", help="replace latents made with other settings")
    o = parser.parse_args(words(arguments))
    check_paths(parser, o, "--data", "--out", "--vae")
    for option, value, least, most in (
        ("--image-size", o.image_size, 1, MOST),
        ("--batch", o.batch, 1, math.inf),
        ("--shard-size", o.shard_size, 1, math.inf),
        ("--workers", o.workers, 0, MOST_WORKERS),
    ):
        if not least <= value <= most:
            rule = f"at least {least}" if value < least else f"at most {most}"
            parser.error(f"{option} must be {rule}, got {value}")
    return o


@command()
def main(arguments: list[str] | None = None) -> None:
    o = parse_options(arguments)
    try:
        with joined_ranks() as ranks, run_lock(o.out, ranks, o.take_over):
            run_rank(o, ranks)
    except FolderError as error:
        exit_rank(f"error: {error}", 2)
    except (DataError, SampleError, ImportError, ConnectionError) as error:
        exit_rank(f"error: {error}")
    except KeyboardInterrupt as error:
        exit_rank("interrupted: finished shards are kept; repeat the command to resume", exit_status(error))
    except Exception as error:
        exit_rank(explain(error))


if __name__ == "__main__":
    main()
