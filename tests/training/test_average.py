"""The average of the weights: its warm-up, and the warning while it is young."""

import json

import pytest
import torch

from ditfast import DiT, export
from ditfast.training.average import decay_at, initial_share, wants_warmup, youth


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
    assert youth(46_052, 0.9999, False) is None


def weights_of(checkpoint, tmp_path, kind):
    folder = tmp_path / f"{checkpoint.name}-{kind}"
    export.main([str(checkpoint), str(folder), "--weights", kind])
    return DiT.from_pretrained(folder).state_dict()


@pytest.mark.filterwarnings("ignore:after")
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


def test_a_young_average_is_shown_and_exported_with_a_warning(kit, tmp_path):
    young = "after 2 steps at --ema 0.99 the average of the weights is 98% initial weights"
    flags = ("--ema-warmup", "off", "--steps", 2, "--ema", 0.99, "--sample-every", 2, "--sample-steps", 2)
    with pytest.warns(UserWarning, match=f"the samples at step 2 show little yet: {young}"):
        out = kit.train("run", *flags)
    with pytest.warns(UserWarning, match=f"{young}: --weights model exports the last weights"):
        export.main([str(out), str(tmp_path / "model")])
