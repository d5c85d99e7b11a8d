"""Checksums of a model's weights."""

import hashlib
import zlib


def fingerprint(model) -> str:
    """CRC-32 of all weights, in the order of the state dict: tells whether two runs have the same model."""
    total = 0
    for value in model.state_dict().values():
        total = zlib.crc32(value.cpu().contiguous().numpy(), total)
    return f"{total:08x}"


def sha256(model) -> str:
    """SHA-256 of all weights in float32, by name: names an autoencoder in files that others get."""
    total, state = hashlib.sha256(), model.state_dict()
    for name in sorted(state):
        total.update(state[name].float().cpu().contiguous().numpy())
    return total.hexdigest()
