"""Feature extraction, by the Inception network that defines FID or by a user's network.

A network takes uint8 images (B, 3, H, W) on the selected device and returns features (B, D), or a dict of

    "features" (B, D)       for FID, precision and recall
    "spatial" (B, S)        for sFID; optional
    "probabilities" (B, K)  for the Inception Score, rows sum to 1; optional

It must resize and scale the images itself; it gets them as stored in their files.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ditfast.evaluation import EvaluationError

INCEPTION = "inception-2015-12-05.pt"
SOURCE = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION}"
VARIABLE = "DITFAST_INCEPTION"
# SHA-256 of TorchScript files that are loaded without --trust-torchscript: the published one, as in k-diffusion
KNOWN = {"f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"}
SIDE = 299  # side of Inception's input in pixels
SPATIAL = 7  # channels of mixed_6/conv to compare: 7 * 17 * 17 = 2023, close to the 2048 of pool_3


class Extractor:
    """A feature network with checked outputs.

    Attributes:
        name: for display.
        identity: a file's checksum or a function's name; statistics are comparable only if it is equal.
        missing: output -> reason why it is missing, where known.
    """

    def __init__(
        self,
        name: str,
        identity: str,
        network: Callable[[torch.Tensor], Any],
        device: str | torch.device,
        missing: dict[str, str] | None = None,
    ):
        self.name, self.identity, self.missing = name, identity, missing or {}
        self._network, self._device = network, device

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map images, uint8 (B, 3, H, W), to the dict above, on the device, in the network's dtype.

        Raises:
            EvaluationError: the network fails, or its outputs have the wrong form or are not finite.
        """
        try:
            with torch.no_grad():
                outputs = self._network(images.to(self._device))
        except Exception as error:  # a user's network can raise anything
            shape = tuple(images.shape)
            raise EvaluationError(f"{self.name} fails on uint8 images {shape}: {_last_line(error)}") from error
        return self._check(outputs, len(images))

    def why_not(self, output: str) -> str:
        """Why this output is missing."""
        return self.missing.get(output, f"{self.name} returns no {output!r}")

    def _check(self, outputs, count):
        if torch.is_tensor(outputs):
            outputs = {"features": outputs}
        if not isinstance(outputs, dict) or "features" not in outputs:
            found = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise EvaluationError(f"{self.name} must return a tensor or a dict with 'features', got {found}")
        for name in ("features", "spatial", "probabilities"):
            value = outputs.get(name)
            if value is None:
                continue
            if not torch.is_tensor(value) or value.ndim != 2 or len(value) != count:
                got = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
                raise EvaluationError(f"{self.name} must return {name} (B, ·) with B = {count}, got {got}")
            if not value.isfinite().all():
                raise EvaluationError(f"{self.name} returns non-finite {name}")
        return {
            name: outputs[name] for name in ("features", "spatial", "probabilities") if outputs.get(name) is not None
        }


def load_extractor(
    features: str | None, inception: str | None, device: str | torch.device, trust: bool = False
) -> Extractor:
    """The network of --features, or else the Inception of --inception or of the environment.

    A TorchScript file can write any file its user can, even while it is loaded, so it is not loaded unless its
    checksum is in `KNOWN` or ``trust`` is true. A function is imported like any Python code.

    Raises:
        EvaluationError: the file or function does not exist, is of another kind, or is not trusted.
    """
    if (why := why_no_features(features, inception)) is not None:
        raise EvaluationError(why)
    if features is None:
        return _inception(inception or os.environ.get(VARIABLE), device, trust)
    if Path(features).is_file():
        identity, net = _script("--features", features, device, trust)
        return Extractor(Path(features).name, identity, net, device)
    return Extractor(features, features, _function(features), device)


def why_no_features(features: str | None, inception: str | None) -> str | None:
    """Why the network of `load_extractor` is not there; None if it is, or is a function."""
    if features is not None:
        if Path(features).is_file() or re.fullmatch(r"[\w.]+:[\w.]+", features):
            return None
        return f"--features must be a TorchScript file that exists or module:function, got {features!r}"
    path = inception or os.environ.get(VARIABLE)
    if path is None:
        return f"no features: give --inception PATH, or set {VARIABLE}, to {INCEPTION} from {SOURCE}"
    return None if Path(path).is_file() else f"--inception {path} is not a file: get {INCEPTION} from {SOURCE}"


