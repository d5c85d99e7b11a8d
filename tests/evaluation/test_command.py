"""From images to the report."""

import re

import numpy as np
import pytest
import torch

from ditfast.evaluate import main
from ditfast.evaluation import report, statistics
from ditfast.evaluation.features import load_extractor
from ditfast.evaluation.metrics import frechet_distance, inception_score, moments, precision_recall
from ditfast.sample import main as sample

PART = 4  # of the Inception Score: the 33 images make eight parts, and a ninth


def outputs(data, net, images):
    """An extractor's results for an array of images, all at once."""
    return load_extractor(data[net], None, "cpu")(torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.fixture
def expected(data, generate, monkeypatch):
    monkeypatch.setattr(report, "PART", PART)
    real, fake = (outputs(data, "rich", generate(*which)) for which in ((0, 40), (1, 33)))
    mean, std = inception_score(fake["probabilities"], PART)
    precision, recall = precision_recall(real["features"], fake["features"])
    return {
        "fid": frechet_distance(*moments(fake["features"]), *moments(real["features"])),
        "sfid": frechet_distance(*moments(fake["spatial"]), *moments(real["spatial"])),
        "is": mean,
        "is_std": std,
        "precision": precision,
        "recall": recall,
    }


@pytest.mark.parametrize("samples, reference, batch", [("fake", "real", 32), ("fake.npz", "real.npz", 7)])
def test_all_metrics_of_folders_and_npz(evaluate, data, expected, samples, reference, batch):
    options = ("--samples", data[samples], "--reference", data[reference], "--features", data["rich"])
    found = evaluate(*options, "--batch", batch)
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    assert len(set(expected.values())) == 6 and min(expected.values()) > 0  # all differ
    assert found["missing"] == {}
    assert found["samples"] == {"path": data[samples], "count": 33}
    assert found["reference"] == {"path": data[reference], "count": 40, "pictures": 40}
    assert found["features"]["name"] == "rich.pt" and found["features"]["dimensions"] == 4


def test_the_table_for_people(data, expected, capsys):
    main(["--samples", data["fake"], "--reference", data["real"], "--features", data["rich"], "--batch", "5"])
    printed = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in printed.out.splitlines())
    assert float(rows["FID"]) == pytest.approx(expected["fid"], abs=1e-4)
    assert float(rows["sFID"]) == pytest.approx(expected["sfid"], abs=1e-4)
    assert rows["IS"] == f"{expected['is']:.4f} ± {expected['is_std']:.4f}"
    assert float(rows["recall"]) == pytest.approx(expected["recall"], abs=1e-4)
    assert rows["samples:"] == f"33 images from {data['fake']}"
    assert rows["reference:"] == f"40 images from {data['real']}, 40 of them for precision and recall"
    assert re.fullmatch("rich.pt, sha256 [0-9a-f]{16}, 4 dimensions", rows["features:"])
    assert "33/33" in printed.err and "40/40" in printed.err  # the progress bars


def test_chosen_metrics_only(evaluate, data, expected):
    options = ("--samples", data["fake"], "--reference", data["real"], "--features", data["rich"])
    found = evaluate(*options, "--metrics", "recall", "fid")
    assert found["metrics"] == pytest.approx({"fid": expected["fid"], "recall": expected["recall"]}, rel=1e-4)
    found = evaluate("--samples", data["fake"], "--features", data["rich"])
    assert found["metrics"] == pytest.approx({"is": expected["is"], "is_std": expected["is_std"]}, rel=1e-4)
    assert found["missing"] == dict.fromkeys(("fid", "sfid", "precision", "recall"), "no --reference was given")
    assert found["reference"] is None


