"""Adapt a checkpoint's label table to other classes."""

import torch

from ditfast.checkpoints.infer import argument

STD = 0.02  # of new rows, as in a new model


def fit_labels(table: torch.Tensor, old: dict, new: dict) -> tuple[torch.Tensor, str | None]:
    """Fit the label table to another model: redraw all label rows if the number of classes differs, else keep them.

    Args:
        table: (num_classes, plus 1 with a null label; D).
        old, new: arguments of the table's model and of the new one.

    Returns:
        The table, and a line about the change or None.
    """
    (was, had_null), (count, has_null) = (_labels(config) for config in (old, new))
    if len(table) != was + had_null or (was, had_null) == (count, has_null):
        return table, None
    fresh = torch.randn(count + has_null, table.shape[1], device="cpu").mul_(STD).to(table)
    if count == was:
        fresh[:count] = table[:count]
    if had_null and has_null:
        fresh[count] = table[was]
    made = [f"the rows of {count} labels instead of {was}"] * (count != was)
    made += ["the row of the null label"] * (has_null and not had_null)
    if not made:
        return fresh, "the row of the null label is dropped; all else is as in the checkpoint"
    return fresh, f"new: {' and '.join(made)}; all else is as in the checkpoint"


def _labels(config):
    """The number of classes, and whether there is a null label."""
    return argument(config, "num_classes"), argument(config, "class_dropout_prob") > 0
