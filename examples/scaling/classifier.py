"""A small glyph classifier, and the features used to compare samples."""

import hashlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from ditfast.data.glyphs import Glyphs
from ditfast.evaluation.metrics import moments

# Seeds of data that no DiT is trained on; training data have the seeds 0, 1, 2, …
TRAIN, REFERENCE, FLOOR, FRESH = 10_000, 10_001, 10_002, 10_003


class Classifier(nn.Module):
    """Maps glyphs (B, 1, 16, 16) to features (B, 64) and logits (B, 20)."""

    def __init__(self):
        super().__init__()
        widths = (1, 32, 32, 64, 64)
        pairs = list(zip(widths, widths[1:], strict=False))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.logits = nn.Linear(64, Glyphs.num_classes)

    def features(self, x):
        for i, conv in enumerate(self.convs):
            x = F.relu(conv(x))
            x = F.max_pool2d(x, 2) if i % 2 else x  # 16², 8², 4²
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x):
        return self.logits(self.features(x))


def train(steps: int) -> Classifier:
    """Train a classifier on endless glyphs."""
    torch.manual_seed(TRAIN)
    model, glyphs = Classifier(), Glyphs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x, y = glyphs.batch(range(step * 128, step * 128 + 128), TRAIN)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def judge_images(model: Classifier, x, y) -> tuple[torch.Tensor, float]:
    """Features (N, 64) of images (N, 1, 16, 16), and the fraction classified as its class y (N,)."""
    features = torch.cat([model.features(part) for part in x.split(500)])
    return features, (model.logits(features).argmax(1) == y).double().mean().item()


def judge_fresh_glyphs(model: Classifier, count: int, seed: int):
    """The moments of the features of fresh glyphs, and the accuracy on them."""
    features, accuracy = judge_images(model, *Glyphs().batch(range(count), seed))
    return moments(features), accuracy


def fingerprint(model: Classifier) -> str:
    """A name for these weights: FIDs are only comparable with the same features."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]
