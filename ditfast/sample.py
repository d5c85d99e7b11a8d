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

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from typing import Any

import torch

from ditfast.checkpoints.infer import Untold
from ditfast.checkpoints.sampling import OBJECTIVES
from ditfast.command import words
from ditfast.diffusion.schedule import SCHEDULES
from ditfast.fingerprint import fingerprint
from ditfast.models.dit import DiT, default_cfg_channels
from ditfast.optional import import_optional
from ditfast.paths import check_paths
from ditfast.ranks import Ranks, exit_rank, joined_ranks
from ditfast.run_lock import FolderError, run_lock
from ditfast.sampling import SampleError, speed
from ditfast.sampling.decode import Decoder, to_uint8
from ditfast.sampling.demo import DEMO, ONE_STEP
from ditfast.sampling.engine import Engine
from ditfast.sampling.files import SampleFolder, check_grid, check_target, write_grid, write_npz
from ditfast.sampling.flow import ADAPTIVE, FLOW_SAMPLERS, MEAN_SAMPLERS, FlowSampler
from ditfast.sampling.recorded import read_record, settle_decoder, settle_sampler, settle_schedule
from ditfast.sampling.sampler import SAMPLERS, Guidance, Sampler, sample
from ditfast.sampling.start import draw_start
from ditfast.streams import lasting_streams

SAMPLER_HELP = f"""diffusion: {", ".join(SAMPLERS)} or a diffusers scheduler class (ddpm); flows:
{", ".join(FLOW_SAMPLERS)} (euler); meanflow: those of flows, {", ".join(MEAN_SAMPLERS)} (one-step)"""
UNTOLD = {"num_heads": "--num-heads N", "input_size": "--image-size HEIGHT WIDTH"}  # model argument -> option
MOST_IMAGES = 10**7  # each is a file, and an integer in memory
MOST_PIXELS = 2**16  # per side


def run_rank(o: Namespace, ranks: Ranks) -> None:
    """Do this rank's share of the run."""
    check_target("--npz", o.npz, True)
    check_target("--grid", o.grid, True)
    record = read_record(o.ckpt, o.objective)
    settle_sampler(o, record)
    o.noise_schedule = settle_schedule(o, record)
    o.dtype = speed.settle_dtype(o.dtype, ranks.device)
    decoder = settle_decoder(o, record, ranks.device)
    model = load_model(o, decoder).to(ranks.device)
    guidance = make_guidance(o, model)
    sampler = make_sampler(o, record, model)
    height, width = model.x_embedder.img_size
    size = (height * decoder.factor, width * decoder.factor)
    folder = SampleFolder(o.out, sample_settings(o, record, model, guidance), size)
    folder.check(o.overwrite)
    # a complete folder may already have its grid and npz, which are compared when they are written again
    replaces = o.overwrite or folder.is_complete(o.count)
    check_target("--grid", o.grid, replaces)
    check_target("--npz", o.npz, replaces)
    if o.grid:
        check_grid(size, o.count, o.grid_columns, o.grid_scale)
    ranks.wait()  # all ranks have checked before any changes anything
    if ranks.is_first:
        folder.start()
    ranks.wait()
    engine = speed.make_engine(o, model)
    del model  # the engine has its own weights, in the compute dtype
    write_images(o, ranks, folder, engine, sampler, guidance, decoder)
    ranks.wait()
    if ranks.is_first:
        write_combined(o, folder)


