"""CUDA graphs, streams, and the self-check during capture."""

import pytest
import torch
from gpu.gpu_cases import KERNELS, problem

from ditfast import DiTBlock, ops
from ditfast.ops.backends import fastest, selfcheck
from ditfast.ops.backends.log import record

pytestmark = pytest.mark.gpu
SIZE = (4, 256, 1152)
GEMMS = ("mlp", "patch_embed", "qkv_attention")  # the library may choose another algorithm
TOLERANCE = 2**-7  # of a tensor's largest value: that is an ulp of bf16


def forward_backward(made, name, leaves, grads):
    outputs = made.call(*leaves, backend=name)
    wanted = [t for t in leaves if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


def captured(run):
    """Capture ``run()``; return the graph and the tensors that replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def assert_same(name, got, expected):
    for a, b in zip(got, expected, strict=True):
        if name in GEMMS:
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE * b.abs().max().item())
        else:
            assert torch.equal(a, b)


def change(leaves):
    with torch.no_grad():
        for t in leaves:
            t.mul_(0.5).add_(0.25)


@pytest.mark.parametrize("name, kernel", KERNELS)
def test_replay_equals_a_call(name, kernel):
    made = problem(name, kernel, "bf16", SIZE, "cuda")
    leaves = made.inputs()
    grads = made.grads(made.call(*leaves, backend=kernel))
    graph, results = captured(lambda: forward_backward(made, kernel, leaves, grads))
    change(leaves)
    graph.replay()
    assert_same(name, results, forward_backward(made, kernel, leaves, grads))


def test_replay_of_a_block():
    torch.manual_seed(0)
    block = DiTBlock(1152, 16).cuda().bfloat16()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.02)  # a new block's gates are zero
    x, c = (torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in (SIZE, SIZE[::2]))
    grad = torch.randn_like(x)

    def run():
        with ops.use_backend("triton"):
            out = block(x, c)
        return [out, *torch.autograd.grad(out, [x, c, *block.parameters()], grad)]

    graph, results = captured(run)
    change([x, c])
    graph.replay()
    assert_same("mlp", results, run())


@pytest.mark.parametrize("name, kernel", KERNELS)
def test_streams_do_not_disturb_each_other(name, kernel):
    made = problem(name, kernel, "bf16", SIZE, "cuda")
    sets = [made.inputs() for _ in range(4)]
    for scale, leaves in enumerate(sets, 1):
        with torch.no_grad():
            leaves[0].mul_(scale)
    grads = made.grads(made.call(*sets[0], backend=kernel))
    expected = [forward_backward(made, kernel, leaves, grads) for leaves in sets]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in sets], []
    for stream, leaves in zip(streams, sets, strict=True):
        with torch.cuda.stream(stream):
            found.append(forward_backward(made, kernel, leaves, grads))
    torch.cuda.synchronize()
    for got, want in zip(found, expected, strict=True):
        assert_same(name, got, want)


@pytest.fixture
def unknown(monkeypatch, tmp_path):
    """Forget all answers of the self-check."""
    monkeypatch.setenv("DITFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(selfcheck, "_answers", {})
    monkeypatch.setattr(fastest, "_choices", {})


@pytest.mark.parametrize("name, other", [("layer_norm_modulate", "reference"), ("attention", "sdpa")])
def test_an_unknown_answer_counts_as_no_during_capture(unknown, name, other):
    made = problem(name, "triton", "bf16", SIZE, "cuda")
    leaves = [t.detach() for t in made.inputs()]
    made.call(*leaves, backend=other)  # the library's own first call allocates
    torch.cuda.synchronize()
    with record() as ran, torch.cuda.graph(torch.cuda.CUDAGraph()):
        made.call(*leaves, backend="auto")
    assert ran[name] == [other]
    assert not selfcheck._answers and not fastest._choices
    made.call(*leaves, backend="auto")
    assert selfcheck._answers, "the next call outside a capture checks"
