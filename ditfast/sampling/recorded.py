"""What a checkpoint's ``sampling`` says of how to sample from it, against the options that are given."""

from ditfast.checkpoints import read_sampling
from ditfast.fingerprint import sha256
from ditfast.sampling import SampleError
from ditfast.sampling.autoencoder import Scaling, load_vae
from ditfast.sampling.decode import PIXELS, Decoder, make_decoder

OBJECTIVE, SCHEDULE = "diffusion", "linear"  # of checkpoints without a record, too


def read_record(ckpt: str) -> dict:
    """The checkpoint's ``sampling``; {} if it has none.

    Raises:
        SampleError: there is no such checkpoint, or its objective is another than this package's.
    """
    try:
        record = read_sampling(ckpt)
    except (ValueError, OSError, ImportError) as error:
        raise SampleError(f"--ckpt {ckpt}: {error}") from error
    objective = record.get("objective", OBJECTIVE)
    if objective != OBJECTIVE:
        raise SampleError(f"--ckpt {ckpt} was trained for the objective {objective!r}, of which none is sampled here")
    return record


def settle_schedule(o, record: dict) -> str:
    """The noise schedule: the checkpoint's, which one that is given must not contradict."""
    recorded = record.get("noise_schedule")
    if o.noise_schedule and recorded and o.noise_schedule != recorded:
        _refuse(o, f"--noise-schedule {o.noise_schedule} is not the model's, {recorded}")
    return o.noise_schedule or recorded or SCHEDULE


def settle_decoder(o, record: dict, device) -> Decoder:
    """The decoder, with the scale and shift that the model's latents have. Sets ``o.decoder`` where it was not given.

    Raises:
        SampleError: the autoencoder is missing, or not the one that the model was trained with.
    """
    known, vae = "vae" in record, record.get("vae")
    trained = None if not known else "vae" if vae else "pixel"
    o.decoder = o.decoder or trained or "vae"
    if trained not in (None, o.decoder):
        _refuse(o, f"--decoder {o.decoder} is not for this model, which was trained with {trained}")
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
        raise SampleError(f"{text}: --allow-mismatch samples all the same")