def load_model(o: Namespace, decoder: Decoder) -> DiT:
    """Load the checkpoint's model in float32, for --image-size."""
    changes: dict[str, Any] = {} if o.num_heads is None else {"num_heads": o.num_heads}
    if o.image_size is not None:
        if any(side < 1 or side % decoder.factor for side in o.image_size):
            got = " ".join(map(str, o.image_size))
            raise SampleError(f"--image-size must be a positive multiple of {decoder.factor}, got {got}")
        height, width = (side // decoder.factor for side in (o.image_size[0], o.image_size[-1]))
        changes["input_size"] = height if height == width else (height, width)
    try:
        model = DiT.from_pretrained(o.ckpt, objective=o.objective, **changes).float().eval()
    except (ValueError, OSError, ImportError) as error:
        option = f", here {UNTOLD[error.argument]}" if isinstance(error, Untold) else ""
        raise SampleError(f"--ckpt {o.ckpt}: {error}{option}") from error
    if model.in_channels not in decoder.channels:
        takes = " or ".join(map(str, decoder.channels))
        raise SampleError(f"--decoder {o.decoder} takes {takes} channels, the model has {model.in_channels}")
    known = model.y_embedder.num_classes
    for label in o.classes or ():
        if not 0 <= label < known:
            raise SampleError(f"--classes must be in [0, {known - 1}], got {label}")
    return model


def make_sampler(o: Namespace, record: dict, model: DiT) -> Sampler | FlowSampler:
    if record["objective"] == "diffusion":
        return Sampler(o.sampler, o.steps, model.learn_sigma, o.decoder == "pixel", o.noise_schedule)
    return FlowSampler(o.sampler, o.steps, record, o.time_shift)


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
    flow["time_shift"] = o.time_shift
    return {
        **({} if record["objective"] == "diffusion" else flow),
        "weights": fingerprint(model),
        "input_size": model.x_embedder.img_size,
        **({} if o.num_heads is None else {"num_heads": o.num_heads}),
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
) -> None:
    """Write this rank's missing images: every world-th."""
    missing = [i for i in range(ranks.rank, o.count, ranks.world) if not folder.is_whole(i)]
    batches = [missing[i : i + o.batch] for i in range(0, len(missing), o.batch)]
    model = engine.model
    shape, known = (model.in_channels, *model.x_embedder.img_size), model.y_embedder.num_classes
    calls = len(batches) * len(sampler.times)
    hidden = ranks.rank > 0 or not missing
    progress = import_optional("tqdm").tqdm(total=calls or None, unit="step", disable=hidden)
    with progress as bar, engine.packed():
        for batch in batches:
            seeds = [o.seeds[i] if o.seeds else o.seed + i for i in batch]
            labels = [o.classes[i] if o.classes else None for i in batch]
            starts = [draw_start(s, shape, known, ranks.device, k) for s, k in zip(seeds, labels, strict=True)]
            x = sample(engine, sampler, guidance, starts, ranks.device, speed.DTYPES[o.dtype], bar.update)
            with torch.no_grad():
                images = decoder.decode(x)
            if not images.isfinite().all():
                raise SampleError(f"a sample among {batch[0]} to {batch[-1]} is not finite: try --dtype fp32")
            for i, seed, start, pixels in zip(batch, seeds, starts, to_uint8(images), strict=True):
                folder.write(i, pixels, f"class {start.label}, seed {seed}")
            bar.set_description(f"{missing.index(batch[-1]) + 1} of {len(missing)} images")


def write_combined(o: Namespace, folder: SampleFolder) -> None:
    """Write the grid and the npz, and print where everything is."""
    print(f"{o.count} images in {folder.path}")
    if o.grid:
        write_grid(o.grid, folder, o.count, o.grid_columns, o.grid_scale, o.overwrite)
    if o.npz:
        write_npz(o.npz, folder, o.count, o.overwrite)
    for path in filter(None, (o.grid, o.npz)):
        print(path)


def parse_options(arguments: list[str] | None) -> Namespace:
    arguments = words(arguments)
    demo = "--demo" in arguments
    parser = make_parser(demo)
    if demo:
        parser.set_defaults(**DEMO)
    o = parser.parse_args(arguments)
    if o.one_step:
        parser.set_defaults(**ONE_STEP)
        o = parser.parse_args(arguments)
    if o.num_samples is not None:
        o.classes = None  # drop the demo's
    o.count = len(o.classes) if o.classes else o.num_samples
    check_options(parser, o)
    return o


def make_parser(demo: bool) -> ArgumentParser:
    """The command's options; the demo requires none."""
    parser = ArgumentParser(
        prog="python -m ditfast.sample", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="sample handwritten digits to demo.png; needs no other option")
    add("--one-step", action="store_true", help="with --demo: sample from a MeanFlow model, one call per digit")
    add("--ckpt", required=not demo, metavar="PATH", help="a folder, a file, a released name, or a name on the Hub")
    size: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "PIXELS"}
    add("--image-size", **size, help="side, or height and width (the checkpoint's)")
    add("--num-heads", type=int, metavar="N", help="attention heads, if a bare weights file leaves them open")
    which = parser.add_mutually_exclusive_group(required=not demo)
    which.add_argument("--classes", type=int, nargs="+", metavar="K", help="class labels, one per sample")
    which.add_argument("--num-samples", type=int, metavar="N", help="number of samples, of random classes")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, metavar="S", help="sample i uses the seed S + i (0)")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="S", help="seeds, one per sample, instead of --seed")
    add("--objective", choices=OBJECTIVES, help="training objective, if the model does not record it (diffusion)")
    add("--steps", type=int, metavar="N", help=f"sampling steps (250; one-step: 1; {ADAPTIVE}: as many as it needs)")
    add("--sampler", metavar="NAME", help=SAMPLER_HELP)
    add("--time-shift", type=float, default=1.0, metavar="S", help="flows: above 1 puts more steps near noise (1)")
    add("--noise-schedule", choices=SCHEDULES, help="that of the training, if the model does not record it (linear)")
    add("--cfg", type=float, metavar="SCALE", help="classifier-free guidance scale, 1 for none (4; meanflow: 1)")
    interval: dict[str, Any] = {"type": float, "nargs": 2, "default": (0.0, 1.0), "metavar": ("LO", "HI")}
    add("--cfg-interval", **interval, help="guide only at times in [LO, HI]: 0 is clean, 1 is noise (0 1)")
    guided = "guide only the first C channels (3 of 4, as for the released samples; else all)"
    add("--cfg-channels", type=int, metavar="C", help=guided)
    speed.add_options(add)
    add("--batch", type=int, default=32, metavar="B", help="images per batch (32)")
    add("--vae", default="ema", metavar="NAME", help="ema, mse or an AutoencoderKL's folder (ema)")
    add("--decoder", choices=("vae", "pixel"), help="what decodes samples, if the model does not record it (vae)")
    add("--allow-mismatch", action="store_true", help="allow a noise schedule, VAE or decoder other than the model's")
    add("--out", default="samples", metavar="DIR", help="output folder of PNGs (samples)")
    add("--grid", metavar="FILE", help="write the first 64 images as one PNG")
    add("--grid-columns", type=int, metavar="N", help="images per row of the grid (about a square)")
    add("--grid-scale", type=int, default=1, metavar="N", help="enlarge each pixel of the grid to N x N (1)")
    add("--npz", metavar="FILE", help="write all images as an .npz for ADM's evaluator")
    add("--take-over", action="store_true", help="take the folder over from a run that is certainly dead")
    add("--overwrite", action="store_true", help="replace the grid, the npz, and a folder with other settings")
    return parser