def test_saved_statistics_replace_their_images(evaluate, data, expected, tmp_path, capsys):
    saved = tmp_path / "reference.npz"
    main(["--reference", data["real"], "--features", data["rich"], "--save-stats", str(saved)])
    assert capsys.readouterr().out == f"{saved}\n"
    with np.load(saved, allow_pickle=False) as held:
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(held.files)
        assert held["mu"].shape == (4,) and held["sigma_s"].shape == (12, 12) and held["mu"].dtype == np.float64
        assert held["arr_0"].shape == (40, 6, 10, 3) and int(held["count"]) == 40
    found = evaluate("--samples", data["fake"], "--reference", saved, "--features", data["rich"])
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    assert found["reference"] == {"path": str(saved), "count": 40, "pictures": 40}


def test_statistics_are_saved_during_an_evaluation(evaluate, data, expected, tmp_path):
    options = ("--samples", data["fake"], "--reference", data["real"], "--features", data["rich"])
    found = evaluate(*options, "--save-stats", tmp_path / "r.npz", "--metrics", "is")
    assert found["metrics"]["is"] == pytest.approx(expected["is"], rel=1e-4)
    mean, cov = (np.load(tmp_path / "r.npz")[key] for key in ("mu", "sigma"))
    features = outputs(data, "rich", np.load(data["real.npz"])["arr_0"])["features"].double()
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(cov, np.cov(features, rowvar=False), rtol=1e-4, atol=1e-9)


