"""Bad input is rejected in one line that names the option, the rule and the value, before anything is written."""

import pytest

from ditfast.export import main as export


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--steps", 0), "--steps must be at least 1, got 0"),
        (("--lr", -1), "--lr must be in [0, inf), got -1.0"),
        (("--ema", 1), "--ema must be in [0, 1), got 1.0"),
        (("--betas", 0.9, 1), "--betas must be two numbers in [0, 1), got 0.9 1.0"),
        (("--clip", 0), "--clip must be positive, got 0.0"),
        (("--batch", 10, "--accumulate", 3), "--batch must be a multiple of ranks x accumulate = 1 x 3, got 10"),
        (("--hidden-size", 26), "--hidden-size must be a multiple of 4 and of --num-heads 3, got 26"),
        (("--patch-size", 3), "--patch-size must divide samples of 8 x 8, got 3"),
        (("--model", "DiT-B/3"), "did you mean 'DiT-B/"),
        (("--model", ""), "--model must be one of "),
        (("--data", "digts"), "--data must be digits, glyphs or a folder of images or latents, got 'digts'; did you"),
        (("--data", "/no/such/folder"), "got '/no/such/folder'"),
        (("--image-size", 9), "--image-size of digits must be 8, got 9"),
        (("--time-mean", 1), "--time-mean is for --objective flow or meanflow, got --objective diffusion"),
        (("--time-std", 1000, "--objective", "flow"), "--time-std must be in "),
        (("--target-from", 2, "--objective", "meanflow"), "--target-from must be "),
        (("--sample-steps", 1001, "--dry-run"), "--sample-steps must be at most 1000, got 1001"),
        (("--sample-every", 2, "--label-drop", 0), "--cfg 4 needs a null label"),
        (("--resume", "nowhere"), "--resume must be auto, a checkpoint or a run's folder, got nowhere"),
        (("--config", "nowhere.yaml"), "--config nowhere.yaml cannot be read"),
        (("--backend", "zzz"), "--backend must be one of auto, "),
        (("--backend", "cuda"), "--backend cuda cannot run: "),
        (("--seed", 2**64), "--seed must be at most"),
        (("--batch", 10**12), "--batch must be at most"),
        (("--workers", 10**6), "--workers must be at most"),
        (("--depth", 10**9), "--depth must be an integer in [0, 1024], got 1000000000"),
        (("--data", ""), "--data must be a path, got ''"),
        (("--resume", "x" * 300), "--resume cannot be xxx"),
        (("--parallel", "fsdp"), "--parallel fsdp needs torchrun, even for a single process"),
        (("--vae", "nowhere"), "--vae must be ema, mse or a folder, got 'nowhere'"),
    ],
)
def test_refused(kit, refused, flags, said):
    assert said in refused(*flags)
    assert not (kit.folder / "refused").exists()


def test_a_run_without_a_checkpoint_yet(kit, refused, capsys):
    run = kit.folder / "begun"
    run.mkdir()
    (run / "config.yaml").write_text("steps: 4")
    assert (
        refused("--resume", run)
        == f"error: --resume {run} has no checkpoint yet: use --resume auto to start at step 0"
    )
    with pytest.raises(SystemExit) as stopped:
        export([str(run), str(kit.folder / "model")])
    assert stopped.value.code == f"error: {run} has no checkpoint yet"


def test_a_batch_that_is_not_divisible_by_the_ranks(kit):
    results = kit.finish(kit.start("refused", "--batch", 7, world=2))
    assert all(text.splitlines()[-1].endswith("= 2 x 1, got 7") and code == 1 for code, text in results)


@pytest.mark.parametrize(
    "content, said",
    [
        ("stepz: 4", "unknown name 'stepz'; did you mean 'steps'?"),
        ("4", "must be a mapping, got str"),
        ("flip: 3", "flip must be true or false, got '3'"),
        ("compile: {a: 1}", "compile must be a single value, got {'a': '1'}"),
        ("[" * 9999, "nested too deep"),
        ("steps: [[4]]", "steps must be a single value, got [['4']]"),
        ("betas: [[0.9], 1]", "betas must be a single value, got [['0.9'], '1']"),
    ],
)
def test_a_bad_file(kit, refused, content, said):
    file = kit.folder / "run.yaml"
    file.write_text(content)
    assert said in refused("--config", file)


def test_an_unknown_flag_is_rejected(kit, capsys):
    with pytest.raises(SystemExit) as stopped:
        kit.train("refused", "--step", 4)
    assert stopped.value.code == 2 and "--steps" in capsys.readouterr().err


def test_a_run_is_not_overwritten(kit, refused):
    kit.train("run", "--steps", 2)
    assert "--out" in (text := refused(name="run")) and "step-00000002" in text and "--resume auto" in text


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--depth", 3), "model's depth was 2, is 3"),
        (("--conditioning", "adaln"), "model's conditioning was 'adaln_zero', is 'adaln'"),
        (("--seed", 1), "seed was 0, is 1"),
        (("--noise-schedule", "squaredcos_cap_v2"), "noise_schedule was 'linear'"),
        (("--data", "glyphs", "--image-size", 16), "model's "),
        (("--objective", "flow"), "--objective must be diffusion to resume "),
        (("--objective", "meanflow"), "--objective must be diffusion to resume "),
    ],
)
def test_a_checkpoint_of_another_run(kit, refused, flags, said):
    out = kit.train("run", "--steps", 2)
    text = refused("--resume", out, *flags)
    assert said in text and "step-00000002" in text


def test_a_folder_of_another_objective(kit, refused):
    out = kit.train("run", "--steps", 1, "--objective", "flow")
    named = f"--objective must be flow to resume {out / 'checkpoints' / 'step-00000001'}, got diffusion: "
    assert named in refused("--resume", "auto", name="run")
