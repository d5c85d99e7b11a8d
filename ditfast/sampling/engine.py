"""A model as samplers call it, with everything that a run can share computed once."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ditfast.models.dit import DiT
from ditfast.models.embed import LabelEmbedder
from ditfast.models.guidance import check_guidance, guide
from ditfast.models.packed import packed_weights
from ditfast.sampling.cuda_graph import Graphs
from ditfast.sampling.cuda_graph import capture as capture_cuda
from ditfast.sampling.modulation import TABLE_BYTES, ModulationTable
from ditfast.sampling.stored import fingerprint, run_stored, store, why_not_plain


class Engine:
    """A model wrapped for sampling, with the model's interface: ``engine(x, t, y)`` and ``engine.forward_with_cfg``.

    Weights are stored once, in the compute dtype; both halves of guidance share their patches; on a GPU a call is one
    CUDA graph. The output matches the model's own forward bit for bit, except for the rounding of one GEMM on half
    the patches. Inside `run`, the modulation of all blocks is precomputed and a CPU uses packed weights
    (`packed_weights`): both match up to rounding.

    A model that is not a plain `DiT` (swapped modules, hooks, LoRA, wrappers) is called directly.

    Args:
        model: a `DiT` in evaluation mode.
        dtype: autocast dtype of the calls; float32 for no autocast.
        table_bytes: memory limit of the precomputed modulation; 0 to disable it.
        compile: use torch.compile, which recompiles for each shape.
        graphs: replay CUDA graphs on a GPU.
        capture: replaces the CUDA graph capture, on any device; see `cuda_graph.capture`.

    Attributes:
        model: the given model.
        why_plain: why the model is called directly; None if it is not.
        why_no_graph: why no CUDA graph is replayed; None if one is.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        *,
        table_bytes: int = TABLE_BYTES,
        compile: bool = False,
        graphs: bool = True,
        capture: Callable | None = None,
    ):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        if isinstance(table_bytes, bool) or not isinstance(table_bytes, int) or table_bytes < 0:
            raise ValueError(f"table_bytes must be a non-negative integer, got {table_bytes!r}")
        self.model: Any = model  # a DiT, or something called like one
        self._dtype, self._limit, self._compile = dtype, table_bytes, compile
        self._wants_graphs, self._capture = graphs, capture
        self._schedule: tuple[list[float], list[int]] | None = None
        self._table: ModulationTable | None = None
        self._stored: DiT | None = None
        self._packed: DiT | None = None
        self._graphs: Graphs | None = None
        self._seen: tuple[list, str | None] | None = None
        self.refresh()

    @property
    def y_embedder(self) -> LabelEmbedder:
        return self.model.y_embedder

    def refresh(self) -> None:
        """Pick up changed weights and replaced modules. `run` calls this.

        PyTorch does not count writes through ``.data``: after one, call
        ``torch.autograd.graph.increment_version(weight)``.
        """
        self.why_plain, seen = why_not_plain(self.model), fingerprint(self.model)
        if (seen, self.why_plain) == self._seen:
            return
        self._alive = [*self.model.modules(), *self.model.parameters()]  # so that no address is reused
        self._seen = seen, self.why_plain
        self._stored = self._graphs = None
        if self.why_plain is not None:
            self.why_no_graph = self.why_plain
            plain: tuple[Any, Any] = self.model, getattr(self.model, "forward_with_cfg", None)
            self._plain = (torch.compile(plain[0]), torch.compile(plain[1])) if self._compile else plain
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
    def run(self, timesteps: Iterable[float], labels: Iterable[int]) -> Iterator["Engine"]:
        """Precompute for one run of a sampler, as a context manager.

        Args:
            timesteps: the timestep of each call, in order.
            labels: all labels that occur, including the null label.
        """
        self.refresh()
        self._schedule, self._calls = (list(timesteps), sorted(set(labels))), 0
        try:
            with self.packed():
                yield self
        finally:
            self._schedule = self._table = None

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Pack weights for the CPU once, instead of in every `run` inside this context."""
        if self._stored is None or self._packed is self._stored:
            yield
            return
        before, self._packed = self._packed, self._stored
        try:
            with packed_weights(self._stored):
                yield
        finally:
            self._packed = before

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, **second_time: torch.Tensor
    ) -> torch.Tensor:
        """Equivalent to ``model(x, t, y)``, with ``r=`` for a model that takes it."""
        if self._stored is None:
            return self._plain[0](x, t, y, **second_time)
        return self._predict(x, t, y, 1, **second_time)

    def forward_with_cfg(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        cfg_scale: float | torch.Tensor,
        cfg_channels: int | None = None,
        **second_time: torch.Tensor,
    ) -> torch.Tensor:
        """Equivalent to ``model.forward_with_cfg``."""
        if self._stored is None:
            return self._plain[1](x, t, y, cfg_scale, cfg_channels, **second_time)
        half, scale, channels = check_guidance(self._stored, x, cfg_scale, cfg_channels)
        return guide(self._predict(half, t, y, 2, **second_time), scale, channels)

    def _predict(self, x, t, y, copies, r=None):
        """The output (copies * B, C_out, S, S) for ``copies`` of x (B, C, S, S); rejects r, as the model does."""
        self._stored.check_input(x if copies == 1 else x.expand(copies, *x.shape).flatten(0, 1), t, y, r)
        rows = self._rows(x, t, y)
        tensors = (x, t, y) if rows is None else (x, t, y, rows)
        if self._graphs is None or torch.is_grad_enabled():
            return self._step(*tensors, copies=copies)
        try:
            return self._graphs(tensors, copies=copies)
        except RuntimeError as error:
            self._graphs, self.why_no_graph = None, f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"sampling without CUDA graphs: {self.why_no_graph}", stacklevel=4)
            return self._step(*tensors, copies=copies)

    def _rows(self, x, t, y):
        """The precomputed modulation of this call; None if it has none."""
        if self._schedule is None:
            return None
        if self._table is None:
            self._table = ModulationTable(self._stored, *self._schedule, self._limit, x.device, x.dtype)
        call, self._calls = self._calls, self._calls + 1
        return self._table.rows(call, t, y) if self._table.holds(call) else None
