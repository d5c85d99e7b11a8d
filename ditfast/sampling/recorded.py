"""Settle the sampling options against the ``sampling`` record of a checkpoint."""

from argparse import Namespace

import torch

from ditfast.checkpoints import read_sampling
from ditfast.checkpoints.load import vae_beside
from ditfast.checkpoints.sampling import OBJECTIVES, settle_objective
from ditfast.command import by_option, in_options, option_of
from ditfast.fingerprint import sha256
from ditfast.sampling import SampleError
from ditfast.sampling.autoencoder import Scaling, latents_of, load_vae
from ditfast.sampling.decode import PIXELS, Decoder, Takes, keep_pixels, make_decoder
from ditfast.sampling.sampler import SAMPLERS
from ditfast.sampling.solvers import FLOW_SAMPLERS, MEAN_SAMPLERS, given_options, is_adaptive

SCHEDULE = "linear"  # of checkpoints without a record
SAMPLER = {"diffusion": "ddpm", "flow": "euler", "meanflow": "one-step"}  # default by objective


def read_record(ckpt: str, objective: str | None = None) -> dict:
    """Read the checkpoint's ``sampling``; without one, only the objective: the given one, or diffusion.

    Raises:
        SampleError: the checkpoint does not exist, or its objective is unknown or not the given one.
    """
    try:
        found = read_sampling(ckpt)
        record = settle_objective(found, objective, {"objective": "diffusion"})
    except (ValueError, OSError, ImportError) as error:
        raise SampleError(f"--ckpt {ckpt}: {in_options(error, 'objective')}") from error
    if record["objective"] not in OBJECTIVES:
        its = record["objective"]
        raise SampleError(f"--ckpt {ckpt} was trained for the objective {its!r}, which has no sampler here")
    return record if found or record["objective"] != "diffusion" else {"objective": "diffusion"}


def assumption(o: Namespace, record: dict) -> str | None:
    """What is assumed about a checkpoint that does not record its objective; None if --objective was given."""
    if o.objective is not None or record != {"objective": "diffusion"}:
        return None
    how = f"sampled as diffusion, {o.noise_schedule} noise schedule; for SiT's weights, --objective flow"
    return f"{o.ckpt} records no objective: {how}"


def settle_sampler(o: Namespace, record: dict) -> None:
    """Set ``o.sampler``, ``o.steps`` and ``o.cfg``, unless given, to the objective's defaults.

    Raises:
        SampleError: an option of another objective, or guidance of a model that guides itself.
    """
    objective, options = record["objective"], given_options(o)
    o.sampler = SAMPLER[objective] if o.sampler is None else o.sampler
    if objective == "diffusion":
        if o.sampler in {*FLOW_SAMPLERS, *MEAN_SAMPLERS} - {*SAMPLERS}:
            raise SampleError(f"--sampler {o.sampler} is for flows, but this is a diffusion model (--objective)")
        for name, value in options.items():
            raise SampleError(f"{option_of(name)} is for flows, but this is a diffusion model, got {value}")
    elif o.noise_schedule:
        raise SampleError(f"--noise-schedule is for diffusion, but this is a {objective} model")
    adaptive = objective != "diffusion" and is_adaptive(o.sampler, options)
    if o.steps is None and not adaptive:
        o.steps = 1 if o.sampler in MEAN_SAMPLERS else 250
    if adaptive:
        o.batch = 1  # its steps depend on the whole batch, and a sample must not depend on others
    if o.cfg is None:
        o.cfg = 1.0 if objective == "meanflow" else 4.0
    if o.cfg > 1 and (learned := record.get("guidance", 1)) != 1:
        refuse(o, f"--cfg {o.cfg:g} guides twice: the model was trained to guide itself, by {learned:g}")


def settle_schedule(o: Namespace, record: dict) -> str | None:
    """The checkpoint's noise schedule, or --noise-schedule if it records none; None for flows.

    Raises:
        SampleError: --noise-schedule contradicts the checkpoint.
    """
    if record["objective"] != "diffusion":
        return None
    recorded = record.get("noise_schedule")
    if o.noise_schedule and recorded and o.noise_schedule != recorded:
        refuse(o, f"--noise-schedule {o.noise_schedule} is not the model's, {recorded}")
    return o.noise_schedule or recorded or SCHEDULE


def settle_decoder(o: Namespace, record: dict) -> Takes:
    """What the decoder takes, without loading it. Sets ``o.decoder`` and ``o.vae`` unless given.

    Raises:
        SampleError: it is not what the model was trained with, or the autoencoder is missing or not needed.
    """
    trained = None if "vae" not in record else "vae" if record["vae"] else "pixel"
    o.decoder = o.decoder or trained or "vae"
    if trained not in (None, o.decoder):
        refuse(o, f"--decoder {o.decoder} does not fit this model, which was trained with {trained}")
    if o.decoder == "pixel":
        if o.vae is not None:
            raise SampleError(f"--vae is for models of latents, but this is a model of pixels, got {o.vae}")
        return PIXELS
    o.vae = o.vae or vae_beside(o.ckpt) or "ema"
    with by_option(SampleError, SampleError, "vae"):
        channels, factor = latents_of(o.vae)
    return Takes((channels,), factor)


def load_decoder(o: Namespace, record: dict, device: str | torch.device) -> Decoder:
    """The decoder, with the scale and shift of the model's latents.

    Raises:
        SampleError: the autoencoder lacks weights, or is not the one that the model was trained with.
    """
    if o.decoder == "pixel":
        return keep_pixels
    with by_option(SampleError, SampleError, "vae"):
        autoencoder, vae = load_vae(o.vae, device), record.get("vae")
    if not vae:
        return make_decoder(autoencoder)
    if vae["sha256"] and sha256(autoencoder) != vae["sha256"]:
        refuse(o, f"--vae {o.vae} is not the autoencoder that the model was trained with")
    return make_decoder(autoencoder, Scaling(vae["scale"], vae["shift"]))


def refuse(o: Namespace, text: str) -> None:
    """Raise a SampleError unless --allow-mismatch was given."""
    if not o.allow_mismatch:
        raise SampleError(f"{text}: --allow-mismatch samples anyway")
