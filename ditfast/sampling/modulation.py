"""The modulation of all blocks, which depends on timestep and label alone, precomputed for a run."""

import torch

from ditfast.models.dit import DiT
from ditfast.sampling.stored import compute_rows, row_widths

TABLE_BYTES = 2**28  # default limit of a table


class ModulationTable:
    """A model's shifts, scales and gates for all timesteps and labels of a run.

    A table that would exceed the limit is computed in parts, each for as many calls as fit.

    Args:
        model: a model from `store`.
        timesteps: the timestep of each model call, in order.
        labels: the labels that occur, without duplicates.
        limit: size of the table, bytes.
        device, dtype: of the latents.
    """

    def __init__(
        self,
        model: DiT,
        timesteps: list[float],
        labels: list[int],
        limit: int,
        device: str | torch.device,
        dtype: torch.dtype,
    ):
        self._model, self._timesteps, self._dtype = model, timesteps, dtype
        self._labels = torch.tensor(sorted(labels), device=device)
        self._width = sum(row_widths(model))
        size = torch.float32.itemsize  # at most
        self._calls = limit // (max(len(labels), 1) * self._width * size)  # per part
        self._first: int | None = None  # call of the present part
        self._times = self._rows = torch.empty(0)

    def holds(self, call: int) -> bool:
        """Whether call number ``call`` is in the table; False if parts have one call, which gains nothing."""
        return self._calls > 1 and len(self._timesteps) > 1 and call < len(self._timesteps)

    def rows(self, call: int, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        """The rows of `compute_rows` for a call, up to rounding, concatenated: (B, sum of `row_widths`).

        If a timestep or label is not in the table: None on a CPU, NaN on a GPU, where checking would synchronize.
        """
        self._fill(call)
        t = t.to(torch.float32)
        at_time, is_timed = _find(self._times, t, 1e-6 * t.abs().clamp(min=1))  # samplers round their times
        at_label, is_labelled = _find(self._labels, y, 0)
        found = is_timed & is_labelled
        if not found.is_cuda and not found.all():
            return None
        index = torch.where(found, at_time * len(self._labels) + at_label, len(self._rows) - 1)
        return self._rows.index_select(0, index)

    def _fill(self, call):
        """Compute the part with a call."""
        first = call - call % self._calls
        if first == self._first:
            return
        self._rows = torch.empty(0)  # freed before the next part is computed
        times = sorted(set(self._timesteps[first : first + self._calls]))
        self._times = torch.tensor(times, dtype=torch.float32, device=self._labels.device)
        t = self._times.repeat_interleave(len(self._labels))
        y = self._labels.repeat(len(times))
        made = compute_rows(self._model, t, y, self._dtype)
        self._rows = made[0].new_full((len(t) + 1, self._width), torch.nan)
        torch.cat(made, dim=1, out=self._rows[:-1])
        self._first = first


def _find(values, wanted, slack):
    """The index in sorted values (n,) of each wanted one (B,), and whether it is there."""
    index = torch.searchsorted(values, (wanted - slack).contiguous()).clamp(max=len(values) - 1)
    return index, (values[index] - wanted).abs() <= slack
