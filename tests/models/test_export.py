"""Exporters get operations they know, or one clear error."""

import inspect

import pytest
import torch
import torch.nn as nn

from ditfast.models import DiTBlock
from ditfast.models.conditioning import CONDITIONINGS
from ditfast.ops import reference
from ditfast.ops.backends.choice import use_backend


@pytest.mark.parametrize("grad", (False, True))
def test_onnx_gets_formulas_in_place_of_kernels(kit, grad, monkeypatch):
    model, batch = kit.tiny(depth=1).requires_grad_(grad), kit.batch()
    expected = model(*batch)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with use_backend("triton"), use_backend("host"):
        program = torch.export.export(model, batch, strict=False)
    assert not [node for node in program.graph.nodes if "ditfast" in str(node.target)]
    kit.close(program.module()(*batch), expected, 1e-5)


def test_width_of_a_norm_is_a_constant():
    """The older ONNX exporter accepts nothing else."""
    x, rows = torch.ones(2, 3, 8), torch.ones(2, 8)
    with pytest.warns(torch.jit.TracerWarning):
        graph = torch.jit.trace(reference.layer_norm_modulate, (x, rows, rows)).graph
    (width,) = list(graph.findNode("aten::layer_norm").inputs())[1].node().inputs()
    assert width.node().kind() == "prim::Constant"


def test_exporters_pass_every_argument_in_order(kit):
    """The older ONNX exporter adds the defaults of all others, keyword-only ones too."""
    model, batch = kit.tiny(), kit.batch()
    defaults = [each.default for each in inspect.signature(model.forward).parameters.values()][len(batch) :]
    kit.close(model(*batch, *defaults), model(*batch), 1e-6)
    out, hidden = model(*batch, [torch.tensor(1)])
    kit.close(out, model(*batch), 1e-6)
    kit.close(hidden[0], model(*batch, return_hidden=[1])[1][0], 1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_takes_any_batch(kit):
    model, batch = kit.tiny(depth=1), kit.batch()
    traced = torch.jit.trace(model, batch)
    other = [torch.cat([each, each.flip(0)]) for each in batch]
    kit.close(traced(*other), model(*other), 1e-6)


def test_symbolic_trace_is_rejected(kit):
    layers = [kind.block(32, 2) for kind in CONDITIONINGS.values()]
    for module in (kit.tiny(), kit.tiny().final_layer, *layers):
        with pytest.raises(TypeError, match="got a Proxy: use torch.export"):
            torch.fx.symbolic_trace(module)


def test_rows_of_modulation_are_not_chunked(kit):
    """Chunks of quanto's quantized tensors claim the shape of the whole tensor."""

    class Quantized(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            assert function not in (torch.Tensor.chunk, torch.Tensor.split, torch.chunk, torch.split)
            return super().__torch_function__(function, types, args, kwargs or {})

    class QuantizedLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x).as_subclass(Quantized)

    block = kit.fill(DiTBlock(32, 2))
    x, c = kit.arr("tokens", (2, 5, 32)), kit.arr("c", (2, 32))
    expected = block(x, c)
    quantized = QuantizedLinear(32, 192)
    quantized.load_state_dict(block.adaLN_modulation[1].state_dict())
    block.adaLN_modulation[1] = quantized
    kit.close(block(x, c).as_subclass(torch.Tensor), expected, 1e-6)
