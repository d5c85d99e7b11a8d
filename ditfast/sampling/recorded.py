"""Settle the sampling options against the ``sampling`` record of a checkpoint."""

from argparse import Namespace

import torch

from ditfast.checkpoints import read_sampling
from ditfast.checkpoints.sampling import OBJECTIVES, settle_objective
from ditfast.fingerprint import sha256
from ditfast.sampling import SampleError
from ditfast.sampling.autoencoder import Scaling, load_vae
from ditfast.sampling.decode import PIXELS, Decoder, make_decoder
from ditfast.sampling.flow import ADAPTIVE, FLOW_SAMPLERS, MEAN_SAMPLERS
from ditfast.sampling.sampler import SAMPLERS

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
        raise SampleError(f"--ckpt {ckpt}: {error}") from error
    if record["objective"] not in OBJECTIVES:
        its = record["objective"]
        raise SampleError(f"--ckpt {ckpt} was trained for the objective {its!r}, which has no sampler here")
    return record if found or record["objective"] != "diffusion" else {"objective": "diffusion"}


def settle_sampler(o: Namespace, record: dict) -> None:
    """Set ``o.sampler``, ``o.steps`` and ``o.cfg``, unless given, to the objective's defaults.

    Raises:
        SampleError: an option of another objective.
    """
    objective = record["objective"]
    o.sampler = o.sampler or SAMPLER[objective]
    if objective == "diffusion":
        if o.sampler in {*FLOW_SAMPLERS, *MEAN_SAMPLERS} - {*SAMPLERS}:
            raise SampleError(f"--sampler {o.sampler} is for flows, but this is a diffusion model (--objective)")
        if o.time_shift != 1:
            raise SampleError(f"--time-shift is for flows, but this is a diffusion model, got {o.time_shift:g}")
    elif o.noise_schedule:
        raise SampleError(f"--noise-schedule is for diffusion, but this is a {objective} model")
    if o.steps is None and o.sampler != ADAPTIVE:
        o.steps = 1 if o.sampler in MEAN_SAMPLERS else 250
    if o.sampler == ADAPTIVE:
        o.batch = 1  # its steps depend on the whole batch, and a sample must not depend on others
    if o.cfg is None:
        o.cfg = 1.0 if objective == "meanflow" else 4.0


def settle_schedule(o: Namespace, record: dict) -> str | None:
    """The checkpoint's noise schedule, or --noise-schedule if it records none; None for flows.

    Raises:
        SampleError: --noise-schedule contradicts the checkpoint.
    """
    if record["objective"] != "diffusion":
        return None
    recorded = record.get("noise_schedule")
    if o.noise_schedule and recorded and o.noise_schedule != recorded:
        _refuse(o, f"--noise-schedule {o.noise_schedule} is not the model's, {recorded}")
    return o.noise_schedule or recorded or SCHEDULE


def settle_decoder(o: Namespace, record: dict, device: str | torch.device) -> Decoder:
    """The decoder, with the scale and shift of the model's latents. Sets ``o.decoder`` unless given.

    Raises:
        SampleError: the autoencoder is missing, or is not the one that the model was trained with.
    """
    known, vae = "vae" in record, record.get("vae")
    trained = None if not known else "vae" if vae else "pixel"
    o.decoder = o.decoder or trained or "vae"
    if trained not in (None, o.decoder):
        _refuse(o, f"--decoder {o.decoder} does not fit this model, which was trained with {trained}")
    if o.decoder == "pixel":
        return PIXELS
    autoencoder = load_vae(o.vae, device)
    if not vae:
        return make_decoder(autoencoder)
    if vae["sha256"] and sha256(autoencoder) != vae["sha256"]:
        _refuse(o, f"--vae {o.vae} is not the autoencoder that the model was trained with")
    return make_decoder(autoencoder, Scaling(vae["scale"], vae["shift"]))


def _refuse(o, text):
    if not o.allow_mismatch:
        raise SampleError(f"{text}: --allow-mismatch samples anyway")
