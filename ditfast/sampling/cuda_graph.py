"""Calls that are captured once and replayed, at almost no cost on the host.

Only `capture` needs a GPU; everything else runs, and is tested, without one. It has not run on a GPU yet.
"""

from collections.abc import Callable
from typing import Any

import torch

WARMUPS = 3  # libraries allocate and self-checks run before the capture


def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Capture ``run()`` in a CUDA graph.

    Returns:
        A function that replays it, and the tensor that each replay overwrites.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


class Graphs:
    """A function of tensors, replayed from one CUDA graph per combination of input shapes.

    Args:
        function: takes tensors and fixed keyword values, returns a tensor. Other tensors that it reads must keep
            their addresses.
        capture: see `capture`.
    """

    def __init__(self, function: Callable[..., torch.Tensor], capture: Callable = capture):
        self._function, self._capture = function, capture
        self._graphs: dict[tuple, tuple] = {}

    def __call__(self, tensors: tuple[torch.Tensor, ...], **fixed: Any) -> torch.Tensor:
        """The function's output, cloned so that later replays do not overwrite it."""
        key = (*((t.shape, t.dtype, t.device) for t in tensors), *fixed.values())
        if key not in self._graphs:
            inputs = [torch.empty_like(t).copy_(t) for t in tensors]
            self._graphs[key] = inputs, *self._capture(lambda: self._function(*inputs, **fixed))
        inputs, replay, out = self._graphs[key]
        torch._foreach_copy_(inputs, list(tensors))
        replay()
        return out.clone()
