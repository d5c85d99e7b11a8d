"""Sample images from a DiT.

    python -m ditfast.sample --demo [--one-step]
    python -m ditfast.sample --ckpt DiT-XL-2-256x256.pt --classes 207 360 387 974 --grid grid.png
    torchrun --nproc-per-node 8 -m ditfast.sample --ckpt … --num-samples 50000 --cfg 1.5 --vae ema --npz samples.npz

Sample i is the same image, up to rounding, for any batch size and number of processes: its seed, --seed + i, fixes
its noise and, unless given, its class. Repeating the command resumes it; a larger --num-samples adds samples.

--demo samples handwritten digits from a small model that ships with the package, on a CPU too, and draws them in
demo.png, one column per class. With --one-step, a MeanFlow model draws each digit in a single call, in
demo-one-step.png. Both only change defaults: any option can still be given.

For speed: --dtype auto computes in bf16 where the hardware supports it (the demo's default); --compile spends a few
seconds to a minute on each new shape. Whatever depends on timesteps and classes alone is precomputed.
"""

from ditfast.counted import counted
from ditfast.entry import before_imports, command

if __name__ == "__main__":
    before_imports()

import sys
from argparse import Namespace
from typing import Any

import torch

from ditfast.checkpoints.infer import MissingArgumentError
from ditfast.checkpoints.load import read_model, read_source
from ditfast.command import by_option, in_options
from ditfast.failure import explain
from ditfast.fingerprint import fingerprint
from ditfast.heap import keep_freed_memory
from ditfast.models.dit import DiT
from ditfast.models.guidance import default_cfg_channels
from ditfast.progress import progress
from ditfast.ranks import Ranks, exit_rank, joined_ranks
from ditfast.run_lock import FolderError, run_lock
from ditfast.sampling import SampleError, options, solvers, speed
from ditfast.sampling.animation import Animation
from ditfast.sampling.decode import Decoder, Takes, to_uint8
from ditfast.sampling.engine import Engine
from ditfast.sampling.files import (
    GRID_LIMIT,
    SampleFolder,
    check_apart,
    check_grid,
    check_target,
    write_grid,
    write_npz,
)
from ditfast.sampling.flow import FlowSampler
from ditfast.sampling.recorded import (
    assumption,
    load_decoder,
    read_record,
    refuse,
    settle_decoder,
    settle_sampler,
    settle_schedule,
)
from ditfast.sampling.sampler import Guidance, Sampler, sample
from ditfast.sampling.start import draw_start
from ditfast.signals import exit_status

OPTIONS = {"num_heads": "--num-heads N", "input_size": "--image-size HEIGHT WIDTH"}  # model argument -> option
Size = int | tuple[int, int]


def run_rank(o: Namespace, ranks: Ranks) -> None:
    """Do this rank's share of the run."""
    files = {"--grid": o.grid, "--gif": o.gif, "--npz": o.npz}
    check_apart(o.out, files)
    for option, path in files.items():
        check_target(option, path, True)
    if o.gif and ranks.world > 1:
        raise SampleError(f"--gif needs a single process, got {ranks.world}")
    record = read_record(o.ckpt, o.objective)
    settle_sampler(o, record)
    o.noise_schedule = settle_schedule(o, record)
    o.dtype = speed.settle_dtype(o.dtype, ranks.device)
    takes = settle_decoder(o, record)
    sampler = make_sampler(o, record, True)  # what does not fit is refused before weights are loaded
    animation = Animation(len(sampler.times)) if o.gif else None
    model, said = load_model(o, takes)
    model.to(ranks.device)
    guidance = make_guidance(o, model)
    sampler = make_sampler(o, record, model.learn_sigma)
    height, width = model.x_embedder.img_size
    size = (height * takes.factor, width * takes.factor)
    folder = SampleFolder(o.out, sample_settings(o, record, model, guidance), size)
    folder.check(o.overwrite)
    # a complete folder may already have these files, which are compared when they are written again
    replaces = o.overwrite or folder.is_complete(o.count)
    for option, path in files.items():
        check_target(option, path, replaces)
    if o.grid or o.gif:
        check_grid(size, o.count, o.grid_columns, o.grid_scale)
    decoder = load_decoder(o, record, ranks.device)  # last: an autoencoder takes longer than all checks
    ranks.wait()  # all ranks have checked before any changes anything
    if ranks.is_first:
        folder.start()
        for assumed in filter(None, (assumption(o, record), said)):
            print(assumed, file=sys.stderr)
    ranks.wait()
    engine = speed.make_engine(o, model)
    del model  # the engine has its own weights, in the compute dtype
    if ranks.device == "cpu":
        keep_freed_memory()  # only now: what loading freed is returned to the system
    write_images(o, ranks, folder, engine, sampler, guidance, decoder, animation)
    ranks.wait()
    if ranks.is_first:
        write_combined(o, folder, animation)


