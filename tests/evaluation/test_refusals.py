"""Bad input causes one line that names what to change, before any image is read."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from ditfast.evaluation import statistics


@pytest.fixture
def shared(data):
    return ("--samples", data["fake"], "--reference", data["real"], "--features", data["rich"])


def test_options(refusal, data, shared, tmp_path):
    rich = ("--features", data["rich"])
    assert "--samples or --ckpt is required" in refusal(*rich)
    assert "--samples or --ckpt is required" in refusal(*rich, "--reference", data["real"])
    assert "--save-stats needs --reference" in refusal("--samples", data["fake"], *rich, "--save-stats", "x.npz")
    assert "unrecognized arguments: --steps 3" in refusal(*shared, "--steps", 3)
    assert "--batch must be at least 1, got 0" in refusal(*shared, "--batch", 0)
    assert "--num-samples must be at least 2, got 1" in refusal(*shared, "--num-samples", 1)
    assert "--device must be cpu, cuda or cuda:N, and available, got tpu" in refusal(*shared, "--device", "tpu")
    assert "--device must be" in refusal(*shared, "--device", "cuda:99")
    assert "--device must be" in refusal(*shared, "--device", "meta")
    assert "invalid choice: 'kid'" in refusal(*shared, "--metrics", "kid")
    assert "not allowed with argument --samples" in refusal(*shared, "--ckpt", "model")


def test_all_that_is_missing_is_named_at_once(refusal, tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    message = refusal("--samples", a, "--reference", b, "--inception", c)
    assert f"--samples {a} does not exist; --reference {b} does not exist; --inception {c} is not a file" in message
    message = refusal("--samples", a, "--reference", b, "--features", c)
    assert f"{b} does not exist; --features must be a TorchScript file that exists" in message


def test_a_mistyped_option(refusal, data, shared, ckpt):
    assert refusal(*shared, "--metrcs", "fid").endswith("--metrcs fid; did you mean '--metrics'?")
    assert "--steps 3; options of ditfast.sample need --ckpt" in refusal(*shared, "--steps", 3)
    ours = ("--ckpt", ckpt, "--reference", data["real"], "--features", "nothing:here", "--num-samples", 2)
    assert refusal(*ours, "--stpes", 3).endswith("--stpes; did you mean '--steps'?")  # before features are loaded
    assert refusal("--ckpt", ckpt, "--refrence", "x").endswith("--refrence; did you mean '--reference'?")


def test_no_features(refusal, data):
    message = refusal("--samples", data["fake"], "--reference", data["real"])
    assert message.startswith("error: no features: give --inception PATH") and "inception-2015-12-05.pt" in message


def test_one_process(refusal, shared, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "evaluate runs as a single process: sample with torchrun first" in refusal(*shared)


def test_images(refusal, data, folder, generate, tmp_path):
    tail = ("--features", data["rich"])
    nowhere = tmp_path / "nowhere"
    assert f"--samples {nowhere} does not exist" in refusal("--samples", nowhere, "--reference", data["real"], *tail)
    assert f"--reference {nowhere} does not" in refusal("--samples", data["fake"], "--reference", nowhere, *tail)
    (tmp_path / "empty").mkdir()
    assert "empty contains no images" in refusal("--samples", tmp_path / "empty", "--reference", data["real"], *tail)
    one = folder(tmp_path / "one", generate(0, 1))
    assert "one must have at least 2 images, got 1" in refusal("--samples", one, "--reference", data["real"], *tail)
    assert "--reference" in refusal("--samples", data["fake"], "--reference", one, *tail)
    (tmp_path / "cut.npz").write_bytes(Path(data["real.npz"]).read_bytes()[:3000])
    cut = refusal("--samples", data["fake"], "--reference", tmp_path / "cut.npz", *tail)
    assert "--reference" in cut and "cut.npz is truncated or not an npz" in cut
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    other = refusal("--samples", data["fake"], "--reference", tmp_path / "other.npz", *tail)
    assert "other.npz has no images, arr_0, only x" in other


def test_fewer_images_than_requested(refusal, data, shared):
    assert f"--num-samples 34, but --samples {data['fake']} has 33 images" in refusal(*shared, "--num-samples", 34)


def test_metrics_that_need_a_reference(refusal, data):
    options = ("--samples", data["fake"], "--features", data["rich"])
    assert "--metrics fid cannot be computed: no --reference was given" in refusal(*options, "--metrics", "fid")
    nothing = refusal("--samples", data["fake"], "--features", data["waves"])
    assert (
        "no metric can be computed: fid: no --reference was given" in nothing and "is: waves.pt returns no" in nothing
    )


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "2,048 features dimensions, but the .* returns 4"),
        (
            {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)},
            "statistics of 3 spatial dimensions, but the extractor returns 12",
        ),
        ({"mu": np.zeros(4)}, "has mu but no sigma"),
        (
            {"mu": np.zeros(4), "sigma": np.eye(3)},
            r"mu and sigma must be \(D,\) and \(D, D\), got \(4,\) and \(3, 3\)",
        ),
        (
            {"mu": np.zeros(4), "sigma": np.diag([1, 1, 1, -1.0])},
            "cov2 must be a covariance, got eigenvalues from -1",
        ),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "mu must be finite numbers, got float64 with 4 NaN"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "extractor": "sha256 0"}, "statistics of other features, sha256 0"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "allow_pickle=False"),
        ({"mu": np.full(4, "x"), "sigma": np.eye(4)}, "--reference .*mu must be finite numbers, got <U1"),
        (
            {"mu": np.zeros(4), "sigma": np.eye(4) * 1j},
            "--reference .*sigma must be finite numbers, got complex128",
        ),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "count": np.array("x")}, "count must be an integer .*, got 'x'"),
    ],
)
def test_statistics(refusal, data, tmp_path, arrays, message):
    path = tmp_path / "stats.npz"
    np.savez(path, **arrays)
    found = refusal("--samples", data["fake"], "--reference", path, "--features", data["rich"])
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found)


def test_statistics_that_claim_to_be_large(refusal, data, tmp_path):
    path, header = tmp_path / "large.npz", {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**20)}
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mu", "sigma"):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(member, header)
    found = refusal("--samples", data["fake"], "--reference", path, "--features", data["rich"])
    assert "mu must have at most 1073741824 bytes, got float64 (1048576, 1048576)" in found


def test_metrics_that_statistics_do_not_provide(refusal, data, tmp_path):
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    options = ("--samples", data["fake"], "--reference", path, "--features", data["rich"])
    assert "the reference has no mu_s, sigma_s" in refusal(*options, "--metrics", "sfid")
    assert "the reference has no images, arr_0" in refusal(*options, "--metrics", "precision")
    assert "--save-stats needs images as --reference" in refusal(*options, "--save-stats", tmp_path / "new.npz")


def test_a_target_that_exists_or_cannot_be_written(refusal, shared, tmp_path, monkeypatch):
    path = tmp_path / "stats.npz"
    path.write_text("mine")
    assert f"--save-stats {path} exists: choose another name" in refusal(*shared, "--save-stats", path)
    assert path.read_text() == "mine"
    assert "--save-stats must be in an existing folder" in refusal(*shared, "--save-stats", tmp_path / "no" / "x.npz")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(statistics.np.lib.format, "write_array", full)
    message = refusal(*shared, "--save-stats", tmp_path / "new.npz")
    assert "new.npz cannot be written" in message and "No space left" in message
    assert sorted(found.name for found in tmp_path.iterdir()) == ["stats.npz"]


def test_features_that_are_not_numbers(refusal, data, monkeypatch, tmp_path):
    (tmp_path / "bad_features.py").write_text(
        "import torch\ncalls = []\n"
        "def late(x):\n    calls.append(0)\n"
        "    return x.flatten(1)[:, :2] / (0.0 if len(calls) == 3 else 1.0)\n"
        "def wide(x):\n    calls.append(0)\n    return x.flatten(1)[:, : len(calls)] / 255\n"
        "def unsure(x):\n    return {'features': x.flatten(1)[:, :2] / 255, 'probabilities': x.flatten(1) / 255}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--samples", data["fake"], "--batch", 10, "--reference", data["real"])
    late = refusal(*options, "--features", "bad_features:late")
    assert "reference 10 to 19: bad_features:late returns non-finite features" in late
    assert "features must have D =" in refusal(*options, "--features", "bad_features:wide")
    unsure = refusal(*options, "--features", "bad_features:unsure")
    assert "error: is" in unsure and "probabilities must be >= 0 and sum to 1" in unsure


def test_what_sample_rejects(refusal, ckpt, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tail = ("--reference", data["real"], "--features", data["rich"], "--num-samples", 2)
    assert "--ckpt" in refusal("--ckpt", "no-model.pt", *tail, "--decoder", "pixel")
    assert "--steps must be at least 1, got 0" in refusal("--ckpt", ckpt, *tail, "--steps", 0)
