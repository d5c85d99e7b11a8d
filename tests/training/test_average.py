"""The average of the weights: its warm-up, and the warning while it is young."""

import json

import pytest
import torch

from ditfast import DiT, export
from ditfast.training.average import decay_at, initial_share, matures_at, wants_warmup, youth


@pytest.mark.parametrize("decay", (0.0, 0.8, 0.9999))
@pytest.mark.parametrize("warmup", (False, True))
def test_the_share_of_the_initial_weights(decay, warmup):
    share = 1.0
    for step in range(300):
        assert initial_share(step, decay, warmup) == pytest.approx(share, rel=1e-9)
        share *= decay_at(step, decay, warmup)


def test_warm_up_ends_at_the_decay():
    decays = [decay_at(step, 0.9, True) for step in range(200)]
    assert decays[:3] == [1 / 10, 2 / 11, 3 / 12]
    assert decays == sorted(decays) and decays[-1] == 0.9
    assert decay_at(0, 0.9, False) == 0.9


@pytest.mark.parametrize(
    ("choice", "steps", "expected"),
    [("auto", 49_999, True), ("auto", 51_000, False), ("on", 10**6, True), ("off", 1, False)],
)
def test_which_runs_warm_up(choice, steps, expected):
    assert wants_warmup(choice, 0.9999, steps) is expected


def test_when_an_average_is_young():
    text = "after 1,200 steps at --ema 0.9999 the average of the weights is 89% initial weights"
    assert youth(1200, 0.9999, False) == text
    assert youth(1200, 0.9999, True) is None
    assert matures_at(0.9999) == 46_050 and matures_at(0) == 1
    for decay in (0.0, 0.5, 0.9999):
        assert youth(matures_at(decay) - 1, decay, False) and not youth(matures_at(decay), decay, False)


def weights_of(checkpoint, tmp_path, kind):
    folder = tmp_path / f"{checkpoint.name}-{kind}"
    export.main([str(checkpoint), str(folder), "--weights", kind])
    return DiT.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("choice", ("auto", "off"))
def test_a_run_averages_this_way(kit, tmp_path, choice):
    out = kit.train("run", "--ema-warmup", choice, "--steps", 3, "--save-every", 1, "--ema", 0.99)
    first, *rest = sorted((out / "checkpoints").iterdir())
    average = weights_of(first, tmp_path, "ema")
    for step, checkpoint in enumerate(rest, 1):
        decay, now = decay_at(step, 0.99, choice == "auto"), weights_of(checkpoint, tmp_path, "model")
        average = {name: decay * value + (1 - decay) * now[name] for name, value in average.items()}
    found = weights_of(checkpoint, tmp_path, "ema")
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert not torch.equal(found["final_layer.linear.weight"], now["final_layer.linear.weight"])


def test_a_run_resumes_with_its_checkpoints_warm_up(kit, tmp_path):
    """Even if the flag says otherwise, and if the checkpoint predates the warm-up."""
    out = kit.train("run", "--ema-warmup", "on", "--steps", 2, "--ema", 0.9)
    kit.train("run", "--ema-warmup", "off", "--steps", 3, "--ema", 0.9, "--resume", "auto")
    about = newest(out) / "checkpoint.json"
    found = json.loads(about.read_text())
    assert found["ema_warmup"] is True
    del found["ema_warmup"]
    del found["checksum"], found["cpu"]  # which older checkpoints lack
    about.write_text(json.dumps(found))
    kit.train("run", "--steps", 4, "--ema", 0.9, "--resume", "auto")
    assert json.loads((newest(out) / "checkpoint.json").read_text())["ema_warmup"] is False


def newest(out):
    return max((out / "checkpoints").iterdir())


def test_an_average_that_stays_young_is_said_at_the_start_and_by_an_export(kit, tmp_path, capsys, recwarn):
    young = "warning: after 2 steps at --ema 0.99 the average of the weights is 98% initial weights: "
    flags = ("--ema-warmup", "off", "--steps", 2, "--ema", 0.99, "--sample-every", 1, "--sample-steps", 2)
    out = kit.train("run", *flags)
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if "initial" in line] == [
        f"{young}pass --ema-warmup on, or a smaller --ema"
    ]
    assert "initial" not in said.err and not [each for each in recwarn if "initial" in str(each.message)]
    export.main([str(out), str(tmp_path / "model")])
    assert f"{young}--weights model exports the last weights\n" in capsys.readouterr().err


def test_an_average_that_matures_says_when(kit, capsys):
    kit.train("run", "--ema-warmup", "off", "--steps", 30, "--ema", 0.8, "--sample-every", 10, "--dry-run")
    line = "average  holds initial weights until step 21: samples show little before"
    assert capsys.readouterr().out.splitlines()[-1] == line
    kit.train("run", "--ema-warmup", "off", "--steps", 30, "--ema", 0.8, "--sample-every", 25, "--dry-run")
    assert "initial" not in capsys.readouterr().out