def load_model(o: Namespace, takes: Takes) -> tuple[DiT, str | None]:
    """Load the checkpoint's model in float32, for --image-size and a decoder that takes ``takes``.

    Returns:
        The model, and a line about the null label if it is assumed or dropped.
    """
    told: dict[str, Any] = {} if o.num_heads is None else {"num_heads": o.num_heads}
    told |= {"class_dropout_prob": 0.0} if o.no_null_label else {}
    changes = told | input_size(o, takes.factor)
    try:
        if changes.keys() - told:
            check_image_size(o, takes.factor, read_source(o.ckpt, **changes)[0], changes["input_size"])
        model, said = read_model(o.ckpt, objective=o.objective, **changes)
    except (ValueError, OSError, ImportError) as error:
        here = f", here {OPTIONS[error.argument]}" if isinstance(error, MissingArgumentError) else ""
        raise SampleError(f"--ckpt {o.ckpt}: {in_options(error, 'num_heads')}{here}") from error
    if model.in_channels not in takes.channels:
        channels = " or ".join(map(str, takes.channels))
        raise SampleError(f"--decoder {o.decoder} takes {channels} channels, the model has {model.in_channels}")
    known = model.y_embedder.num_classes
    for label in o.classes or ():
        if not 0 <= label < known:
            raise SampleError(f"--classes must be in [0, {known - 1}], got {label}")
    here = "" if o.no_null_label else ", here --no-null-label"
    return model.float(), f"{o.ckpt}: {said}{here}" if said else None


