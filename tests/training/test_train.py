"""What a run learns, prints and leaves behind."""

import re
from types import SimpleNamespace

import pytest
import torch

from ditfast import DiT, train
from ditfast.export import main as export
from ditfast.models import cost
from ditfast.training import monitor
from ditfast.training.loss_step import LossStep
from ditfast.training.weights import Weights


def test_digits_are_learned(kit):
    options = ["--depth", 3, "--hidden-size", 48, "--steps", 200, "--batch", 32, "--lr", "2e-3", "--warmup", 20]
    out = kit.train("digits", *options, "--log-every", 50, "--save-every", 200, "--no-learn-sigma", "--seed", 3)
    losses = [line["loss"] for line in kit.lines(out)]
    assert losses[0] > 0.5 and losses[-1] < 0.32  # an untrained model's loss is 1


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention", "in_context"])
def test_every_conditioning_trains(kit, conditioning):
    losses = kit.losses(kit.train("run", "--conditioning", conditioning, "--steps", 4))
    assert losses[-1][1] < losses[0][1]


def test_files_of_a_run(kit):
    out = kit.train("run", "--sample-every", 3, "--sample-steps", 2)
    names = ["checkpoints", "config.yaml", "metrics.jsonl", "model", "samples", "tensorboard"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    last = kit.lines(out)[-1]
    assert last["step"] == 6 and last["samples"] == 36 and last["images_per_second"] > 0 and 0 < last["mfu"] < 1
    assert any((out / "tensorboard").iterdir())


def test_the_first_lines(kit, capsys):
    flags = ("--backend", "reference", "--precision", "bf16", "--objective", "flow", "--ema", 0)
    out = kit.train("run", "--steps", 2, *flags)
    said = capsys.readouterr().out.splitlines()
    model, data, device, steps, peak, begun = said
    assert model.startswith("model    DiT 2 x 24, patch 2, adaln_zero, 0.0")
    assert model.endswith("M parameters, for flow")
    assert data.startswith("data     digits: samples of 1 x 8 x 8, 10 classes, ") and "epochs of 1,797" in data
    assert device.startswith("device   cpu, 1 thread, ") and device.endswith(", bf16, backend reference")
    assert steps == "steps    2 of batch 6 = 1 rank x 1 pass x 6 samples; 12 samples"
    assert re.fullmatch(r"peak     [\d.e-]+ TFLOP/s in a matrix product, measured now: the 100% of MFU", peak)
    assert begun == "starting at step 0"
    kit.train("run", "--steps", 3, *flags, "--resume", "auto")
    assert capsys.readouterr().out.splitlines()[5] == f"resuming from {out / 'checkpoints/step-00000002'} (step 2)"


def test_a_log_has_a_line_for_each_report(kit, capsys):
    """And no bar, whose updates would be one line of many kilobytes."""
    kit.train("run", "--steps", 4, "--log-every", 2, "--save-every", 100)
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = [line.split(": loss ")[0] for line in said.splitlines() if line.startswith("step ")]
    assert lines == ["step 1 of 4", "step 2 of 4", "step 4 of 4"]
    assert re.search(r"^step 4 of 4: loss \d\.\d{4}, images/s [\d.e+]+, MFU \d+%, GiB [\d.]+$", said, re.MULTILINE)


def test_mfu_is_logged_with_its_denominator(kit, monkeypatch):
    """The rate of a matrix product, which another load of the machine changes, is measured by each part of a run."""
    for steps, rate in ((2, 1e9), (4, 2e9)):
        monkeypatch.setattr("ditfast.training.loop.matmul_rate", lambda device, dtype, rate=rate: rate)
        out = kit.train("run", "--steps", steps, "--resume", "auto")
    lines = kit.lines(out)
    assert [line["peak_tflops"] for line in lines] == [0.001, 0.001, 0.002, 0.002]
    per_image = [line["mfu"] * line["peak_tflops"] / line["images_per_second"] for line in lines]
    assert per_image == [pytest.approx(per_image[0])] * 4


def test_the_first_loss_is_logged_at_once(kit):
    lines = kit.lines(kit.train("run", "--log-every", 3, "--save-every", 100, "--steps", 5))
    assert [line["step"] for line in lines] == [1, 3, 5]
    whole = kit.lines(kit.train("whole", "--steps", 5))
    assert lines[0]["loss"] == whole[0]["loss"]
    assert lines[1]["loss"] == pytest.approx((whole[1]["loss"] + whole[2]["loss"]) / 2)


def test_the_betas_are_adams(kit, monkeypatch):
    update, seen = Weights.update, []

    def watch(weights, *given, **named):
        seen.append(weights.optimizer.param_groups[0]["betas"])
        update(weights, *given, **named)

    monkeypatch.setattr(Weights, "update", watch)
    out = kit.train("run", "--steps", 1, "--betas", 0.8, 0.95)
    assert seen == [(0.8, 0.95)] and "betas:\n- 0.8\n- 0.95\n" in (out / "config.yaml").read_text()


def test_the_saved_config_reproduces_the_run(kit):
    out = kit.train("run", "--accumulate", 2, "--compile", "--steps", 1, "--no-compile", "--clip", 2)
    again = kit.folder / "again"
    train.main(["--config", str(out / "config.yaml"), "--out", str(again), "--resume", "None"])
    assert kit.losses(again) == kit.losses(out)
    assert (again / "config.yaml").read_text().replace(str(again), str(out)) == (out / "config.yaml").read_text()


def test_flags_come_after_the_file(kit):
    (kit.folder / "run.yaml").write_text("steps: 3\nlr: 1e-3\nlearn_sigma: false\n")
    config, _ = train.parse_config(["--config", str(kit.folder / "run.yaml"), "--steps", "5"])
    assert (config.steps, config.lr, config.learn_sigma) == (5, 1e-3, False)


def test_defaults_are_the_papers():
    config, dry = train.parse_config([])
    assert not dry
    assert (config.lr, config.weight_decay, config.ema, config.batch, config.label_drop) == (
        1e-4,
        0,
        0.9999,
        256,
        0.1,
    )


def test_dry_run_prints_and_writes_nothing(kit, capsys):
    kit.train("run", "--dry-run", "--batch", 8, "--accumulate", 2)
    text = capsys.readouterr().out
    model = DiT(8, 2, 1, 24, 2, 3, num_classes=10)
    macs, parameters = sum(cost.macs(model).values()), sum(p.numel() for p in model.parameters())
    for part in (f"{parameters / 1e6:.2f} M parameters", f"{macs / 1e9:.4g} paper Gflops", "2 passes x 4 samples"):
        assert part in text
    assert f"{6 * macs * 48:.3g} FLOPs" in text and not (kit.folder / "run").exists()


@pytest.mark.parametrize(
    "precision, bytes_of_weights", [("fp32", 4 + 4 + 8 + 4), ("bf16", 6 + 4 + 8 + 4), ("pure_bf16", 6 + 6 + 8 + 4)]
)
def test_the_memory_of_a_dry_run(precision, bytes_of_weights):
    from ditfast.training.plan import estimate_memory

    config, _ = train.parse_config(
        ["--precision", precision, "--depth", "2", "--hidden-size", "24", "--num-heads", "3"]
    )
    model = DiT(8, 2, 1, 24, 2, 3, num_classes=10)
    found = estimate_memory(config, model, 1)
    kept = cost.kept_bytes(model, 256, {"bf16": "autocast", "pure_bf16": "bf16"}.get(precision, precision))
    assert found.pop("activations") == sum(kept.values())
    assert sum(found.values()) == bytes_of_weights * sum(p.numel() for p in model.parameters())


def test_the_average_is_exported_and_sampled_from(kit):
    out = kit.train("run")
    average, last = (DiT.from_pretrained(folder) for folder in (out / "model", _export(kit, out, "model")))
    assert not torch.equal(average.pos_embed + 1, last.pos_embed) and torch.equal(average.pos_embed, last.pos_embed)
    weight = average.blocks[1].mlp.fc1.weight
    assert not torch.equal(weight, last.blocks[1].mlp.fc1.weight)
    torch.testing.assert_close(weight, last.blocks[1].mlp.fc1.weight, rtol=0, atol=0.1)


def _export(kit, out, weights):
    folder = kit.folder / f"exported-{weights}"
    export([str(out), str(folder), "--weights", weights])
    with pytest.raises(SystemExit, match="exported-.* already has a model: .* --overwrite"):
        export([str(out), str(folder)])
    return folder


def test_export_of_nothing(kit):
    with pytest.raises(SystemExit, match="is neither a checkpoint nor a run"):
        export([str(kit.folder), str(kit.folder / "model")])


def test_glyphs_train(kit):
    losses = kit.losses(kit.train("run", "--data", "glyphs", "--image-size", 16, "--steps", 3))
    assert losses[-1][1] < losses[0][1]


def test_labels_are_dropped_as_often_as_requested(kit, monkeypatch):
    call, seen = LossStep._predict, []
    monkeypatch.setattr(LossStep, "_predict", lambda step, x, t, y: (seen.append(y), call(step, x, t, y))[1])
    kit.train("run", "--label-drop", 0.25, "--batch", 128, "--steps", 4)
    dropped = (torch.cat(seen) == 10).float()
    assert dropped.mean() == pytest.approx(0.25, abs=0.06)  # of 512: three standard deviations
    assert not torch.equal(dropped[:128], dropped[128:256])


def test_a_long_gradient_is_clipped_and_a_short_one_is_not(kit, monkeypatch):
    update, lengths = Weights.update, []

    def watch(weights, lr, decay, skip, scale):
        gradients = [value.grad.flatten() for value in weights.masters.values()]
        lengths.append((torch.cat(gradients).norm() / scale).item())
        update(weights, lr, decay, skip, scale)

    monkeypatch.setattr(Weights, "update", watch)
    before = [line["grad_norm"] for line in kit.lines(kit.train("run", "--clip", 1.5))]
    assert min(before) < 1.5 < max(before)
    assert lengths == pytest.approx([min(norm, 1.5) for norm in before], rel=1e-5)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_memory_on_other_systems(monkeypatch, platform, unit):
    monkeypatch.setattr(monitor.sys, "platform", platform)
    monkeypatch.setattr(monitor.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**30 // unit))
    assert monitor.memory_gib("cpu") == 3
