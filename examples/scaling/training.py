"""One run: train a DiT on glyphs, sample from the average of its weights, compare with fresh glyphs."""

import copy
import time

import classifier
import plan
import torch

from ditfast import create_diffusion
from ditfast.data.glyphs import Glyphs
from ditfast.evaluation.metrics import frechet_distance, moments


def measure(run: plan.Run, settings: plan.Settings, judge: classifier.Classifier, reference) -> dict:
    """Train and sample one run, and return its record.

    Args:
        judge: the classifier whose features are compared.
        reference: moments of the features of fresh glyphs.
    """
    start = time.perf_counter()
    model, loss = train(run, settings)
    trained = time.perf_counter()
    x, y = sample(model, run.seed, settings)
    sampled = time.perf_counter()
    features, accuracy = classifier.judge_images(judge, x, y)
    return {
        "config": run.config,
        "seed": run.seed,
        "gmacs": plan.gmacs(run.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fid": frechet_distance(*moments(features), *reference),
        "accuracy": accuracy,  # fraction classified as the requested class
        "train_loss": loss,
        "fresh_loss": fresh_loss(model, settings),
        "train_seconds": round(trained - start, 2),
        "sample_seconds": round(sampled - trained, 2),
    }


def train(run: plan.Run, settings: plan.Settings):
    """Train a DiT on endless glyphs: returns its averaged weights, and its loss over the last tenth of the steps."""
    torch.manual_seed(run.seed)
    model, glyphs = plan.build_model(run.config).train(), Glyphs()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    diffusion = _process(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0, fused=True)
    generator, losses = torch.Generator().manual_seed(run.seed), []
    for step in range(settings.steps):
        x, y = glyphs.batch(range(step * settings.batch, (step + 1) * settings.batch), run.seed)
        t = torch.randint(diffusion.num_timesteps, (len(x),), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        loss = diffusion.training_losses(model, x, t, {"y": y}, noise)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min((step + 1) / settings.warmup, 1 - step / settings.steps)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - settings.ema)
        losses.append(loss.item())
    last = losses[-max(1, settings.steps // 10) :]
    return average, sum(last) / len(last)


@torch.no_grad()
def sample(model, seed: int, settings: plan.Settings):
    """Sample equally many glyphs per class: images (N, 1, 16, 16) in [-1, 1], classes (N,)."""
    diffusion = _process(settings, f"ddim{settings.sampling_steps}")
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(settings.samples) % Glyphs.num_classes
    parts = []
    for labels in y.split(250):
        noise = torch.randn(len(labels), *Glyphs().shape, generator=generator)
        parts.append(diffusion.ddim_sample_loop(model, noise.shape, noise=noise, model_kwargs={"y": labels}))
    return torch.cat(parts).clamp(-1, 1), y


@torch.no_grad()
def fresh_loss(model, settings: plan.Settings) -> float:
    """The loss on glyphs outside all training data, with the same noise for every model."""
    diffusion = _process(settings)
    x, y = Glyphs().batch(range(settings.samples), classifier.FRESH)
    generator = torch.Generator().manual_seed(classifier.FRESH)
    noise = torch.randn(x.shape, generator=generator)
    t = torch.arange(len(x)) * diffusion.num_timesteps // len(x)  # evenly over all steps
    t = t[torch.randperm(len(x), generator=generator)]  # and over the classes
    parts = zip(x.split(250), t.split(250), y.split(250), noise.split(250), strict=True)
    losses = [diffusion.training_losses(model, x, t, {"y": y}, noise)["loss"] for x, t, y, noise in parts]
    return torch.cat(losses).mean().item()


def _process(settings, kept=""):
    return create_diffusion(
        kept, noise_schedule=settings.schedule, learn_sigma=False, predict_xstart=settings.predict_xstart
    )
