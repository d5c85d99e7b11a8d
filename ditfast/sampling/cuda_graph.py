"""Calls that are captured once and then replayed: the host does as good as nothing for them.

What captures is behind `capture`, so that all the rest runs, and is tested, without a GPU. No GPU has run it yet.
"""

import torch

WARMUPS = 3  # the libraries allocate, and self-checks are answered, before the capture


def capture(run):
    """Capture ``run()`` in a CUDA graph: a function that replays it, and the tensor that each replay writes."""
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
    """A function of tensors, replayed: one graph for each of the shapes that it is called with.

    Args:
        function: of tensors and of fixed values; returns a tensor. What else it reads must stay in its place.
        capture: see `capture`.
    """

    def __init__(self, function, capture=capture):
        self._function, self._capture, self._graphs = function, capture, {}

    def __call__(self, tensors: tuple, **fixed):
        """What the function gives, in a tensor of its own, for no later replay may write into it."""
        key = (*((t.shape, t.dtype, t.device) for t in tensors), *fixed.values())
        if key not in self._graphs:
            inputs = [torch.empty_like(t).copy_(t) for t in tensors]
            self._graphs[key] = inputs, *self._capture(lambda: self._function(*inputs, **fixed))
        inputs, replay, out = self._graphs[key]
        torch._foreach_copy_(inputs, list(tensors))
        replay()
        return out.clone()
