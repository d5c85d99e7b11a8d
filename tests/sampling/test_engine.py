"""The engine equals the plain loop bit for bit, or up to rounding if the modulation is precomputed."""

import gc
import weakref

import pytest
import torch
from tiny_models import TINY

from ditfast import DiT
from ditfast.sampling.engine import Engine
from ditfast.sampling.sampler import SAMPLERS, Guidance, Sampler, sample
from ditfast.sampling.start import draw_start

GUIDED = Guidance(2.0, 0.2, 0.7, 2)


@pytest.fixture
def model(ckpt):
    return DiT.from_pretrained(ckpt)


class PlainLoop(Engine):
    """Calls the model unchanged, except that the guided halves' patches are computed once."""

    def refresh(self):
        self._stored, self._plain = None, (self.model, self._guided)

    def _guided(self, x, *rest):
        def embed(x, backends):
            return DiT.embed_patches(self.model, x[: len(x) // 2], backends).repeat(2, 1, 1)

        self.model.embed_patches = embed
        try:
            return self.model.forward_with_cfg(x, *rest)
        finally:
            del self.model.embed_patches


def drawn(engine, guidance=GUIDED, name="ddim", steps=5, count=3, dtype=torch.float32):
    starts = [draw_start(seed, (3, 8, 8), 7) for seed in range(count)]
    return sample(engine, Sampler(name, steps, True, False), guidance, starts, "cpu", dtype)


def replay_on_cpu(run):
    """Stands in for a CUDA graph: what is captured reads and writes the same tensors every time."""
    out = run()
    return lambda: out.copy_(run()), out


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_equals_the_plain_loop_bit_for_bit(model, name):
    options = {"name": name, "steps": 8, "dtype": torch.bfloat16}
    for guidance, count in ((GUIDED, 3), (Guidance(1.0, 0, 1, 3), 1)):
        plain = drawn(PlainLoop(model, torch.bfloat16), guidance, count=count, **options)
        for capture in (None, replay_on_cpu):
            engine = Engine(model, torch.bfloat16, table_bytes=0, capture=capture)
            assert engine.why_plain is None and (engine.why_no_graph is None) == (capture is not None)
            assert torch.equal(drawn(engine, guidance, count=count, **options), plain)
        ahead = drawn(Engine(model, torch.bfloat16), guidance, count=count, **options)
        torch.testing.assert_close(ahead, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("calls_in_a_part", [1, 2, 4, 100])
def test_the_table_is_the_models_own_modulation_at_every_call(model, monkeypatch, dtype, calls_in_a_part):
    rows = []

    def keep(model, x, t, y, *rest, copies):
        rows.append((t, y, *rest))

    monkeypatch.setattr("ditfast.sampling.engine.run_stored", keep)
    labels, times = [0, 3, 7], [900.0, 500.5, 500.5, 20.0, 0.0]
    width = 4 * (2 * 6 + 2) * 32
    engine = Engine(model, dtype, table_bytes=calls_in_a_part * len(labels) * width)
    x, y = torch.randn(3, 3, 8, 8), torch.tensor([3, 7, 3])
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), autocast, engine.run(times, labels):
        for time in times:
            engine(x, torch.full((3,), time), y)
    assert len(rows) == 5 and all(len(row) == 2 + (calls_in_a_part > 1) for row in rows)
    for t, y, *found in rows:
        with torch.no_grad(), autocast:
            c = model.t_embedder(t) + model.y_embedder(y, False)
            layers = [*model.blocks, model.final_layer]
            wanted = torch.cat([layer.adaLN_modulation(c) for layer in layers], dim=1)
        for row in found:
            torch.testing.assert_close(row, wanted, rtol=0.02, atol=0.02)


def test_values_missing_from_the_table_are_computed(model):
    engine, x = Engine(model), torch.randn(2, 3, 8, 8)
    t, y = torch.tensor([400, 7]), torch.tensor([2, 5])
    with torch.no_grad(), engine.run([400, 300], [2]):
        for _ in range(3):  # one more call than announced
            assert torch.equal(engine(x, t, y), model(x, t, y))


def test_fewer_operations_run_than_in_the_plain_loop(model):
    def linears(engine):
        with torch.profiler.profile() as profile:
            drawn(engine, Guidance(2.0, 0, 1, 2), steps=6)
        counts = {event.key: event.count for event in profile.key_averages()}
        return counts["aten::linear"]

    blocks, steps = 2, 6
    assert linears(Engine(model, table_bytes=0)) - linears(Engine(model)) == (steps - 1) * (blocks + 1 + 2)


def replace_mlp(model):
    model.blocks[1].mlp = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh())


def hook(model):
    model.blocks[0].attn.register_forward_hook(lambda module, args, out: out * 1.5)


def patch(model):
    attn = model.blocks[0].attn
    attn.forward = lambda x, backends=None: -type(attn).forward(attn, x, backends)


def wrap(model):
    class Lora(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.25

    old = model.blocks[0].mlp.fc1
    model.blocks[0].mlp.fc1 = Lora(old.in_features, old.out_features)


def replace_guidance(model):
    model.forward_with_cfg = lambda *args: DiT.forward_with_cfg(model, *args) * 0.5


@pytest.mark.parametrize("change", [replace_mlp, hook, patch, wrap, replace_guidance, DiT.train])
def test_an_unusual_model_is_called_unchanged(model, change):
    torch.manual_seed(0)
    engine, before = Engine(model), drawn(model)
    change(model)
    torch.manual_seed(1)  # of labels that training drops
    changed = drawn(engine, Guidance(2.0, 0, 1, 2))
    assert engine.why_plain and not torch.equal(changed, before)
    torch.manual_seed(1)
    plain = PlainLoop(model)
    plain._plain = model, model.forward_with_cfg
    assert torch.equal(changed, drawn(plain, Guidance(2.0, 0, 1, 2)))


def write(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1.5)


def write_through_data(model):
    weight = model.blocks[1].mlp.fc2.weight
    weight.data.mul_(1.5)
    torch.autograd.graph.increment_version(weight)


def put(model):
    model.blocks[0].attn.proj.weight = torch.nn.Parameter(model.blocks[0].attn.proj.weight * -1)


def replace_block(model):
    torch.manual_seed(5)
    model.blocks[0] = type(model.blocks[0])(32, 2)
    torch.nn.init.normal_(model.blocks[0].adaLN_modulation[1].weight)


def set_eps(model):
    model.blocks[0].norm2.eps = 1.0


@pytest.mark.parametrize("change", [write, write_through_data, put, replace_block, set_eps])
def test_an_edit_between_runs_is_noticed(model, change):
    engine = Engine(model, torch.bfloat16, capture=replay_on_cpu)
    before = drawn(engine, dtype=torch.bfloat16)
    change(model)
    after = drawn(engine, dtype=torch.bfloat16)
    assert engine.why_plain is None and not torch.equal(after, before)
    assert torch.equal(after, drawn(Engine(model, torch.bfloat16), dtype=torch.bfloat16))


def test_weights_are_cast_once_and_freed_with_the_engine(model):
    engine = Engine(model, torch.bfloat16)
    stored = [weakref.ref(p) for p in engine._stored.parameters() if p.dtype == torch.bfloat16]
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(stored) == 2 * len(linears)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    weights = [list(m.weight.shape) for m in linears if m.weight.dim() == 2]
    with torch.profiler.profile(record_shapes=True) as profile:
        drawn(engine, dtype=torch.bfloat16)
    cast = [e.input_shapes[0] for e in profile.events() if e.name == "aten::_to_copy"]
    assert cast and not any(shape in weights for shape in cast)
    assert engine._table is None
    gc.disable()
    try:
        del engine
        assert not any(ref() is not None for ref in stored)
    finally:
        gc.enable()


def test_a_float32_engine_has_no_copies_of_weights(model):
    mine = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in Engine(model)._stored.parameters()} == mine


def test_models_in_one_process_are_independent(model, save, tmp_path):
    other = DiT.from_pretrained(save(tmp_path / "other", num_heads=4))
    engines = [Engine(each, capture=replay_on_cpu) for each in (model, other)]
    alone = [drawn(Engine(each)) for each in (model, other)]
    assert [torch.equal(drawn(e), want) for e, want in zip(engines, alone, strict=True)] == [True, True]
    assert not torch.equal(*alone)


def test_each_shape_is_captured_once_and_outputs_do_not_share_memory(model):
    captured = []

    def counted(run):
        captured.append(run)
        return replay_on_cpu(run)

    engine = Engine(model, capture=counted)
    for count in (3, 2, 3):
        assert torch.equal(drawn(engine, count=count), drawn(Engine(model), count=count))
    assert len(captured) == 2 * 2  # guided or not, with three or two samples
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 9]), torch.tensor([1, 2])
    with torch.no_grad():
        first, kept = engine(x, t, y), model(x, t, y)
        second = engine(-x, t, y)
    assert torch.equal(first, kept) and not torch.equal(first, second)


