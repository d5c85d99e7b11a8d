"""Calls of the public API with one argument that is wrong."""

import torch

from fuzzing.case import Case
from fuzzing.kit import MODEL
from fuzzing.values import HOSTILE, INF, NAN, short

NO_TENSOR = (None, 3, 2.5, "x", [1.0], {}, [[1, 2], [3, 4]])
NO_WHOLE = (None, "2", 2.5, NAN, -1, 0, True, [], 10**30)
NO_REAL = (None, "2", NAN, INF, -1.0, [], {})


def make_case(rng, kit) -> Case:
    return rng.choice((_forward, _forward, _guided, _op, _op, _diffusion, _diffusion, _flow, _metric, _names))(
        rng, kit
    )


def _tensor(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _spoil(rng, value):
    """A tensor that cannot replace ``value``: it has another rank, size, dtype or device."""
    if rng.random() < 0.3:
        return rng.choice(NO_TENSOR)
    return rng.choice([
        lambda: value[..., :-1], lambda: value[None], lambda: torch.cat([value, value]), lambda: value.to("meta"),
        lambda: value.flatten()[:1].squeeze(), lambda: value.to(torch.complex64), lambda: value.bool(),
    ])()  # fmt: skip


def _call(what, function, arguments, name, value, bad=True, says=None):
    arguments = {**arguments, name: value}
    shown = f"{tuple(value.shape)} {value.dtype} {value.device}" if torch.is_tensor(value) else short(value)
    return Case(f"{what}({name}={shown})", lambda: function(**arguments), bad, says or name)


def _model():
    from ditfast import DiT

    torch.manual_seed(0)
    return DiT(**MODEL).eval()


def _inputs():
    return {"x": _tensor(4, 3, 8, 8), "t": torch.tensor([1, 500, 0, 999]), "y": torch.tensor([0, 7, 3, 3])}


def _forward(rng, kit):
    inputs, name = _inputs(), rng.choice(("x", "t", "y", "return_hidden", "none"))
    if name == "none":
        return _call("DiT", _model(), inputs, "x", inputs["x"], False)
    if name == "return_hidden":
        value = rng.choice(([5], [-1], [0, 1], ["x"], [None], 0, "x", [0.5], [True], {}, 2.5))
        bad = None if value in ({}, [True], [0, 1]) and value != [0, 1] else True
        return _call("DiT", _model(), inputs, name, value, bad)
    value = _spoil(rng, inputs[name])
    if rng.random() < 0.2:
        label = rng.choice((8, -1, 2**40, -(2**63)))
        value = {"x": inputs["x"].half(), "t": torch.zeros(3), "y": torch.tensor([0, 0, 0, label])}[name]
    return _call("DiT", _model(), inputs, name, value, True, (name, "t must"))


def _guided(rng, kit):
    inputs = {**_inputs(), "cfg_scale": 1.5}
    name = rng.choice(("x", "t", "y", "cfg_scale", "cfg_channels"))
    value, bad = {
        "cfg_scale": lambda: (rng.choice((None, "x", [], {})), True),
        "cfg_channels": lambda: (rng.choice(("2", -1, 7, 2.5, 10**30, [])), True),
    }.get(name, lambda: (_spoil(rng, inputs[name]), True))()
    return _call("forward_with_cfg", _model().forward_with_cfg, inputs, name, value, bad, (name, "x must", "t must"))


def _op(rng, kit):
    from ditfast import ops

    t, rows = _tensor, {"x": (2, 4, 8), "y": (2, 4, 8), "gate": (2, 8), "shift": (2, 8), "scale": (2, 8)}
    shapes, others = {
        "layer_norm_modulate": ({k: rows[k] for k in ("x", "shift", "scale")}, {"eps": 1e-6}),
        "gated_residual": ({k: rows[k] for k in ("x", "y", "gate")}, {}),
        "gated_residual_layer_norm_modulate": (rows, {"eps": 1e-6}),
        "mlp": ({"h": (2, 4, 8), "w1": (16, 8), "b1": (16,), "w2": (8, 16)}, {}),
        "attention": ({"qkv": (2, 4, 48)}, {"num_heads": 2, "scale": 0.5}),
        "qkv_attention": ({"h": (2, 4, 8), "weight": (48, 8), "bias": (48,)}, {"num_heads": 2}),
        "patchify": ({"x": (2, 3, 4, 6)}, {"patch_size": 2}),
        "unpatchify": ({"tokens": (2, 6, 12)}, {"patch_size": 2, "grid": (2, 3)}),
        "patch_embed": (
            {"x": (2, 3, 4, 6), "weight": (8, 3, 2, 2), "bias": (8,), "pos_embed": (1, 6, 8)},
            {"patch_size": 2},
        ),
    }[op := rng.choice([each.name for each in ops.ALL])]
    arguments = {**{name: t(*shape) for name, shape in shapes.items()}, **others}
    name, bad = rng.choice([*arguments, "backend"]), True
    if name == "backend":
        value = rng.choice(("zzz", "", "cuda", 3, ("zzz",), "reference", {}, ["x"]))
        bad = False if value == "reference" else None if isinstance(value, tuple | list | dict) else True
    elif name in shapes:
        value = _spoil(rng, arguments[name])
        alone = name in ("h", "tokens", "qkv") or (name == "x" and "patch" in op)  # any batch is valid
        unclear = name in ("pos_embed", "w2") or (torch.is_tensor(value) and alone and value.dim())
        bad = None if unclear or (value is None and name == "bias") else True
    else:
        value = rng.choice({"eps": NO_REAL, "scale": ("x", [], NAN, INF)}.get(name, NO_WHOLE))
        bad = None if name == "grid" and value is None else True
    says = tuple(f"{each} must" for each in shapes) if name in shapes else name
    return _call(op, getattr(ops, op), arguments, name, value, bad, says)


def _zero(x, t, **_):
    return torch.cat([x, x], 1)


def _diffusion(rng, kit):
    """Functions and methods of `ditfast.diffusion`."""
    from ditfast.diffusion import create_diffusion

    diffusion = create_diffusion("4")
    x, t = _tensor(2, 3, 4, 4), torch.tensor([0, 3])
    options = {"timestep_respacing": "4", "noise_schedule": "linear", "diffusion_steps": 1000}
    loop = {"model": _zero, "shape": (2, 3, 4, 4), "device": "cpu"}
    function, arguments, changes = rng.choice([
        (create_diffusion, options, {
            "timestep_respacing": ("0", "-1", "x", "1001", "ddim7000", "4,x", 0, -1, 2.5, [], [0], {}, True, 10**30,
                                   "ddim" + "9" * 5000),
            "noise_schedule": ("x", "", None, 3, []),
            "diffusion_steps": (*NO_WHOLE, 10**9)}),
        (diffusion.q_sample, {"x_start": x, "t": t}, {"x_start": x, "t": t, "noise": x}),
        (diffusion.training_losses, {"model": _zero, "x_start": x, "t": t}, {
            "x_start": x, "t": t, "noise": x, "model": (None, 3)}),
        (diffusion.p_sample, {"model": _zero, "x": x, "t": t}, {"x": x, "t": t, "generator": (3, "x", [])}),
        (diffusion.ddim_sample, {"model": _zero, "x": x, "t": t}, {
            "x": x, "t": t, "eta": (NAN, -1, 2, INF, "x", None)}),
        (diffusion.p_sample_loop, loop, {
            "shape": (None, 3, (), (2, -1, 4, 4), "x", (2.5, 3, 4, 4)),
            "noise": x, "device": ("zzz", 3.5), "model": (None, 3)}),
        (diffusion.ddim_sample_loop, loop, {"noise": x, "eta": (NAN, 2, "x")}),
    ])  # fmt: skip
    name = rng.choice([*changes])
    values = changes[name]
    value = _spoil(rng, values) if torch.is_tensor(values) else rng.choice(values)
    unclear = value is None if name == "noise" else torch.is_tensor(value) and name in ("x", "x_start")
    bad = None if unclear else True
    return _call(
        getattr(function, "__name__", "?"),
        function,
        arguments,
        name,
        value,
        bad,
        (name, "x ", "t must", "not callable"),
    )


def _flow(rng, kit):
    """Functions and methods of `ditfast.flow`."""
    from ditfast.flow import MeanFlow, Sampler, create_transport

    transport, mean_flow = create_transport(), MeanFlow()
    x, t, numbers = _tensor(2, 3, 4, 4), torch.tensor([0.2, 0.9]), (NAN, -1, INF, "x", [])
    losses, samples = {"model": _zero, "x1": x, "t": t}, Sampler(transport)
    function, arguments, changes = rng.choice([
        (create_transport, {}, {
            "path_type": ("linear", None, [], {}, 3), "prediction": ("x", None, []), "loss_weight": ("x", [], 3),
            "train_eps": numbers, "sample_eps": numbers, "time_sampling": ("normal", None), "time_std": numbers,
            "time_shift": (*numbers, 0)}),
        (MeanFlow, {}, {
            "interval_ratio": (*numbers, 2), "adaptive_power": numbers, "adaptive_eps": (*numbers, 0),
            "guidance": (2,)}),
        (transport.training_losses, losses, {"x1": x, "t": t, "noise": x, "model": (None, 3)}),
        (mean_flow.training_losses, losses, {"x1": x, "t": t, "r": t - 0.1, "noise": x, "model": (None, 3)}),
        (samples.sample_ode, {"sampling_method": "euler"}, {
            "sampling_method": ("Euler", None, 3, []), "num_steps": (*NO_WHOLE, 1, 10**30), "atol": numbers}),
        (samples.sample_sde, {}, {
            "sampling_method": ("euler", []), "diffusion_form": ("x", {}), "diffusion_norm": numbers,
            "last_step": ("mean", 3), "last_step_size": (*numbers, 0, 1), "num_steps": (*NO_WHOLE, 2)}),
        (mean_flow.sample, {"model": _zero, "noise": x}, {"noise": x, "steps": NO_WHOLE, "model": (None, 3)}),
    ])  # fmt: skip
    name = rng.choice([*changes])
    value = _spoil(rng, changes[name]) if torch.is_tensor(changes[name]) else rng.choice(changes[name])
    whole = "x1" if "x1" in arguments else "noise"  # not compared with any other argument
    unclear = (
        torch.is_tensor(value) and name == whole or value is None and name in ("noise", "t", "r") and name != whole
    )
    says = (name, "x1 ", "t must", "not callable", "null_label", "noise must")
    return _call(function.__name__, function, arguments, name, value, None if unclear else True, says)


def _metric(rng, kit):
    from ditfast.evaluation import metrics

    mean, cov, many = torch.zeros(3), torch.eye(3), _tensor(9, 3)
    function, arguments, changes = rng.choice([
        (metrics.frechet_distance, {"mean1": mean, "cov1": cov, "mean2": mean, "cov2": cov}, {
            "mean1": (mean[:2], mean * NAN, None, "x", cov, ["a"]),
            "cov2": (mean, cov[:2], cov * NAN, None, cov * 1j, -cov)}),
        (metrics.inception_score, {"probabilities": torch.full((4, 2), 0.5)}, {
            "probabilities": (None, "x", torch.ones(4, 2), torch.zeros(0, 2), mean), "part": NO_WHOLE[:-1]}),
        (metrics.precision_recall, {"real": many, "fake": many, "k": 3}, {
            "real": (None, "x", many[:0], many * NAN, many[:3], mean), "fake": (many[:, :2], many[0], "x"),
            "k": (0, -1, 9, 10**30, 2.5, None, "3", NAN)}),
        (metrics.moments, {"features": many}, {"features": (None, "x", many[:1], many * INF, mean, [], [[]])}),
    ])  # fmt: skip
    name = rng.choice([*changes])
    return _call(function.__name__, function, arguments, name, rng.choice(changes[name]), True, (name, "features"))


def _names(rng, kit):
    """Functions that take a name."""
    import ditfast
    from ditfast.data import open_data
    from ditfast.diffusion import create_diffusion
    from ditfast.diffusion.schedulers import make_scheduler

    value = rng.choice([each for each in HOSTILE if not isinstance(each, list | dict)] + ["zzz"])

    def enter(backend):
        with ditfast.use_backend(backend):
            pass

    function, name = rng.choice([
        (enter, "backend"), (lambda model: ditfast.DiT_models[model], "model"),
        (lambda data: open_data(data), "data"),
        (lambda scheduler: make_scheduler(scheduler, create_diffusion("")), "scheduler"),
    ])  # fmt: skip
    return _call("a name", function, {}, name, value)
