"""From a checkpoint to images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast import DiT
from ditfast.sampling.decode import to_uint8
from ditfast.sampling.start import draw_start


def test_folder_grid_and_npz_hold_the_same_images(run, tmp_path, capsys):
    images = run("--num-samples", 5, "--grid", tmp_path / "g.png", "--npz", tmp_path / "s.npz")
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"00000{i}.png" for i in range(5)),
        "settings.json",
    ]
    with np.load(tmp_path / "s.npz", allow_pickle=False) as saved:
        assert saved.files == ["arr_0"] and saved["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(saved["arr_0"], images)
    grid = np.asarray(Image.open(tmp_path / "g.png"))  # 3 columns, 2 rows, 2 pixels between
    assert grid.shape == (18, 28, 3)
    for i in range(5):
        top, left = i // 3 * 10, i % 3 * 10
        np.testing.assert_array_equal(grid[top : top + 8, left : left + 8], images[i])
    assert not grid[10:, 20:].any() and not grid[8:10].any()
    printed = capsys.readouterr()
    assert "5 images in" in printed.out and str(tmp_path / "s.npz") in printed.out
    assert "5 of 5 images" in printed.err and "4/4" in printed.err  # the progress bar


def test_freed_memory_is_kept_for_the_next_step(run, monkeypatch):
    calls = []
    monkeypatch.setattr("ditfast.sample.keep_freed_memory", lambda: calls.append("kept"))
    run("--num-samples", 1, steps=1)
    assert calls == ["kept"]


def test_a_grid_shows_at_most_64(run, tmp_path):
    run("--num-samples", 66, "--grid", tmp_path / "g.png", "--batch", 66, steps=1)
    assert Image.open(tmp_path / "g.png").size == (8 * 10 - 2, 8 * 10 - 2)


def test_images_depend_on_seed_class_and_guidance(run):
    base = ("--seeds", 3, 3, 4, "--classes", 1, 2, 1)
    images = run(*base)
    assert images.std() > 20 and len(np.unique(images)) > 50
    assert different(images[0], images[1]) and different(images[0], images[2])
    assert different(images, run(*base, "--cfg", 1, out="plain"))
    assert different(images, run(*base, "--cfg-channels", 1, out="one"))
    assert different(images, run(*base, "--cfg-interval", 0.5, 1, out="early"))
    np.testing.assert_array_equal(images, run(*base, out="again"))


def different(a, b):
    return (np.abs(a.astype(int) - b) > 2).mean() > 0.02


def test_sample_i_depends_only_on_its_seed(run):
    """A sample of a large run can be reproduced alone, from its number."""
    images = run("--num-samples", 4, "--seed", 10)
    start = draw_start(12, (3, 8, 8), 7)
    alone = run("--classes", start.label, "--seeds", 12, out="alone")
    np.testing.assert_allclose(alone[0], images[2], atol=1)
    assert different(alone[0], images[1])


def test_drawn_labels_cover_the_classes_and_are_recorded(run, tmp_path):
    labels = [draw_start(seed, (1,), 7).label for seed in range(200)]
    assert set(labels) == set(range(7))
    run("--num-samples", 2, steps=1)
    for i in range(2):
        assert Image.open(tmp_path / f"out/00000{i}.png").text == {"Description": f"class {labels[i]}, seed {i}"}


def test_noise_of_the_start_and_of_steps_are_independent():
    one, other = draw_start(0, (4, 64, 64), 10), draw_start(1, (4, 64, 64), 10)
    step = torch.randn(4, 64, 64, generator=one.generator)
    for later in (other.noise, step):
        for shift in range(-3, 4):  # two streams with one seed would agree at a small offset
            pair = torch.stack([one.noise.flatten(), later.flatten().roll(shift)])
            assert abs(torch.corrcoef(pair)[0, 1]) < 0.05


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++sde"])
def test_the_batch_does_not_matter(run, sampler):
    options = "--num-samples", 5, "--sampler", sampler
    images = [run(*options, "--batch", batch, out=str(batch)) for batch in (1, 4)]
    np.testing.assert_allclose(images[0].astype(int), images[1].astype(int), atol=1)


@pytest.mark.parametrize(
    "options", [("--sampler", "ddim"), ("--sampler", "EulerDiscreteScheduler"), ("--dtype", "bf16")]
)
def test_options_change_the_images(run, options):
    base = run("--classes", 1, 2)
    assert different(run("--classes", 1, 2, *options, out="other"), base) or "bf16" in options
    assert base.shape == (2, 8, 8, 3)


def test_bf16_is_close_to_fp32(run):
    """A model with random weights amplifies rounding, so only most of the pixels are compared."""
    exact, rounded = (run("--classes", 1, 2, "--cfg", 1, "--dtype", d, out=d).astype(int) for d in ("fp32", "bf16"))
    error = np.abs(exact - rounded)
    assert np.median(error) <= 8 and error.any()


def test_another_image_size_and_gray_pixels(run, save, tmp_path):
    assert run("--num-samples", 1, "--image-size", 12, "--allow-mismatch").shape == (1, 12, 12, 3)
    grey = run("--num-samples", 1, model=save(tmp_path / "grey", in_channels=1), out="drawn")
    assert grey.shape == (1, 8, 8, 3)
    assert (grey == grey[..., :1]).all() and grey.std() > 10


def test_a_bare_file_of_weights(run, tmp_path):
    model = DiT(input_size=4, hidden_size=384, depth=1, num_heads=6, in_channels=3, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert run("--num-samples", 1, model=tmp_path / "bare.pt", steps=1).shape == (1, 4, 4, 3)


def test_pixels_are_truncated():
    values = torch.tensor([-3.0, -1.0, -1 / 255, 0.0, 0.9 / 127.5, 1.1 / 127.5, 126.9 / 127.5, 1.0, 3.0])
    pixels = to_uint8(values.view(1, 1, 1, -1))
    assert pixels.shape == (1, 1, 9, 3)
    assert pixels[0, 0, :, 2].tolist() == [0, 0, 127, 128, 128, 129, 254, 255, 255]


def test_settings_record_what_the_images_depend_on(run, tmp_path):
    run("--num-samples", 1, "--batch", 2, steps=1)
    found = json.loads((tmp_path / "out/settings.json").read_text())
    assert found.keys() == {
        *("weights", "input_size", "classes", "seeds", "sampler", "steps", "noise_schedule", "dtype"),
        *("guidance", "decoder"),
    }
    assert found["guidance"] == {"scale": 4.0, "low": 0.0, "high": 1.0, "channels": 3}
