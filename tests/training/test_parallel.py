"""The same run on one rank and two, whole or sharded, in passes, checkpointed, compiled."""

import pytest
import torch

from ditfast import DiT

CLOSE = {"fp32": (2e-5, 1e-4), "pure_bf16": (2e-3, 2e-2)}


@pytest.fixture(scope="module")
def references():
    return {}


def compare(kit, got, expected, precision="fp32"):
    loss, norm = CLOSE[precision]
    for found, right in zip(kit.losses(got), kit.losses(expected), strict=True):
        assert found[0] == right[0]
        assert found[1] == pytest.approx(right[1], rel=loss)
        assert found[2] == pytest.approx(right[2], rel=norm)


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_equal_one(kit, parallel, precision):
    options = ["--precision", precision, "--clip", 0.5, "--steps", 4]
    one = kit.train("one", *options)
    two = kit.run("two", "--parallel", parallel, "--sample-every", 2, "--sample-steps", 2, *options, world=2)
    compare(kit, two, one, precision)
    ours, other = (DiT.from_pretrained(run / "model").state_dict() for run in (one, two))
    for name, value in ours.items():  # includes the null label's row, which only one of two shards has
        torch.testing.assert_close(other[name], value, rtol=0.1, atol=2e-3 if precision == "fp32" else 2e-2)
    assert (two / "samples" / "step-00000004.png").exists()


@pytest.mark.parametrize("options", [("--accumulate", 3), ("--checkpointing", "full"), ("--recompute-mlp",)])
def test_execution_options_do_not_change_the_result(kit, options):
    compare(kit, kit.train("other", *options), kit.train("plain"))


@pytest.mark.slow
def test_compiled(kit):
    compare(kit, kit.train("compiled", "--compile"), kit.train("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_by_blocks(kit, parallel):
    options = ["--compile", "--checkpointing", "full", "--parallel", parallel]
    compare(kit, kit.run("compiled", *options, world=2), kit.train("plain"))


def test_autocast_and_bf16_stay_near_float32(kit):
    losses = {p: kit.losses(kit.train(p, "--precision", p, "--lr", "1e-3")) for p in ("fp32", "bf16", "pure_bf16")}
    for precision in ("bf16", "pure_bf16"):
        pairs = zip(losses[precision], losses["fp32"], strict=True)
        assert all(got[1] == pytest.approx(right[1], rel=0.02) for got, right in pairs)
        assert losses[precision] != losses["fp32"]
