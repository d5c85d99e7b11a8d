"""A model as samplers call it, made to waste nothing over a run."""

import warnings
from contextlib import contextmanager
from functools import partial

import torch

from ditfast.models.dit import guide
from ditfast.models.packed import packed_weights
from ditfast.sampling.cuda_graph import Graphs
from ditfast.sampling.cuda_graph import capture as capture_cuda
from ditfast.sampling.modulation import TABLE_BYTES, ModulationTable
from ditfast.sampling.stored import fingerprint, run_stored, store, why_not_plain


class Engine:
    """Called as the model is: ``engine(x, t, y)`` and ``engine.forward_with_cfg(x, t, y, scale, channels)``.

    Weights are held once in the dtype in which they are read; both halves of guidance share their patches; on a GPU
    a call is one CUDA graph. All that gives the bits of the model's own forward, to the rounding of one GEMM for
    half the patches. Inside of `run` the modulation of all blocks is computed ahead, and a CPU takes weights that are
    packed for it (`packed_weights`): both are equal to rounding.

    A model that does anything else than a `DiT` does (swapped modules, hooks, LoRA, wrappers) is called as it is.

    Args:
        model: a `DiT` in evaluation mode.
        dtype: that of autocast around the calls; float32 for none.
        table_bytes: how much memory the modulation may take; 0 not to compute it ahead.
        compile: by torch.compile, each shape anew.
        graphs: whether to replay CUDA graphs on a GPU.
        capture: what captures them, on any device; None for CUDA's own.

    Attributes:
        model: the one that was given.
        why_plain: why it is called as it is; None if it is not.
        why_no_graph: why nothing is replayed; None if it is.
    """

    def __init__(
        self, model, dtype=torch.float32, *, table_bytes=TABLE_BYTES, compile=False, graphs=True, capture=None
    ):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        if isinstance(table_bytes, bool) or not isinstance(table_bytes, int) or table_bytes < 0:
            raise ValueError(f"table_bytes must be a whole number, at least 0, got {table_bytes!r}")
        self.model, self._dtype, self._limit, self._compile = model, dtype, table_bytes, compile
        self._wants_graphs, self._capture = graphs, capture
        self._schedule = self._table = self._packed = self._seen = None
        self.refresh()

    @property
    def y_embedder(self):
        return self.model.y_embedder

    def refresh(self) -> None:
        """Take the model as it is now: weights that were changed, modules that were replaced. `run` does it too."""
        self.why_plain, seen = why_not_plain(self.model), fingerprint(self.model)
        if (seen, self.why_plain) == self._seen:
            return
        self._alive = [*self.model.modules(), *self.model.parameters()]  # so that no address is used again
        self._seen = seen, self.why_plain
        self._stored = self._graphs = None
        if self.why_plain is not None:
            self.why_no_graph = self.why_plain
            plain = self.model, getattr(self.model, "forward_with_cfg", None)
            self._plain = tuple(map(torch.compile, plain)) if self._compile else plain
            return
        self._stored = store(self.model, self._dtype)
        run = torch.compile(run_stored, dynamic=False) if self._compile else run_stored
        self._step = partial(run, self._stored)
        self._choose_graphs()

    def _choose_graphs(self):
        on_gpu = next(self.model.parameters()).is_cuda
        self.why_no_graph = None
        if not self._wants_graphs:
            self.why_no_graph = "graphs=False"
        elif self._capture is None and not on_gpu:
            self.why_no_graph = "the model is not on a GPU"
        else:
            self._graphs = Graphs(self._step, self._capture or capture_cuda)

    @contextmanager
    def run(self, timesteps, labels):
        """A run of a sampler.

        Args:
            timesteps: what the model is called with, call by call, as numbers.
            labels: those that occur, the null label too, as numbers.
        """
        self.refresh()
        self._schedule, self._calls = (list(timesteps), sorted(set(labels))), 0
        try:
            with self.packed():
                yield self
        finally:
            self._schedule = self._table = None

    @contextmanager
    def packed(self):
        """Pack weights for the CPU now, instead of at every `run` inside of this."""
        if self._stored is None or self._packed is self._stored:
            yield
            return
        before, self._packed = self._packed, self._stored
        try:
            with packed_weights(self._stored):
                yield
        finally:
            self._packed = before

    def __call__(self, x, t, y, **second_time):
        """As ``model(x, t, y)``; with ``r`` for a model that takes it."""
        if self._stored is None:
            return self._plain[0](x, t, y, **second_time)
        return self._predict(x, t, y, 1, **second_time)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=None, **second_time):
        """As ``model.forward_with_cfg``."""
        if self._stored is None:
            return self._plain[1](x, t, y, cfg_scale, cfg_channels, **second_time)
        half, channels = self._stored.check_guidance(x, cfg_scale, cfg_channels)
        return guide(self._predict(half, t, y, 2, **second_time), cfg_scale, channels)

    def _predict(self, x, t, y, copies, r=None):
        """The output for ``copies`` of x (B, C, S, S): (copies * B, C_out, S, S); r is refused, as by the model."""
        self._stored.check_input(x if copies == 1 else x.expand(copies, *x.shape).flatten(0, 1), t, y, r)
        rows = self._rows(x, t, y)
        tensors = (x, t, y) if rows is None else (x, t, y, rows)
        if self._graphs is None or torch.is_grad_enabled():
            return self._step(*tensors, copies=copies)
        try:
            return self._graphs(tensors, copies=copies)
        except RuntimeError as error:
            self._graphs, self.why_no_graph = None, f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"sampling goes on without CUDA graphs: {self.why_no_graph}", stacklevel=4)
            return self._step(*tensors, copies=copies)

    def _rows(self, x, t, y):
        """The modulation of this call, if it was computed ahead."""
        if self._schedule is None:
            return None
        if self._table is None:
            self._table = ModulationTable(self._stored, *self._schedule, self._limit, x.device, x.dtype)
        call, self._calls = self._calls, self._calls + 1
        return self._table.rows(call, t, y) if self._table.holds(call) else None
