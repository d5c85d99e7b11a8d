"""The one place where noise is drawn."""

import torch


def noise_like(x, generator=None):
    """Standard normal noise in the shape, dtype and device of x (B, …).

    Args:
        generator: a `torch.Generator` on the device of x; or a list of B of them, one per sample, so that a sample's
            noise does not depend on the others; None for torch's own.

    Raises:
        ValueError: not B generators, or one on another device.
    """
    out = torch.empty_like(x)
    if not isinstance(generator, list | tuple):
        return out.normal_(generator=_on(x, generator))
    if len(generator) != len(x):
        raise ValueError(f"generator must be one or one per sample, {len(x)}, got {len(generator)}")
    for sample, own in zip(out, generator, strict=True):
        sample.normal_(generator=_on(x, own))
    return out


def _on(x, generator):
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(f"generator must be on the device of the noise, {x.device}, got {generator.device}")
    return generator
