"""The study's models: nine DiT sizes, varied as in the paper, and four kinds of conditioning."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from ditfast.data.glyphs import Glyphs
from ditfast.models import DiT, cost

SIZES = {"S": (2, 32, 2), "B": (3, 48, 3), "L": (4, 64, 4)}  # depth, width, heads; 16 channels per head
PATCHES = (8, 4, 2)
SCALING = [f"{size}/{patch}" for size in SIZES for patch in PATCHES]
VARIANTS = ["adaln_zero", "adaln", "cross_attention", "in_context"]
MIDDLE = "B/4"  # the model whose conditioning is varied
CONFIGS = [*SCALING, *(f"{MIDDLE} {kind}" for kind in VARIANTS[1:])]  # "B/4" itself is adaln_zero


@dataclass(frozen=True)
class Settings:
    """Settings shared by all models. The defaults are the study; `QUICK` is a dry run."""

    seeds: int = 3
    steps: int = 4000
    batch: int = 16
    learning_rate: float = 3e-3  # after warm-up, decays linearly to zero
    warmup: int = 100
    ema: float = 0.995
    schedule: str = "squaredcos_cap_v2"
    predict_xstart: bool = True
    samples: int = 2000
    sampling_steps: int = 25
    reference: int = 20000
    classifier_steps: int = 800


QUICK = replace(
    Settings(),
    seeds=1,
    steps=60,
    warmup=10,
    ema=0.9,
    samples=200,
    sampling_steps=5,
    reference=2000,
    classifier_steps=100,
)


class Run(NamedTuple):
    config: str  # one of `CONFIGS`
    seed: int


def runs(settings: Settings, configs=None) -> list[Run]:
    """All runs of a study: seed by seed, so that a study stopped early is fair, the longest first."""
    costly = sorted(configs or CONFIGS, key=gmacs, reverse=True)
    return [Run(config, seed) for seed in range(settings.seeds) for config in costly]


def build_model(config: str) -> DiT:
    """The model of a configuration such as "S/8" or "B/4 in_context", for glyphs of 16²."""
    name, _, conditioning = config.partition(" ")
    size, patch = name.split("/")
    depth, width, heads = SIZES[size]
    return DiT(
        input_size=16,
        patch_size=int(patch),
        in_channels=1,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        class_dropout_prob=0,  # no guidance, so no null label
        num_classes=Glyphs.num_classes,
        learn_sigma=False,
        conditioning=conditioning or "adaln_zero",
    )


def gmacs(config: str) -> float:
    """The paper's Gflops: multiply-adds of one sample's forward, in billions."""
    return sum(cost.macs(build_model(config)).values()) / 1e9