def _inception(path, device, trust):
    identity, net = _script("--inception", path, device, trust)
    probe = (torch.arange(2 * 3 * 33 * 47, device="cpu").reshape(2, 3, 33, 47) * 37 % 256).to(torch.uint8).to(device)
    try:
        with torch.no_grad():
            theirs = _by_calls(net, probe)
    except Exception as error:  # for example, TorchScript fails on unknown arguments
        raise EvaluationError(f"--inception {path} is not {INCEPTION}: {_last_line(error)}") from error
    name = f"Inception ({Path(path).name})"
    if _agree(net, probe, theirs):
        return Extractor(name, identity, lambda images: by_layers(net, images), device)
    missing = {"spatial": f"the layers of {path} differ from those of {INCEPTION}"}
    return Extractor(name, identity, lambda images: _by_calls(net, images), device, missing)


def by_layers(net: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """One pass through NVIDIA's TorchScript of TensorFlow's 2015 Inception, with the outputs ADM's evaluator uses.

    These are pool_3; the first 7 channels of mixed_6/conv in TensorFlow's order, (17, 17, 7); and, for the Inception
    Score, the softmax of pool_3 times the classifier's weight, without its bias.

    Args:
        images: uint8 (B, 3, H, W).
    """
    x, spatial = (_resize(images) - 128) / 128, None
    for name, layer in net.layers.named_children():
        if name == "mixed_6":
            spatial = layer.conv(x)[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
        x = layer(x)
    features = x.flatten(1)
    probabilities = F.linear(features, net.output.weight).softmax(1)
    return {"features": features, "spatial": spatial, "probabilities": probabilities}


def _by_calls(net, images):
    """Outputs of the file's own forward, which has no spatial features."""
    return {"features": net(images, return_features=True), "probabilities": net(images, no_output_bias=True)}


def _agree(net, probe, theirs) -> bool:
    """Whether `by_layers` reproduces the file's own forward."""
    try:
        with torch.no_grad():
            ours = by_layers(net, probe)
    except (AttributeError, RuntimeError):
        return False
    close = [torch.allclose(ours[name], value, rtol=1e-3, atol=1e-4) for name, value in theirs.items()]
    return all(close) and ours["spatial"] is not None


def _resize(images):
    """Resize to float32 (B, 3, 299, 299) like TensorFlow 1: column j is read at j W / 299, without antialiasing."""
    count, _, *sides = images.shape
    at = torch.arange(SIDE, device=images.device) * (2 / SIDE) - 1
    y, x = (at + 1 / side for side in sides)  # in grid_sample's coordinates -1 and 1 are the image's outer edges
    grid = torch.stack((x.expand(SIDE, SIDE), y[:, None].expand(SIDE, SIDE)), -1).expand(count, -1, -1, -1)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def _script(option, path, device, trust):
    """Returns (identity, module) of a TorchScript file."""
    content = Path(path).read_bytes()  # once, so the bytes that are loaded are those that were checked
    digest = hashlib.sha256(content).hexdigest()
    if digest not in KNOWN and not trust:
        again = f"get it from {SOURCE}; or, to load" if option == "--inception" else "to load"
        raise EvaluationError(
            f"{option} {path} is not {INCEPTION} as published (its sha256 is {digest}): {again} another network, "
            "which can do anything that you can, such as write files, use --trust-torchscript"
        )
    try:
        return f"sha256 {digest[:16]}", torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except RuntimeError as error:  # truncated, or another kind of file
        reason = str(error).split(". ")[0].splitlines()[0]
        raise EvaluationError(f"{option} {path} is not a TorchScript file: {reason}") from error


def _function(name):
    module, _, attribute = name.partition(":")
    try:
        found = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise EvaluationError(f"--features {name} cannot be imported: {error}") from error
    if not callable(found):
        raise EvaluationError(f"--features {name} must be callable, got {type(found).__name__}")
    return found


def _last_line(error):
    """Last line of an error message, where TorchScript puts the cause, after its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
