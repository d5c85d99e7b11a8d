"""The plan of a run, without running it."""

import torch

from ditfast.counted import counted
from ditfast.data import Source
from ditfast.models import DiT, cost
from ditfast.models.meta import on_meta
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.choice import names_in_force
from ditfast.ranks import Ranks
from ditfast.training.average import matures_at, wants_warmup, youth
from ditfast.training.config import NEW, Config, Init, model_arguments
from ditfast.training.encoder import Encoder
from ditfast.training.objective import make_objective


def describe_run(config: Config, source: Source, encoder: Encoder, ranks: Ranks, init: Init = NEW) -> str:
    """Model, compute, memory and length of a run, as text."""
    with on_meta():
        model = DiT(**model_arguments(config, encoder.shape, source.num_classes, init))
    macs, samples = sum(cost.macs(model).values()), config.steps * config.batch
    gib = {name: size / 2**30 for name, size in estimate_memory(config, model, ranks.world).items()}
    start = [f"start    {config.init}, with {_classes(init.arguments['num_classes'])}"] if config.init else []
    flops = make_objective(config, source.num_classes).forwards * 2 * macs * samples
    lines = [
        *summarize(config, source, encoder, ranks, model),
        *start,
        f"compute  {macs / 1e9:.4g} paper Gflops (GMACs) per sample; {flops:.3g} FLOPs in all",
        f"memory   {sum(gib.values()):.3g} GiB per rank: "
        + ", ".join(f"{name} {value:.3g}" for name, value in gib.items()),
        *describe_average(config, wants_warmup(config.ema_warmup, config.ema, config.steps)),
    ]
    return "\n".join(lines)


def summarize(config: Config, source: Source, encoder: Encoder, ranks: Ranks, model: DiT) -> list[str]:
    """The lines with which a run begins: what is trained, for and on what, where, and for how long."""
    parameters, samples = sum(p.numel() for p in model.parameters()), config.steps * config.batch
    share = config.batch // (ranks.world * config.accumulate)
    parts = counted(ranks.world, "rank"), counted(config.accumulate, "pass", "passes"), counted(share, "sample")
    epochs = f"{samples / source.count:.4g} epochs of {source.count:,}" if source.count else "endless data"
    shape = " x ".join(map(str, encoder.shape))
    name = config.model or f"DiT {config.depth} x {config.hidden_size}, patch {config.patch_size}"
    return [
        f"model    {name}, {config.conditioning}, {parameters / 1e6:.2f} M parameters, for {config.objective}",
        f"data     {config.data}: samples of {shape}, {_classes(source.num_classes)}, {epochs}",
        f"device   {_device(ranks.device)}, {config.precision}, backend {names_in_force(config.backend)[0]}",
        f"steps    {config.steps:,} of batch {config.batch} = {' x '.join(parts)}; {counted(samples, 'sample')}",
    ]


def _classes(number):
    return counted(number, "class", "classes")


def _device(device):
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    threads, kernels = torch.get_num_threads(), on_cpu.isa() or "no"
    return f"cpu, {counted(threads, 'thread')}, {kernels} kernels"


def describe_average(config: Config, warmup: bool) -> list[str]:
    """A line about the average of the weights, if it will be too young to be sampled from."""
    if young := youth(config.steps, config.ema, warmup):
        return [f"warning: {young}: pass --ema-warmup on, or a smaller --ema"]
    if config.sample_every and youth(config.sample_every, config.ema, warmup):
        return [f"average  holds initial weights until step {matures_at(config.ema):,}: samples show little before"]
    return []


def estimate_memory(config: Config, model: DiT, world: int) -> dict[str, float]:
    """Bytes per rank by purpose, excluding allocator and library overhead."""
    numbers = sum(p.numel() for p in model.parameters())
    share = numbers / world if config.parallel == "fsdp" else numbers
    pure = config.precision == "pure_bf16"
    copies = 2 * numbers if config.precision == "bf16" or (pure and config.parallel == "ddp") else 0  # in bf16
    weights = 4 * share + copies
    gradients = (6 if pure and config.parallel == "ddp" else 4) * share
    samples = config.batch // (world * config.accumulate)
    assert config.precision is not None and config.depth is not None and config.hidden_size is not None  # filled in
    dtype = {"fp32": "fp32", "bf16": "autocast", "pure_bf16": "bf16"}[config.precision]
    kept: float = sum(cost.kept_bytes(model, samples, dtype).values())
    if config.checkpointing == "full":  # the input of every block, and the activations of the one being recomputed
        stream = samples * model.x_embedder.num_patches * config.hidden_size * cost.DTYPES[dtype][0]
        kept = config.depth * stream + kept / config.depth
    return {"weights": weights, "gradients": gradients, "AdamW": 8 * share, "average": 4 * share, "activations": kept}
