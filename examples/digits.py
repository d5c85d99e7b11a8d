"""Train a small class-conditional DiT on real handwritten digits: the model of `python -m ditfast.sample --demo`.

    OMP_NUM_THREADS=1 python examples/digits.py --out digits

Needs scikit-learn, safetensors and tqdm besides ditfast, and no download: scikit-learn includes the digits, 1797
images of 8 x 8 pixels by 13 writers (Alpaydin & Kaynak 1998, UCI). Every fourth is held out to judge the samples.
"""

import argparse
import math
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from tqdm import trange

from ditfast import DiT, create_diffusion

BATCH, WARMUP, DECAY = 128, 200, 10000  # images, steps, steps
SCHEDULE = "squaredcos_cap_v2"
MODEL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "num_classes": 10,
    "learn_sigma": False,
    "hidden_size": 96,
    "depth": 5,
    "num_heads": 3,
}


def digits(held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 8, 8) in [-1, 1] and labels (n,): the held-out ones, every fourth, or the training set."""
    data = load_digits()
    chosen = (torch.arange(len(data.target)) % 4 == 0) == held_out
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1  # from 0 … 16
    return images[chosen], torch.tensor(data.target)[chosen]


def train(steps: int, seed: int) -> DiT:
    """Train a model, and return its exponential moving average."""
    torch.manual_seed(seed)
    images, labels = digits()
    diffusion = create_diffusion("", noise_schedule=SCHEDULE, learn_sigma=False)
    model, ema = DiT(**MODEL).train(), DiT(**MODEL).eval()
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    progress = trange(steps, unit="step", disable=None)  # None: only on a terminal
    for _ in progress:
        chosen = torch.randint(len(images), (BATCH,))
        t = torch.randint(diffusion.num_timesteps, (BATCH,))
        loss = diffusion.training_losses(model, images[chosen], t, {"y": labels[chosen]})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - 0.999)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return ema


def learning_rate(step: int) -> float:
    """The factor of the peak rate: linear warm-up, then half a cosine down."""
    return min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * min(1, step / DECAY))) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="training steps (5000)")
    parser.add_argument("--out", default="digits", metavar="DIR", help="a new folder for the checkpoint (digits)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights, batches and noise (0)")
    o = parser.parse_args()
    if o.steps < 1:
        parser.error(f"--steps must be at least 1, got {o.steps}")
    if Path(o.out).exists():
        parser.error(f"--out must be a new folder, but {o.out} exists")
    model = train(o.steps, o.seed).half()  # 16 bits: half the size
    model.sampling = {"objective": "diffusion", "noise_schedule": SCHEDULE, "vae": None}
    model.save_pretrained(o.out)


if __name__ == "__main__":
    main()