def input_size(o: Namespace, factor: int) -> dict[str, Any]:
    """The model's argument for --image-size, if given."""
    if o.image_size is None:
        return {}
    if any(side < 1 or side % factor for side in o.image_size):
        got = " ".join(map(str, o.image_size))
        raise SampleError(f"--image-size must be a positive multiple of {factor}, got {got}")
    height, width = (side // factor for side in (o.image_size[0], o.image_size[-1]))
    return {"input_size": height if height == width else (height, width)}


def check_image_size(o: Namespace, factor: int, config: dict, asked: Size) -> None:
    """Refuse images of a size without whole patches, or other than the model was trained on.

    Args:
        config: the model's arguments.
        asked: size of a sample.
    """
    own, got = (
        " x ".join(str(side * factor) for side in ((size, size) if isinstance(size, int) else size))
        for size in (config["input_size"], asked)
    )
    step = factor * config["patch_size"]
    if any(side % step for side in o.image_size):
        raise SampleError(f"--image-size must be a positive multiple of {step} for this model, got {got}")
    if own != got:
        refuse(o, f"--image-size {got} is not that of the model's training, {own}")


def make_sampler(o: Namespace, record: dict, learn_sigma: bool) -> Sampler | FlowSampler:
    with by_option(SampleError, SampleError, "steps", *solvers.OPTIONS, name="sampler", scheduler="sampler"):
        if record["objective"] == "diffusion":
            return Sampler(o.sampler, o.steps, learn_sigma, o.decoder == "pixel", o.noise_schedule)
        return FlowSampler(o.sampler, o.steps, record, **solvers.given_options(o))


def make_guidance(o: Namespace, model: DiT) -> Guidance:
    channels = default_cfg_channels(model.in_channels) if o.cfg_channels is None else o.cfg_channels
    if not 1 <= channels <= model.in_channels:
        raise SampleError(f"--cfg-channels must be in [1, {model.in_channels}], got {channels}")
    embedder = model.y_embedder
    if o.cfg > 1 and embedder.embedding_table.num_embeddings == embedder.num_classes:
        raise SampleError(f"--cfg {o.cfg:g} needs a null class, but the model has class_dropout_prob=0: use --cfg 1")
    low, high = o.cfg_interval
    return Guidance(o.cfg, low, high, channels)


def sample_settings(o: Namespace, record: dict, model: DiT, guidance: Guidance) -> dict[str, Any]:
    """The settings that determine sample i, which neither the number of samples nor the batch size does."""
    flow = {name: record[name] for name in ("objective", "path_type", "prediction") if name in record}
    flow |= {"time_shift": 1.0, **solvers.given_options(o)}
    return {
        **({} if record["objective"] == "diffusion" else flow),
        "weights": fingerprint(model),
        "input_size": model.x_embedder.img_size,
        **({} if o.num_heads is None else {"num_heads": o.num_heads}),
        **({"null_label": False} if o.no_null_label else {}),
        "classes": o.classes,
        "seeds": o.seeds or f"{o.seed} + i",
        "sampler": o.sampler,
        "steps": o.steps,
        "noise_schedule": o.noise_schedule,
        "dtype": o.dtype,
        "guidance": guidance._asdict() if guidance.scale > 1 else None,
        "decoder": o.vae if o.decoder == "vae" else "pixel",
    }


def write_images(
    o: Namespace,
    ranks: Ranks,
    folder: SampleFolder,
    engine: Engine,
    sampler: Sampler | FlowSampler,
    guidance: Guidance,
    decoder: Decoder,
    animation: Animation | None = None,
) -> None:
    """Write this rank's missing images, every world-th, and again those that are to be animated."""
    animated = range(GRID_LIMIT if animation else 0)
    missing = [i for i in range(ranks.rank, o.count, ranks.world) if i in animated or not folder.is_whole(i)]
    batches = [missing[i : i + o.batch] for i in range(0, len(missing), o.batch)]
    model = engine.model
    shape, known = (model.in_channels, *model.x_embedder.img_size), model.y_embedder.num_classes
    calls = len(batches) * len(sampler.times)
    with progress(calls, "step", hidden=ranks.rank > 0 or not missing) as bar, engine.packed():

        def tick(x):
            bar.update()
            if animation and batch[0] in animated:
                animation.watch(x)

        for batch in batches:
            seeds = [o.seeds[i] if o.seeds else o.seed + i for i in batch]
            labels = [o.classes[i] if o.classes else None for i in batch]
            starts = [draw_start(s, shape, known, ranks.device, k) for s, k in zip(seeds, labels, strict=True)]
            # what does not fit the model was refused or allowed before
            how: dict[str, Any] = {"dtype": speed.DTYPES[o.dtype], "tick": tick, "allow_mismatch": True}
            x = sample(engine, sampler, guidance, starts, ranks.device, **how)
            with torch.no_grad():
                images = decoder(x)
            if not images.isfinite().all():
                raise SampleError(f"a sample among {batch[0]} to {batch[-1]} is not finite: try --dtype fp32")
            pictures = to_uint8(images)
            if animation and batch[0] in animated:
                animation.add(pictures, decoder)
            for i, seed, start, pixels in zip(batch, seeds, starts, pictures, strict=True):
                folder.write(i, pixels, f"class {start.label}, seed {seed}")
            done = f"{missing.index(batch[-1]) + 1} of {counted(len(missing), 'image')}"
            bar.set_description(done, refresh=False)


def write_combined(o: Namespace, folder: SampleFolder, animation: Animation | None) -> None:
    """Write the grid, the GIF and the npz, and print where everything is."""
    print(f"{counted(o.count, 'image')} in {folder.path}")
    if o.grid:
        write_grid(o.grid, folder, o.count, o.grid_columns, o.grid_scale, o.overwrite)
    if animation:
        animation.write(o.gif, folder, o.grid_columns, o.grid_scale, o.overwrite)
    if o.npz:
        write_npz(o.npz, folder, o.count, o.overwrite)
    for path in filter(None, (o.grid, o.gif, o.npz)):
        print(path)


def parse_options(arguments: list[str] | None) -> Namespace:
    """Options of the command; exits with status 2 and one line if one is invalid."""
    return options.parse_options(arguments, __doc__)


@command()
def main(arguments: list[str] | None = None) -> None:
    o = parse_options(arguments)
    try:
        with joined_ranks() as ranks, run_lock(o.out, ranks, o.take_over):
            run_rank(o, ranks)
    except FolderError as error:
        exit_rank(f"error: {error}", 2)
    except (SampleError, ImportError, ConnectionError) as error:
        exit_rank(f"error: {error}")
    except KeyboardInterrupt as error:
        exit_rank("interrupted: finished images are kept; repeat the command to resume", exit_status(error))
    except Exception as error:
        exit_rank(explain(error))


if __name__ == "__main__":
    main()
