"""Measure training steps with a tangent: see bench_jvp.py."""

from copy import deepcopy
from pathlib import Path

import torch
from torch.func import jvp

from ditfast import DiT_models, use_backend
from ditfast.ops import contract
from ditfast.ops.backends.log import record
from harness import jsonfile, report, timing, usage
from harness.arguments import Parser, count, one_of, require_writable
from harness.errors import error_line
from harness.machine import header
from harness.verdicts import is_ours, may_be_timed, passes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = {"explicit": ("reference", False), "explicit+compile": ("reference", True)}  # backend, compiled
VARIANTS |= {"ditfast": ("auto", False), "ditfast+compile": ("auto", True)}
COLUMNS = ("variant", "ms", "peak MiB", "vs explicit", "vs explicit+compile", "parity / budget")
DEVICE = "cpu"


def make_model(options, dtype):
    torch.manual_seed(0)
    model = DiT_models[options.model](input_size=options.size, learn_sigma=False)
    del model.blocks[options.depth :]
    for p in model.parameters():  # zero gates would disable the blocks
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(dtype).eval()


def make_inputs(options, dtype):
    """Latents, times, labels, and the tangent's direction in latents and times."""
    generator = torch.Generator().manual_seed(0)
    shape = options.batch, 4, options.size, options.size
    x, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    t, dt = torch.rand(options.batch, generator=generator) * 1000, torch.full((options.batch,), 1000.0)
    return x, t, torch.arange(options.batch), v, dt


def make_step(model, inputs, backend, compiled):
    """A function that sets the gradients and returns u and its tangent."""
    x, t, y, v, dt = inputs

    def with_tangent(x, t, v, dt):
        u, du = jvp(lambda x, t: model(x, t, y), (x, t), (v, dt))
        return u, du.detach()  # inside the function, because a compiled graph differentiates all its outputs

    if compiled:
        with_tangent = torch.compile(with_tangent, fullgraph=True)

    def step():
        model.zero_grad()
        with use_backend(backend):
            u, du = with_tangent(x, t, v, dt)
            (u - (v - 0.5 * du)).square().mean().backward()
        return u, du

    return step


def results(model, step):
    """Results of a step: u, its tangent, and the gradient of each parameter."""
    u, du = step()
    named = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"u": u.detach(), "tangent of u": du, **{f"grad of {name}": value for name, value in named.items()}}


def judge(got, low, ref):
    """The worst verdict; outputs are checked per sample."""
    return contract.worst(contract.verdict(k, got[k], low[k], ref[k], k in ("u", "tangent of u")) for k in ref)


def measure(options, dtype):
    """The cases of one dtype."""
    model, inputs = make_model(options, DTYPES[dtype]), make_inputs(options, DTYPES[dtype])
    exact = deepcopy(model).double()
    x, t, y, v, dt = inputs
    ref = results(exact, make_step(exact, (x.double(), t.double(), y, v.double(), dt.double()), "reference", False))
    low = results(model, make_step(model, inputs, "reference", False))
    steps, cases = {}, {}
    for name in options.variants:
        case = cases[name] = {"dtype": dtype, "variant": name, "error": None, "parity": None, "ms": None}
        case |= {"peak_bytes": None, "speedup": {}, "backends": {}}
        steps[name] = make_step(model, inputs, *VARIANTS[name])
        try:
            with record() as ran:
                case["parity"] = judge(results(model, steps[name]), low, ref)
            case["backends"] = {op: sorted({*names}) for op, names in ran.items()}
        except Exception as error:  # a failing variant must not lose the others
            case["error"] = error_line(error)
        else:
            case["peak_bytes"] = usage.peak_bytes(steps[name], DEVICE)
    timed = {name: step for name, step in steps.items() if may_be_timed(cases[name])}
    times = timing.measure(timed, options.repeats, DEVICE)
    for name, ms in times.items():
        bases = {b: times[b]["median"] / ms["median"] for b in ("explicit", "explicit+compile") if b in times}
        cases[name] |= {"ms": ms, "speedup": bases}
    return list(cases.values())


def show(result):
    o, tables = result["options"], []
    for (dtype,), cases in report.groups(result["cases"], "dtype").items():
        blocks = "1 block" if o["depth"] == 1 else f"{o['depth']} blocks"
        title = f"{o['model']}, {blocks}, latents {o['size']}², B={o['batch']}, {dtype}"
        tables.append(report.table(title, COLUMNS, [(_cells(c), report.style(c)) for c in cases], COLUMNS[::5]))
    foot = [
        "ms: median, variants interleaved. peak: memory added by a step.",
        "parity: u, its tangent and all gradients against float64; budget: 2x that of explicit, + 2 ulp.",
    ]
    report.show(result, tables, foot + report.failures(result["cases"], lambda case: case["dtype"]))


def ran_in(case: dict) -> dict:
    """{variant: backends by operation} of a case of ditfast; {} for others and for older results."""
    return {case["variant"]: case["backends"]} if is_ours(case["variant"]) and "backends" in case else {}


def _cells(case):
    cells = {"variant": report.variant_text(case, ran_in(case)), "parity / budget": report.parity_text(case)}
    if case["ms"] is None:
        return cells
    peak = case["peak_bytes"]
    cells |= {"ms": report.ms_text(case["ms"]["median"]), "peak MiB": "" if peak is None else f"{peak / 2**20:.0f}"}
    return cells | {f"vs {base}": f"{ratio:.2f}x" for base, ratio in case["speedup"].items()}


def parse(argv=None):
    parser = Parser(prog="bench_jvp.py", description="Time a training step with a tangent through a DiT, on a CPU.")
    add = parser.add_argument
    add("--model", default="DiT-S/2", type=one_of(DiT_models), metavar="NAME", help="DiT-XL/2 … DiT-S/8 (DiT-S/2)")
    add("--depth", default=12, type=count, metavar="N", help="number of blocks (12)")
    add("--size", default=64, type=count, metavar="N", help="height and width of the latents (64)")
    add("--batch", default=4, type=count, metavar="N", help="samples (4)")
    add("--repeats", default=5, type=count, metavar="N", help="timed runs per case (5)")
    add("--dtypes", nargs="+", default=list(DTYPES), type=one_of(DTYPES), metavar="DTYPE", help="fp32, bf16 (both)")
    names = "any of " + ", ".join(VARIANTS)
    add("--variants", nargs="+", default=list(VARIANTS), type=one_of(VARIANTS), metavar="NAME", help=names)
    add("--json", type=Path, metavar="FILE", help="write all results, case by case")
    options = parser.parse_args(argv)
    options.plot = None
    try:
        require_writable(options)
    except ValueError as error:
        parser.error(error)
    return options


def main(argv=None) -> int:
    options = parse(argv)
    result = {"benchmark": "jvp", "header": header(DEVICE), "notes": [], "cases": []}
    result["options"] = {k: v for k, v in vars(options).items() if k not in ("json", "plot")}
    for dtype in options.dtypes:
        with report.busy(f"{dtype}: compute, compare and measure"):
            result["cases"] += measure(options, dtype)
        jsonfile.write(options.json, result)
    show(result)
    return 0 if passes(result["cases"], options.variants) else 1
