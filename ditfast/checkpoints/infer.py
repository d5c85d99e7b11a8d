"""Infer the arguments of `DiT` from weights, and check them."""

import inspect
import math
from typing import Any

from ditfast.models.dit import DiT
from ditfast.models.limits import check_arguments
from ditfast.models.presets import SIZES
from ditfast.suggest import did_you_mean

TABLE = "y_embedder.embedding_table.weight"
SECOND_TIME = "r_embedder.mlp.0.weight"  # only of models with one
HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}


class MissingArgumentError(ValueError):
    """The weights do not determine ``argument``, which must be given."""

    def __init__(self, text: str, argument: str, form: str = ""):
        super().__init__(f"{text}: give {argument}{form}")
        self.argument = argument


def infer_config(state: dict, **known: Any) -> dict[str, Any]:
    """Infer the arguments of a state dict's `DiT`.

    Args:
        state: weights with the names of the original.
        known: arguments that weights do not determine: ``num_heads`` for a hidden size that is not in the paper,
            ``input_size`` unless the grid is square, ``class_dropout_prob=0`` if there is no null label.

    Returns:
        Arguments for `DiT`. Those that are neither inferred nor known are omitted.

    Raises:
        ValueError: the weights are not those of a DiT, or (`MissingArgumentError`) do not determine an argument.
    """
    hidden, channels, patch, _ = _shape(state, "x_embedder.proj.weight", 4)
    _, tokens, _ = _shape(state, "pos_embed", 3)
    labels, _ = _shape(state, TABLE, 2)
    width, _ = _shape(state, "final_layer.linear.weight", 2)
    mlp, _ = _shape(state, "blocks.0.mlp.fc1.weight", 2)
    return {
        "input_size": _input_size(tokens, patch, known),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": _num_heads(hidden, known),
        "mlp_ratio": _mlp_ratio(mlp, hidden),
        "num_classes": labels - (known.get("class_dropout_prob", 0.1) > 0),
        "learn_sigma": width == 2 * channels * patch**2,
        "conditioning": _conditioning(state),
        **({"second_time": True} if SECOND_TIME in state else {}),
        **{name: value for name, value in known.items() if name == "class_dropout_prob"},
    }


def infer_file(state: dict, args: dict, known: dict) -> tuple[dict[str, Any], str | None]:
    """`infer_config` for weights stored with the arguments of their training script.

    Args:
        args: as in the original's checkpoints; ``num_classes`` is the data's.
        known: arguments of the requested model, which take precedence over ``args``, except for the null label.

    Returns:
        The arguments, and a line if nothing tells whether there is a null label, or None: one is assumed.
    """
    names, rows = ("num_heads", "input_size"), len(state.get(TABLE, ()))
    told = {name: args[name] for name in names if args.get(name) is not None} | known
    if args.get("class_dropout_prob") is not None:
        told["class_dropout_prob"] = args["class_dropout_prob"]
    elif args.get("num_classes") == rows:
        told["class_dropout_prob"] = 0.0  # a row for each class, and none for the null label
    elif rows - 1 in (args.get("num_classes"), known.get("num_classes")):
        told.pop("class_dropout_prob", None)  # there is a row for it, requested or not
    elif told.get("class_dropout_prob", 0.1) > 0 and ("num_classes" in known or "class_dropout_prob" not in known):
        # nothing tells: with other classes, a probability above 0 is the requested model's
        said = f"the last of {rows} rows of labels is assumed to be the null label's: if not, class_dropout_prob=0"
        return infer_config(state, **told), said
    return infer_config(state, **told), None


def check_model_config(config: dict, cls: type) -> dict:
    """The arguments, checked for ``cls``; a rectangle's list from JSON becomes a tuple.

    Raises:
        ValueError: an unknown or invalid argument.
    """
    names = [*inspect.signature(DiT).parameters, *inspect.signature(cls).parameters]
    if "_class_name" in config:
        raise ValueError(f"diffusers' {config['_class_name']} is no DiT: only its DiTTransformer2DModel is")
    for name in config:
        if name not in names:
            raise ValueError(f"unknown config key {name!r} for {cls.__name__}{did_you_mean(name, names)}")
    check_arguments(config)
    size = config.get("input_size")
    return {**config, "input_size": tuple(size)} if isinstance(size, list) else config


def argument(config: dict, name: str) -> Any:
    """An argument of `DiT`: the config's, or the default."""
    return config.get(name, inspect.signature(DiT).parameters[name].default)


def grid_of(config: dict) -> tuple[int, int]:
    """Rows and columns of patches."""
    size, patch = (argument(config, name) for name in ("input_size", "patch_size"))
    height, width = (size, size) if isinstance(size, int) else size
    return height // patch, width // patch


def _shape(state, name, dims):
    if name not in state or state[name].dim() != dims:
        found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
        raise ValueError(f"these are not the weights of a DiT: {name} {found}")
    return state[name].shape


def _input_size(tokens, patch, known):
    side = math.isqrt(tokens)
    if side * side == tokens:
        return side * patch
    if "input_size" not in known:
        raise MissingArgumentError(
            f"the weights are for {tokens} patches, which is not a square", "input_size", "=(height, width)"
        )
    return known["input_size"]


def _mlp_ratio(width, hidden):
    """A ratio with ``int(hidden * ratio) == width``, which the quotient may miss by rounding."""
    ratio = width / hidden
    return ratio if int(hidden * ratio) == width else math.nextafter(ratio, math.inf)


def _num_heads(hidden, known):
    heads = known.get("num_heads", HEADS.get(hidden))
    if heads is None:
        raise MissingArgumentError(
            f"the weights do not determine the heads of a model with hidden_size={hidden}", "num_heads"
        )
    return heads


def _conditioning(state):
    if "blocks.0.cross_attn.q.weight" in state:
        return "cross_attention"
    if "final_layer.adaLN_modulation.1.weight" not in state:
        return "in_context"
    rows, hidden = _shape(state, "blocks.0.adaLN_modulation.1.weight", 2)
    return "adaln" if rows == 4 * hidden else "adaln_zero"