def check_options(parser: ArgumentParser, o: Namespace) -> None:
    if o.one_step and not o.demo:
        parser.error("--one-step needs --demo; for your own model use --sampler one-step")
    check_paths(parser, o, "--ckpt", "--vae", "--out", "--grid", "--npz")
    if o.image_size is not None and len(o.image_size) > 2:
        parser.error(f"--image-size must be a side, or height and width, got {len(o.image_size)} numbers")
    if o.image_size is not None and max(o.image_size) > MOST_PIXELS:
        parser.error(f"--image-size must be at most {MOST_PIXELS}, got {max(o.image_size)}")
    positive = {"--num-samples": o.count, "--num-heads": o.num_heads, "--batch": o.batch, "--steps": o.steps}
    positive |= {"--grid-columns": o.grid_columns, "--grid-scale": o.grid_scale}
    for option, value in positive.items():
        if value is not None and value < 1:
            parser.error(f"{option} must be at least 1, got {value}")
    if o.count > MOST_IMAGES:
        parser.error(f"--num-samples must be at most {MOST_IMAGES}, got {o.count}")
    if o.seeds and len(o.seeds) != o.count:
        parser.error(f"--seeds must list one seed per sample: expected {o.count}, got {len(o.seeds)}")
    for option, seeds in (("--seed", (o.seed, o.seed + o.count - 1)), ("--seeds", o.seeds or (0,))):
        if not 0 <= min(seeds) <= max(seeds) < 2**32:  # the CPU's generator keeps 32 bits of a seed
            parser.error(f"{option} must be in [0, {2**32 - 1}], got {min(seeds)} to {max(seeds)}")
    if o.cfg is not None and not 1 <= o.cfg < float("inf"):
        parser.error(f"--cfg must be at least 1, got {o.cfg}")
    speed.check_options(parser, o)
    low, high = o.cfg_interval
    if not 0 <= low <= high <= 1:
        parser.error(f"--cfg-interval must be 0 <= LO <= HI <= 1, got {low} {high}")


@lasting_streams()
def main(arguments: list[str] | None = None) -> None:
    o = parse_options(arguments)
    try:
        with joined_ranks() as ranks, run_lock(o.out, ranks, o.take_over):
            run_rank(o, ranks)
    except FolderError as error:
        exit_rank(f"error: {error}", 2)
    except (SampleError, ImportError, ConnectionError) as error:
        exit_rank(f"error: {error}")
    except KeyboardInterrupt:
        exit_rank("interrupted: finished images are kept; repeat the command to resume")


if __name__ == "__main__":
    main()
