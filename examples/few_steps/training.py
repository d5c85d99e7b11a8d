"""One model of digits for each objective, trained at the same cost."""

import math
import sys
from pathlib import Path

import torch
from tqdm import trange

from ditfast import DiT, create_diffusion
from ditfast.flow import MeanFlow, create_transport

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import digits  # of examples/digits.py: every fourth is held out

BATCH, RATE, WARMUP, AVERAGE = 256, 1e-3, 100, 0.995  # images, AdamW's, steps, decay
SCHEDULE = "squaredcos_cap_v2"
MODEL = {
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "num_classes": 10,
    "class_dropout_prob": 0.0,
    "learn_sigma": False,
    "hidden_size": 96,
    "depth": 5,
    "num_heads": 3,
}
SAMPLING = {  # what the models' config.json says
    "diffusion": {"objective": "diffusion", "noise_schedule": SCHEDULE, "vae": None},
    "flow": {"objective": "flow", "path_type": "Linear", "prediction": "velocity", "vae": None},
    "meanflow": {"objective": "meanflow", "vae": None},
}
# What a training step costs, in forwards of its batch: one forward, two for backward, and one for MeanFlow's tangent.
COST = {"diffusion": 3, "flow": 3, "meanflow": 4}


def losses(objective: str):
    """The loss of each sample (B,), a function of a model, images (B, 1, 8, 8) and labels (B,)."""
    if objective == "diffusion":
        diffusion = create_diffusion("", noise_schedule=SCHEDULE, learn_sigma=False)

        def loss(model, x, y):
            t = torch.randint(diffusion.num_timesteps, (len(x),))
            return diffusion.training_losses(model, x, t, {"y": y})["loss"]

        return loss
    # half of a batch learns averages, more than the paper's quarter: one step is all that is asked of the model
    method = create_transport("Linear", "velocity") if objective == "flow" else MeanFlow(interval_ratio=0.5)
    return lambda model, x, y: method.training_losses(model, x, {"y": y})["loss"]


class Training:
    """A model, the average of its weights, and the steps that are left.

    Args:
        objective: one of `SAMPLING`.
        steps: how many there will be; the learning rate ends at 0.
        seed: of weights, batches, times and noise.
    """

    def __init__(self, objective: str, steps: int, seed: int):
        torch.manual_seed(seed)
        self.images, self.labels = digits()
        self.model, self.average = (DiT(**MODEL, second_time=objective == "meanflow") for _ in range(2))
        self.average.load_state_dict(self.model.state_dict())
        self.average.eval().requires_grad_(False).sampling = SAMPLING[objective]
        self.loss, self.steps, self.done = losses(objective), steps, 0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0, fused=True)

    def step(self) -> float:
        """Train on a batch drawn with replacement; its loss."""
        chosen = torch.randint(len(self.images), (BATCH,))
        loss = self.loss(self.model, self.images[chosen], self.labels[chosen]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * learning_rate(self.done, self.steps)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - AVERAGE)
        self.done += 1
        return loss.item()


def learning_rate(step: int, steps: int) -> float:
    """Its share of the highest: up in a line, and down along a cosine to 0."""
    return min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2


def train(objective: str, forwards: int, seed: int) -> DiT:
    """The average of the weights of a model whose training costs so many forwards of a batch."""
    training = Training(objective, forwards // COST[objective], seed)
    for _ in trange(training.steps, unit="step", desc=objective, disable=None):
        training.step()
    return training.average
