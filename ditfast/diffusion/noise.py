"""The only place that draws noise."""

from collections.abc import Callable, Sequence

import torch

from ditfast.diffusion import checks

Generators = torch.Generator | list[torch.Generator] | None  # one, one per sample, or torch's default


def noise_like(x: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """Standard normal noise with the shape, dtype and device of x (B, …).

    Args:
        generator: on the device of x. With a list of B, one per sample, a sample's noise does not depend on the
            rest of the batch. None for torch's default generator.

    Raises:
        TypeError, ValueError: something else, a list of another length, or a generator on another device.
    """
    out = torch.empty_like(x)
    if not isinstance(generator, list):
        return out.normal_(generator=_check_generator(x, generator))
    if len(generator) != len(x):
        raise ValueError(f"generator must be one generator or one per sample, {len(x)}, got {len(generator)}")
    for sample, own in zip(out, generator, strict=True):
        sample.normal_(generator=_check_generator(x, own))
    return out


def _check_generator(x, generator):
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, a list of them, or None, got {type(generator).__name__}"
        )
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(f"generator must be on the device of the noise, {x.device}, got {generator.device}")
    return generator


def starting_noise(
    model: Callable,
    shape: Sequence[int],
    noise: torch.Tensor | None,
    device: str | torch.device | None,
    generator: Generators,
) -> torch.Tensor:
    """The start of a sampling loop: ``noise``, checked, or drawn on ``device``, by default the model's."""
    checks.sample_shape(shape)
    if noise is None:
        return noise_like(torch.empty(*shape, device=_device(model, device)), generator)
    checks.floating("noise", noise)
    if tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise must have the requested shape, {tuple(shape)}, got {tuple(noise.shape)}")
    if device is not None and noise.device.type != _device(model, device).type:
        raise ValueError(f"noise must be on device={device}, got {noise.device}")
    return noise


def _device(model, device):
    if device is not None:
        try:
            return torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device must be a PyTorch device, got {device!r}") from None
    module = getattr(model, "__self__", model)  # of a method such as forward_with_cfg
    if not isinstance(module, torch.nn.Module) or (parameter := next(module.parameters(), None)) is None:
        raise ValueError("device or noise must be given for a model without parameters, got None")
    return parameter.device
