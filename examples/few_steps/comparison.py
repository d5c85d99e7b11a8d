"""Digits in few steps: of the requested class? How far from real ones, how different, and how long does it take?"""

import os
import statistics
import time
from pathlib import Path

import torch
import training
from training import digits

from ditfast import DiT, create_diffusion
from ditfast.evaluation.metrics import frechet_distance, moments
from ditfast.flow import MeanFlow, Sampler, create_transport

STEPS = (1, 2, 4, 25)
SHOWN = [k + 10 * i for k in (2, 4, 7) for i in range(4)]  # in the picture: four samples of each of three classes
TIMED, TIMES = 60, 5  # images, runs


def compare(models: Path, forwards: int, count: int) -> tuple[dict, dict]:
    """All that the table shows, and by objective and number of steps the images of the picture.

    Args:
        models: the folder of a model for each objective.
        forwards: what each training cost.
        count: samples of each model and number of steps, from the same noise.
    """
    known, held_out = digits(), digits(held_out=True)
    judge, reference, spread = _judge(*held_out), moments(held_out[0].flatten(1)), _spread(*held_out)
    noise, asked = _start(count)

    def about(images, labels):
        right, distance = _right(judge, images, labels), frechet_distance(*moments(images.flatten(1)), *reference)
        return {"right": right, "frechet": distance, "spread": _spread(images, labels) / spread}

    found = {
        "forwards": forwards,
        "batch": training.BATCH,
        "samples": count,
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "known": about(*known),  # what models are trained on
        "noise": about(noise, asked),
        "objectives": {},
    }
    shown, step_ms = {}, time_training_steps()
    for objective in training.COST:
        model = DiT.from_pretrained(models / objective).float().eval()
        steps = {}
        for n in STEPS:
            x = sample(objective, model, noise, asked, n)
            ms = _milliseconds(sample, objective, model, *_start(TIMED), n)
            steps[str(n)] = {**about(x, asked), "ms": ms}
            shown[objective, n] = x[SHOWN, 0]
        found["objectives"][objective] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_steps": forwards // training.COST[objective],
            "training_step_ms": step_ms[objective],
            "steps": steps,
        }
    return found, shown


@torch.no_grad()
def sample(objective: str, model, noise, y, steps: int):
    """Digits (B, 1, 8, 8) in [-1, 1] from noise, of classes y (B,): in each step one call of the model, unguided."""
    kwargs = {"y": y}
    if objective == "diffusion":
        diffusion = create_diffusion(f"ddim{steps}", noise_schedule=training.SCHEDULE, learn_sigma=False)
        x = diffusion.ddim_sample_loop(model, noise.shape, noise=noise, model_kwargs=kwargs)
    elif objective == "flow":
        solver = Sampler(create_transport("Linear", "velocity"))
        run = solver.sample_ode(sampling_method="euler", num_steps=steps + 1, last_only=True)
        x = run(noise, model, **kwargs)[-1]
    else:
        x = MeanFlow().sample(model, noise, y, steps)
    return x.clamp(-1, 1)


def time_training_steps(rounds: int = 8) -> dict[str, float]:
    """Milliseconds of a training step of each objective, medians of rounds in turns."""
    trainings = {objective: training.Training(objective, 100, 0) for objective in training.COST}
    found = {objective: [] for objective in trainings}
    for _ in range(rounds):
        for objective, each in trainings.items():
            found[objective].append(_seconds(each.step))
    return {objective: 1e3 * statistics.median(times[1:]) for objective, times in found.items()}


def _start(count):
    """Noise (count, 1, 8, 8) and classes (count,), in turns."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10


def _judge(images, labels):
    from sklearn.svm import SVC

    return SVC(C=10).fit(images.flatten(1), labels)


def _right(judge, images, labels) -> float:
    """The share that the judge takes for its class."""
    return float((judge.predict(images.flatten(1)) == labels.numpy()).mean())


def _spread(images, labels) -> float:
    """The distance between two of a class: the median, and of these the mean over classes."""
    return float(torch.stack([torch.pdist(images[labels == k].flatten(1)).median() for k in range(10)]).mean())


def _milliseconds(work, *args) -> float:
    """The median of some calls after a first one."""
    return 1e3 * statistics.median([_seconds(work, *args) for _ in range(TIMES + 1)][1:])


def _seconds(work, *args) -> float:
    begin = time.perf_counter()
    work(*args)
    return time.perf_counter() - begin