def test_adms_reference_files_are_read(evaluate, data, expected, generate, tmp_path):
    """They have only their own keys: no count, no extractor, and images other than those of the statistics."""
    real = outputs(data, "rich", generate(0, 40))
    (mu, sigma), (mu_s, sigma_s) = moments(real["features"]), moments(real["spatial"])
    pictures = generate(0, 40)[::2]
    path = tmp_path / "VIRTUAL.npz"
    np.savez(path, arr_0=pictures, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found = evaluate("--samples", data["fake"], "--reference", path, "--features", data["rich"])
    fake = outputs(data, "rich", generate(1, 33))["features"]
    both = precision_recall(outputs(data, "rich", pictures)["features"], fake)
    changed = {**expected, "precision": both[0], "recall": both[1]}
    assert found["metrics"] == pytest.approx(changed, rel=1e-4) and changed != expected
    assert found["reference"] == {"path": str(path), "count": None, "pictures": 20}


def test_precision_and_recall_see_a_part_of_a_large_reference(evaluate, data, generate, monkeypatch, tmp_path):
    monkeypatch.setattr("ditfast.evaluate.KEPT", 8)
    monkeypatch.setattr(statistics, "KEPT", 8)
    options = ("--samples", data["fake"], "--reference", data["real"], "--features", data["rich"])
    found = evaluate(*options, "--save-stats", tmp_path / "r.npz")
    real, fake = (outputs(data, "rich", images)["features"] for images in (generate(0, 40)[::5], generate(1, 33)))
    assert (found["metrics"]["precision"], found["metrics"]["recall"]) == precision_recall(real, fake)
    assert found["reference"]["count"] == 40 and found["reference"]["pictures"] == 8
    np.testing.assert_array_equal(np.load(tmp_path / "r.npz")["arr_0"], generate(0, 40)[::5])


def test_only_the_first_samples(evaluate, data, generate):
    options = ("--samples", data["fake"], "--reference", data["real"], "--features", data["waves"])
    found = evaluate(*options, "--num-samples", 20, "--metrics", "fid")
    real, fake = (outputs(data, "waves", x)["features"] for x in (generate(0, 40), generate(1, 33)[:20]))
    assert found["metrics"]["fid"] == pytest.approx(frechet_distance(*moments(fake), *moments(real)), rel=1e-4)
    assert found["samples"]["count"] == 20


def test_unavailable_metrics_are_reported_with_a_reason(evaluate, refusal, data, capsys):
    options = ("--samples", data["fake"], "--reference", data["real"], "--features", data["waves"])
    found = evaluate(*options)
    assert found["metrics"].keys() == {"fid", "precision", "recall"}
    assert found["missing"] == {"sfid": "waves.pt returns no 'spatial'", "is": "waves.pt returns no 'probabilities'"}
    message = refusal(*options, "--metrics", "fid", "sfid")
    assert message == "error: --metrics sfid cannot be computed: waves.pt returns no 'spatial'"
    main([*options])
    assert "sFID               –  waves.pt returns no 'spatial'" in capsys.readouterr().out.splitlines()


def test_metrics_that_need_more_images(evaluate, data, folder, generate, tmp_path):
    few = folder(tmp_path / "few", generate(2, 3))
    found = evaluate("--samples", few, "--reference", data["real"], "--features", data["rich"])
    assert found["metrics"].keys() == {"fid", "sfid", "is"}  # one part has no std
    assert found["missing"]["recall"] == "more than 3 samples are needed, got 3"
    found = evaluate("--samples", data["fake"], "--reference", few, "--features", data["rich"])
    assert found["missing"]["precision"] == "more than 3 reference images are needed, got 3"
    np.savez(tmp_path / "one.npz", mu=np.zeros(4), sigma=np.eye(4), arr_0=generate(0, 1))
    found = evaluate("--samples", data["fake"], "--reference", tmp_path / "one.npz", "--features", data["rich"])
    assert found["metrics"].keys() == {"fid", "is"}
    assert found["missing"]["precision"] == "more than 3 reference images are needed, got 1"
    assert found["missing"]["sfid"] == "the reference has no mu_s, sigma_s"


def test_notes(evaluate, data, folder, generate, monkeypatch, tmp_path):
    options = ("--samples", data["fake"], "--reference", data["real"], "--features", data["rich"])
    fall = "FID and sFID fall with the number of samples: published values use 50000"
    few = "IS is lower for few images: parts have 5000 images, the last one {}"
    assert evaluate(*options)["notes"] == [fall, few.format(33)]
    assert evaluate(*options, "--metrics", "recall")["notes"] == []
    biased = evaluate(*options, "--num-samples", 12)["notes"]
    assert biased == [
        "sFID is biased upward: the covariance of 12 images in 12 dimensions is singular",
        fall,
        few.format(12),
    ]
    monkeypatch.setattr(report, "PUBLISHED", 33)
    monkeypatch.setattr(report, "PART", 11)
    assert evaluate(*options)["notes"] == []
    (tmp_path / "means.py").write_text("def means(x): return x.float().mean((2, 3))")
    monkeypatch.syspath_prepend(tmp_path)
    large = folder(tmp_path / "large", generate(0, 9, 12, 20))
    found = evaluate("--samples", data["fake"], "--reference", large, "--features", "means:means")
    assert found["notes"] == ["the samples are 10 x 6, the reference is 20 x 12"]


def test_samples_of_a_checkpoint_equal_the_sample_commands(evaluate, ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat.py").write_text("def flat(x): return x.flatten(1)[:, ::17] / 255")
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--decoder", "pixel", "--steps", 2, "--cfg", 1.5, "--seed", 5)
    sample([str(o) for o in ("--ckpt", ckpt, "--num-samples", 14, *options, "--out", "own")])
    shared = ("--reference", "own", "--features", "flat:flat")
    expected = evaluate("--samples", "own", "--num-samples", 11, *shared)
    found = evaluate("--ckpt", ckpt, "--num-samples", 11, *shared, *options, "--out", "drawn", "--batch", 4)
    assert found["samples"] == {"path": "drawn", "count": 11}
    assert "6/6" in evaluate.err and "11 images in drawn" in evaluate.err  # 3 batches of 2 steps
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=0.1, abs=1e-3)
    assert found["metrics"]["fid"] > 0.1  # 11 images of 14
    drawn = sorted(path.name for path in (tmp_path / "drawn").glob("*.png"))
    assert drawn == [f"{i:06d}.png" for i in range(11)]
    before = (tmp_path / "own/000000.png").stat().st_mtime_ns
    again = evaluate("--ckpt", ckpt, "--num-samples", 11, *shared, *options, "--out", "own")
    assert again["metrics"] == expected["metrics"]  # of the first 11 in a larger folder
    assert (tmp_path / "own/000000.png").stat().st_mtime_ns == before
