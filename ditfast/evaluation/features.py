"""From images to features: by the Inception that FID is defined with, or by a network of one's own.

An extractor takes uint8 images (B, 3, H, W) on the device asked for, and returns features (B, D), or a dict of

    "features" (B, D)       for FID, precision and recall
    "spatial" (B, S)        for sFID; may be left out
    "probabilities" (B, K)  for the Inception Score, each row sums to 1; may be left out

It resizes and scales as it needs: the images are handed over as they are in their files.
"""

import hashlib
import io
import os
import re
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F

from ditfast.evaluation import EvaluationError

INCEPTION = "inception-2015-12-05.pt"
SOURCE = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION}"
VARIABLE = "DITFAST_INCEPTION"
# sha256 of the TorchScript files that are read without being trusted: of that file, as k-diffusion compares it too
KNOWN = {"f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"}
SIDE = 299  # pixels of Inception's input
SPATIAL = 7  # channels of mixed_6/conv that are compared: 7 * 17 * 17 = 2023, about as many as the 2048 of pool_3


class Extractor:
    """An extractor whose outputs are checked.

    Attributes:
        name: for people.
        identity: what statistics have to share to be compared: a file's checksum, or the name of a function.
        missing: why an output is left out, where more is known than that it is.
    """

    def __init__(self, name: str, identity: str, network, device, missing=None):
        self.name, self.identity, self.missing = name, identity, missing or {}
        self._network, self._device = network, device

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 (B, 3, H, W) to the dict above, float32 or as the network has it, on the device."""
        try:
            with torch.no_grad():
                outputs = self._network(images.to(self._device))
        except Exception as error:  # a network of the user's can raise anything
            shape = tuple(images.shape)
            raise EvaluationError(f"{self.name} cannot take uint8 images {shape}: {_last_line(error)}") from error
        return self._check(outputs, len(images))

    def why_not(self, output: str) -> str:
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
                raise EvaluationError(f"{self.name} returns {name} that are not finite")
        return {
            name: outputs[name] for name in ("features", "spatial", "probabilities") if outputs.get(name) is not None
        }


def load_extractor(features: str | None, inception: str | None, device, trust: bool = False) -> Extractor:
    """The extractor of --features, or else the Inception of --inception or of the environment.

    A file is TorchScript, which can write any file that the user can, already while it is loaded. So it is not even
    opened unless its checksum is `KNOWN`, or ``trust`` is true. A function is imported, as Python imports anything.

    Raises:
        EvaluationError: no such file or function, another kind of file, or one that is not trusted.
    """
    if features is None:
        return _inception(inception or os.environ.get(VARIABLE), device, trust)
    if Path(features).is_file():
        return Extractor(Path(features).name, *_script("--features", features, device, trust), device)
    if re.fullmatch(r"[\w.]+:[\w.]+", features):
        return Extractor(features, features, _function(features), device)
    raise EvaluationError(f"--features must be a TorchScript file that exists or module:function, got {features!r}")


def _inception(path, device, trust):
    if path is None:
        raise EvaluationError(f"no features: give --inception PATH, or set {VARIABLE}, to {INCEPTION} from {SOURCE}")
    if not Path(path).is_file():
        raise EvaluationError(f"--inception {path} is no file: {INCEPTION} is at {SOURCE}")
    identity, net = _script("--inception", path, device, trust)
    probe = (torch.arange(2 * 3 * 33 * 47, device="cpu").reshape(2, 3, 33, 47) * 37 % 256).to(torch.uint8).to(device)
    try:
        with torch.no_grad():
            theirs = _by_calls(net, probe)
    except Exception as error:  # as TorchScript fails where arguments are others
        raise EvaluationError(f"--inception {path} is not {INCEPTION}: {_last_line(error)}") from error
    name = f"Inception ({Path(path).name})"
    if _agree(net, probe, theirs):
        return Extractor(name, identity, lambda images: by_layers(net, images), device)
    missing = {"spatial": f"the layers of {path} are not those of {INCEPTION}"}
    return Extractor(name, identity, lambda images: _by_calls(net, images), device, missing)


def by_layers(net, images) -> dict[str, torch.Tensor]:
    """One pass through NVIDIA's TorchScript of TensorFlow's Inception of 2015, with what ADM's evaluator looks at.

    That is pool_3; the first 7 channels of mixed_6/conv, ordered as TensorFlow has them, (17, 17, 7); and for the
    Inception Score the softmax of pool_3 times the classifier's weight, without its bias.
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
    """The same from the file's own forward, which has no spatial features."""
    return {"features": net(images, return_features=True), "probabilities": net(images, no_output_bias=True)}


def _agree(net, probe, theirs) -> bool:
    """Whether going through the layers is what the file's own forward does."""
    try:
        with torch.no_grad():
            ours = by_layers(net, probe)
    except (AttributeError, RuntimeError):
        return False
    close = [torch.allclose(ours[name], value, rtol=1e-3, atol=1e-4) for name, value in theirs.items()]
    return all(close) and ours["spatial"] is not None


def _resize(images):
    """(B, 3, H, W) to float32 (B, 3, 299, 299) as TensorFlow 1: j is read at j W / 299, not antialiased."""
    count, _, *sides = images.shape
    at = torch.arange(SIDE, device=images.device) * (2 / SIDE) - 1
    y, x = (at + 1 / side for side in sides)  # grid_sample's coordinates: -1 and 1 are the outer edges of the image
    grid = torch.stack((x.expand(SIDE, SIDE), y[:, None].expand(SIDE, SIDE)), -1).expand(count, -1, -1, -1)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def _script(option, path, device, trust):
    """The identity of a TorchScript file, and what is in it."""
    content = Path(path).read_bytes()  # once: what is loaded is what was compared
    digest = hashlib.sha256(content).hexdigest()
    if digest not in KNOWN and not trust:
        raise EvaluationError(
            f"{option} {path} is not {INCEPTION} as published, and TorchScript can do whatever its author wants, as "
            f"write files: --trust-torchscript loads it (sha256 {digest})"
        )
    try:
        return f"sha256 {digest[:16]}", torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except RuntimeError as error:  # truncated, or another kind of file
        reason = str(error).split(". ")[0].splitlines()[0]
        raise EvaluationError(f"{option} {path} is no TorchScript file: {reason}") from error


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
    """Of a message: TorchScript puts what is wrong behind its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