def test_without_a_capture_sampling_continues_and_says_why(model):
    def fail(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = Engine(model, capture=fail)
    with pytest.warns(UserWarning, match="without CUDA graphs: RuntimeError: operation not permitted"):
        got = drawn(engine)
    assert torch.equal(got, drawn(Engine(model))) and engine.why_no_graph.startswith("RuntimeError")


def test_gradients_of_the_latents_equal_the_models(model):
    x, t, y = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([3, 9]), torch.tensor([1, 2])
    got, want = (torch.autograd.grad(f(x, t, y).square().sum(), x)[0] for f in (Engine(model), model))
    torch.testing.assert_close(got, want)


def test_bad_input_is_rejected_as_by_the_model(model):
    engine, x, t, y = Engine(model), torch.randn(2, 3, 8, 8), torch.tensor([3, 9]), torch.tensor([1, 2])
    for bad in ((x[:, :2], t, y), (x, t[:0], y), (x, t, y.float())):
        errors = []
        for call in (model, engine):
            with pytest.raises((TypeError, ValueError)) as error:
                call(*bad)
            errors.append(str(error.value))
        assert errors[0] == errors[1]
    with pytest.raises(ValueError, match=r"x must have an even batch for guidance, got shape \(1, 3, 8, 8\)"):
        engine.forward_with_cfg(x[:1], t, y, 2.0)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got torch.int8"):
        Engine(model, torch.int8)
    with pytest.raises(ValueError, match="table_bytes must be a non-negative integer, got -1"):
        Engine(model, table_bytes=-1)


def test_times_rounded_by_a_sampler_are_in_the_table(model):
    engine, y = Engine(model), torch.tensor([1])
    times = [0.1, 0.7, 0.9]
    with torch.no_grad(), engine.run([1 - t for t in times], [1]):
        x = torch.zeros(1, model.in_channels, *model.x_embedder.img_size)
        for t in times:
            engine(x, torch.tensor([1.0]) - torch.tensor([t]), y)
            assert engine._table.rows(0, torch.tensor([1.0]) - torch.tensor([t]), y) is not None
        assert engine._table.rows(0, torch.tensor([0.1001]), y) is None


def test_a_second_time(model):
    """A model with a second time is called unchanged; one without it rejects it."""
    twice = DiT(**{**model.config, "second_time": True}).eval()
    x, y = torch.ones(2, model.in_channels, *model.x_embedder.img_size), torch.tensor([1, 2])
    t, r = torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.9])
    torch.nn.init.normal_(twice.final_layer.linear.weight)
    engine = Engine(twice)
    assert engine.why_plain == "it takes a second time"
    with torch.no_grad():
        assert torch.equal(engine(x, t, y, r=r), twice(x, t, y, r=r))
    with pytest.raises(ValueError, match="r must be None for a model with second_time=False"):
        Engine(model)(x, t, y, r=r)


def test_a_model_with_another_conditioning_is_called_unchanged(save, tmp_path):
    model = DiT.from_pretrained(save(tmp_path / "c", **{**TINY, "conditioning": "cross_attention"}))
    engine = Engine(model)
    assert engine.why_plain == "its conditioning is cross_attention"
    assert torch.equal(drawn(engine), drawn(model))
