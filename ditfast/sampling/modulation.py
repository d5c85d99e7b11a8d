"""The modulation of all blocks, which depends on timestep and label alone, computed ahead of the steps."""

import torch

from ditfast.sampling.stored import compute_rows, row_widths

TABLE_BYTES = 2**28  # of a table, unless another limit is given


class ModulationTable:
    """Shifts, scales and gates of a model at the timesteps of a run, for the labels that occur in it.

    Where not all of it fits into the limit it holds as many calls as do, one part after the other.

    Args:
        model: that `store` made.
        timesteps: those of the model's calls, in order.
        labels: a list of them, each once.
        limit: bytes that the table may take.
        device, dtype: of the latents.
    """

    def __init__(self, model, timesteps: list, labels: list[int], limit: int, device, dtype: torch.dtype):
        self._model, self._timesteps, self._dtype = model, timesteps, dtype
        self._labels = torch.tensor(sorted(labels), device=device)
        self._width = sum(row_widths(model))
        size = torch.float32.itemsize  # at most
        self._calls = limit // (max(len(labels), 1) * self._width * size)  # in one part
        self._first = self._times = self._rows = None

    def holds(self, call: int) -> bool:
        """Whether call number ``call`` is in the table, of more than one call: one alone gains nothing."""
        return self._calls > 1 and len(self._timesteps) > 1 and call < len(self._timesteps)

    def rows(self, call: int, t, y) -> torch.Tensor | None:
        """What `compute_rows` gives for a call, to rounding, side by side: (B, sum of the `row_widths`).

        Where a timestep or label is not in the table it is None; on a GPU, which would have to be waited for, NaN.
        """
        self._fill(call)
        t = t.to(torch.float32)
        at_time, is_timed = _find(self._times, t, 1e-6 * t.abs().clamp(min=1))  # samplers round times on their way
        at_label, is_labelled = _find(self._labels, y, 0)
        found = is_timed & is_labelled
        if not found.is_cuda and not found.all():
            return None
        index = torch.where(found, at_time * len(self._labels) + at_label, len(self._rows) - 1)
        return self._rows.index_select(0, index)

    def _fill(self, call):
        """Make the part that holds a call."""
        first = call - call % self._calls
        if first == self._first:
            return
        self._rows = None  # freed before the next is made
        times = sorted(set(self._timesteps[first : first + self._calls]))
        self._times = torch.tensor(times, dtype=torch.float32, device=self._labels.device)
        t = self._times.repeat_interleave(len(self._labels))
        y = self._labels.repeat(len(times))
        made = compute_rows(self._model, t, y, self._dtype)
        self._rows = made[0].new_full((len(t) + 1, self._width), torch.nan)
        torch.cat(made, dim=1, out=self._rows[:-1])
        self._first = first


def _find(values, wanted, slack):
    """Where in sorted values (n,) each that is wanted (B,) is, and whether it is there."""
    index = torch.searchsorted(values, (wanted - slack).contiguous()).clamp(max=len(values) - 1)
    return index, (values[index] - wanted).abs() <= slack
