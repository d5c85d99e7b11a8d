"""Extractors: their contract, and the layers of FID's Inception network."""

import numpy as np
import pytest
import torch
from torch import nn

from ditfast.evaluation import EvaluationError, features
from ditfast.evaluation.features import load_extractor


class Mixed(nn.Module):
    """A block with two branches, like Inception's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(6, 9, 1), nn.ReLU())
        self.tower = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x), self.tower(x)], 1)


class SmallInception(nn.Module):
    """The interface of NVIDIA's file: its layers' names and its forward's options."""

    def __init__(self, shift: float = 0.0, block: str = "mixed_6"):
        super().__init__()
        self.shift = shift
        self.layers = nn.Sequential()
        self.layers.add_module("conv", nn.Sequential(nn.Conv2d(3, 6, 9, 59), nn.ReLU()))  # 299 to 5
        self.layers.add_module(block, Mixed())
        self.layers.add_module("pool2", nn.AvgPool2d(5))
        self.output = nn.Linear(12, 4)

    def forward(
        self,
        img: torch.Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> torch.Tensor:
        x = (self.resize(img.float()) - 128) / 128 + self.shift
        found = self.layers(x).reshape(-1, 12)
        if return_features:
            return found
        logits = nn.functional.linear(found, self.output.weight, None if no_output_bias else self.output.bias)
        return logits.softmax(1)

    def resize(self, x: torch.Tensor) -> torch.Tensor:
        """TensorFlow 1's bilinear resize, axis by axis, from its definition."""
        for axis in (2, 3):
            side = x.shape[axis]
            at = torch.arange(299, dtype=torch.float64) * side / 299
            low = at.floor().long()
            part = (at - low).float()
            part = part[:, None] if axis == 2 else part
            high = (low + 1).clamp(max=side - 1)
            x = x.index_select(axis, low) * (1 - part) + x.index_select(axis, high) * part
        return x


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return SmallInception().eval()


@pytest.fixture(scope="module")
def inception(net, script, tmp_path_factory):
    return script(net, tmp_path_factory.mktemp("net") / features.INCEPTION)


@pytest.fixture
def pictures(generate):
    return torch.from_numpy(generate(3, 5, 33, 21)).permute(0, 3, 1, 2)


def test_inception_returns_the_files_own_and_its_spatial_features(net, inception, pictures):
    found = load_extractor(None, inception, "cpu")(pictures)
    with torch.no_grad():
        torch.testing.assert_close(found["features"], net(pictures, return_features=True), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["probabilities"], net(pictures, no_output_bias=True), rtol=1e-4, atol=1e-5)
        assert (found["probabilities"] - net(pictures)).abs().max() > 1e-3  # with the bias
        branch = net.layers.mixed_6.conv(net.layers.conv((net.resize(pictures.float()) - 128) / 128))
    assert found["spatial"].shape == (5, 5 * 5 * 7)
    for image, row, column, channel in np.ndindex(5, 5, 5, 7):  # rows, columns, channels, as in TensorFlow
        value = found["spatial"][image, (row * 5 + column) * 7 + channel]
        assert value == pytest.approx(float(branch[image, channel, row, column]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("height, width", [(33, 21), (299, 299), (512, 400), (1, 7)])
def test_images_are_resized_as_tensorflow_does(net, height, width):
    image = torch.randint(256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(features._resize(image), net.resize(image), rtol=1e-3, atol=0.02)
    if height == 299:
        torch.testing.assert_close(features._resize(image), image, rtol=1e-4, atol=0.02)


@pytest.mark.parametrize("change", [{"shift": 0.1}, {"block": "mixed_5"}])
def test_a_file_with_other_layers_uses_its_own_calls(script, tmp_path, pictures, change):
    torch.manual_seed(0)
    net = SmallInception(**change).eval()
    extractor = load_extractor(None, script(net, tmp_path / "other.pt"), "cpu")
    found = extractor(pictures)
    assert found.keys() == {"features", "probabilities"}
    assert "the layers of" in extractor.why_not("spatial") and "inception-2015-12-05.pt" in extractor.why_not(
        "spatial"
    )
    with torch.no_grad():
        torch.testing.assert_close(found["features"], net(pictures, return_features=True))
        torch.testing.assert_close(found["probabilities"], net(pictures, no_output_bias=True))


def test_inception_is_found_through_the_environment(monkeypatch, inception, pictures):
    monkeypatch.setenv("DITFAST_INCEPTION", inception)
    by_name = load_extractor(None, inception, "cpu")
    assert load_extractor(None, None, "cpu").identity == by_name.identity != "" and "sha256" in by_name.identity


def test_identity_depends_on_the_file(script, tmp_path, data):
    other = load_extractor(data["rich"], None, "cpu").identity
    assert (
        load_extractor(data["waves"], None, "cpu").identity
        != other
        == load_extractor(data["rich"], None, "cpu").identity
    )


def refused(*arguments, trust=False):
    with pytest.raises(EvaluationError) as error:
        load_extractor(*arguments, "cpu", trust)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_inception_that_is_missing_or_another_file(tmp_path, data):
    where = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
    message = refused(None, None)
    assert "--inception PATH" in message and "DITFAST_INCEPTION" in message and where in message
    message = refused(None, str(tmp_path / "nowhere.pt"))
    assert "nowhere.pt is not a file" in message and where in message
    assert "waves.pt is not inception-2015-12-05.pt" in refused(None, data["waves"])


class Trap:
    def __reduce__(self):
        return (open, ("trap", "w"))


def test_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Trap(), "weights.pt")
    for arguments in ((None, "weights.pt"), ("weights.pt", None)):
        assert "weights.pt is not inception-2015-12-05.pt as published" in refused(*arguments)
        assert "weights.pt is not a TorchScript file" in refused(*arguments, trust=True)
    (tmp_path / "weights.pt").write_bytes(b"abc")
    assert "--features weights.pt is not a TorchScript file" in refused("weights.pt", None, trust=True)
    assert not (tmp_path / "trap").exists()


class Writer(nn.Module):
    """Writes a file when loaded."""

    def __init__(self, path: str):
        super().__init__()
        self.path, self.held = path, torch.zeros(0)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = state[1]
        self.held = torch.from_file(state[0], True, 4, dtype=torch.uint8).fill_(120)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def test_a_script_that_writes_files_is_not_opened_unless_trusted(tmp_path, script, monkeypatch, refusal):
    monkeypatch.setattr(features, "KNOWN", set())  # nor anything the tests wrote
    trap = tmp_path / "trap"
    path = script(Writer(str(trap)), tmp_path / "writer.pt")
    features.KNOWN.clear()
    for arguments in ((None, path), (path, None)):
        message = refused(*arguments)
        assert "writer.pt is not inception-2015-12-05.pt as published" in message and "--trust-torchscript" in message
    assert "--trust-torchscript" in refusal("--samples", tmp_path, "--features", path)
    assert "get it from https" not in message  # a network for --features is the user's own
    assert f"get it from {features.SOURCE}; or, to load another network," in refused(None, path)
    assert not trap.exists()
    load_extractor(path, None, "cpu", trust=True)
    assert trap.read_bytes() == b"xxxx"  # the file is really malicious


def test_functions_by_name(tmp_path, monkeypatch, pictures):
    (tmp_path / "own_features.py").write_text(
        "class Holder:\n    means = staticmethod(lambda x: x.float().mean((2, 3)))\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = load_extractor("own_features:Holder.means", None, "cpu")
    torch.testing.assert_close(found(pictures)["features"], pictures.float().mean((2, 3)))
    assert found.name == found.identity == "own_features:Holder.means"
    assert found.why_not("spatial") == "own_features:Holder.means returns no 'spatial'"
    assert "--features own_features:nothing cannot be imported" in refused("own_features:nothing", None)
    assert "--features no_such_module:f cannot be imported" in refused("no_such_module:f", None)
    assert "--features own_features:number must be callable, got int" in refused("own_features:number", None)
    assert "must be a TorchScript file that exists or module:function, got 'net.pt'" in refused("net.pt", None)


@pytest.mark.parametrize(
    "returned, message",
    [
        (lambda x: (x, x), "must return a tensor or a dict with 'features', got tuple"),
        (lambda x: {"pool": x}, r"must return a tensor or a dict with 'features', got \['pool'\]"),
        (lambda x: x.float(), r"must return features \(B, ·\) with B = 5, got \(5, 3, 33, 21\)"),
        (lambda x: x.float().mean((1, 2, 3))[:3, None], r"must return features .* with B = 5, got \(3, 1\)"),
        (lambda x: {"features": x.flatten(1).float(), "spatial": 3}, "must return spatial .* got int"),
        (lambda x: x.flatten(1) / 0.0, "returns non-finite features"),
        (lambda x: x.no_such_method(), r"fails on uint8 images \(5, 3, 33, 21\): .*no_such_method"),
    ],
)
def test_invalid_outputs(monkeypatch, pictures, returned, message):
    monkeypatch.setattr(features, "returned", returned, raising=False)
    extractor = load_extractor("ditfast.evaluation.features:returned", None, "cpu")
    with pytest.raises(EvaluationError, match=f"^ditfast.evaluation.features:returned {message}"):
        extractor(pictures)


def test_a_script_fails_in_one_line(data, pictures):
    with pytest.raises(EvaluationError, match=r"^waves.pt fails on uint8 images \(5, 3, 33, 21\): ") as error:
        load_extractor(data["waves"], None, "cpu")(pictures)
    assert "\n" not in str(error.value)
