"""Values that nothing or little accepts, and those that a `DiT` accepts."""

import math

INF, NAN = float("inf"), float("nan")
DEEP: list = []
for _ in range(500):
    DEEP = [DEEP]
HOSTILE = (
    None, True, False, -1, 0, 1, 3, 5, 2.5, 8.0, -0.5, NAN, INF, 1e308, 10**9, 2**63, 10**30, -(10**9),
    "", "8", "x" * 1000, [], [8], [8, 8, 8], [8, -8], [10**9, 10**9], {}, {"a": 1}, DEEP,
)  # fmt: skip
CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
PRESENT = ("auto", "reference")


def is_whole(value, low=1, high=INF) -> bool:
    return type(value) is int and low <= value <= high


def is_number(value, low=-INF, high=INF) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


# values that fit a model with 8 x 8 pixels, patches of 2, width 32 and 2 heads
DIT_TAKES = {
    "input_size": lambda v: is_size(v) or (isinstance(v, list | tuple) and len(v) == 2 and all(map(is_size, v))),
    "patch_size": lambda v: v in (1, 2, 4, 8) and is_whole(v),
    "in_channels": lambda v: is_whole(v, 1, 64),
    "hidden_size": lambda v: is_whole(v, 4, 512) and v % 4 == 0,
    "depth": lambda v: is_whole(v, 0, 16),
    "num_heads": lambda v: is_whole(v, 1, 32) and 32 % v == 0,
    "mlp_ratio": lambda v: is_number(v, 1 / 32, 64),
    "class_dropout_prob": lambda v: is_number(v, 0, 1),
    "num_classes": lambda v: is_whole(v, 1, 10_000),
    "learn_sigma": lambda v: isinstance(v, bool),
    "backend": lambda v: v is None or v in PRESENT,
    "recompute_mlp": lambda v: isinstance(v, bool),
    "conditioning": lambda v: v in CONDITIONINGS,
    "timestep_freq_shift": lambda v: is_number(v, -1000, 100),
    "norm2_eps": lambda v: is_number(v, 1e-12, 1),
    "second_time": lambda v: isinstance(v, bool),
}
GOOD = {
    "input_size": (8, 16, (8, 12)),
    "patch_size": (1, 2, 4),
    "in_channels": (1, 4),
    "hidden_size": (32, 64),
    "depth": (1, 2),
    "num_heads": (1, 4),
    "mlp_ratio": (1, 4.0, 2.5),
    "class_dropout_prob": (0, 0.1, 1),
    "num_classes": (1, 10),
    "learn_sigma": (True, False),
    "backend": (None, "reference"),
    "recompute_mlp": (True, False),
    "conditioning": CONDITIONINGS,
    "timestep_freq_shift": (0, 1),
    "norm2_eps": (1e-5, 1e-6),
    "second_time": (True, False),
}
UNCLEAR = {  # may be accepted or refused
    "mlp_ratio": (True, 1e308, 10**9),
    "class_dropout_prob": (True, False),
    "norm2_eps": (1, 3, 5, 2.5, 8.0, 1e308, 10**9, 2**63, 10**30, True),
    "timestep_freq_shift": (True, False, 1e308, 10**9, 2**63, 10**30, -(10**9)),
    "learn_sigma": (0, 1),
    "recompute_mlp": (0, 1),
    "second_time": (0, 1),
}


def is_size(value) -> bool:
    return is_whole(value, 2, 64) and value % 2 == 0


def pick(rng, name):
    """Pick a value for an argument of `DiT`; return it and whether it is bad."""
    value = rng.choice(GOOD[name] if rng.random() < 0.2 else HOSTILE)
    unclear = any(value is each or (type(value) is type(each) and value == each) for each in UNCLEAR.get(name, ()))
    try:
        return value, None if unclear else not DIT_TAKES[name](value)
    except TypeError:  # unhashable, not comparable
        return value, True


def short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
