"""The table of labels of a checkpoint, for other classes."""

import torch

from ditfast.checkpoints.infer import argument

STD = 0.02  # of new rows, as of a new model's


def fit_labels(table: torch.Tensor, old: dict, new: dict) -> tuple[torch.Tensor, str | None]:
    """The rows of another model's labels: all of them new if their number differs, else as they are.

    Args:
        table: (num_classes, and 1 for the null label if there is one; D).
        old, new: arguments of the model that the table is of, and of that which it is for.

    Returns:
        The table, and what was done in a line; None where nothing was.
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
        return fresh, "the row of the null label is left out; all else is as in the checkpoint"
    return fresh, f"new: {' and '.join(made)}; all else is as in the checkpoint"


def _labels(config):
    """The number of classes, and whether there is a null label."""
    return argument(config, "num_classes"), argument(config, "class_dropout_prob") > 0
