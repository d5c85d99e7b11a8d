"""The results for attention, as tables and a plot."""

from harness import report
from harness.report import digits, ms_text
from harness.verdicts import is_ours

COLUMNS = ("variant", "ms", "TFLOP/s", "of floor", "floor by", "vs best peer", "parity / budget", "kernels")
TEXTS = ("variant", "parity / budget", "kernels")
TITLES = {"fwd": "forward", "bwd": "backward", "both": "forward + backward"}


def show(result: dict) -> None:
    tables = []
    for (dtype, (b, n, dim), mode), cases in report.groups(result["cases"], "dtype", "shape", "mode").items():
        d = cases[0]["head_dim"]
        title = f"{TITLES[mode]} · B={b} N={n} d={d} H={dim // d} · {dtype}"
        tables.append(report.table(title, COLUMNS, [(_cells(c), report.style(c)) for c in cases], TEXTS))
    report.show(result, tables, [_ceiling(result["ceiling"]), *report.failures(result["cases"], _what)])


def _what(case):
    return f"{TITLES[case['mode']]} {case['shape']} {case['dtype']}"


def _ceiling(ceiling):
    rates = ", ".join(f"{dtype} {digits(v)} TFLOP/s" for dtype, v in ceiling.items() if dtype != "copy_gb_per_s")
    return (
        f"floor: the minimum bytes at {digits(ceiling['copy_gb_per_s'])} GB/s, or the FLOPs at the GEMM rate, {rates}"
    )


def _cells(case):
    found = {"variant": case["variant"], "parity / budget": report.parity_text(case)}
    if case["ms"] is None:
        return found
    best, kernels = case["vs_best_peer"], case["kernels"]
    return found | {
        "ms": ms_text(case["ms"]["median"]),
        "TFLOP/s": digits(case["tflops"]),
        "of floor": f"{case['floor_share']:.1%}",
        "floor by": case["floor_by"],
        "vs best peer": "" if best is None else f"{best:.2f}x",
        "kernels": ", ".join(name[:40] for name in kernels[:3]) + (" …" if len(kernels) > 3 else ""),
    }


def plot(result: dict, path) -> None:
    """Plot TFLOP/s at the true head dim: one panel per mode and head dim, one group of bars per N."""
    cases = [case for case in result["cases"] if case["ms"] and case["dtype"] == result["cases"][0]["dtype"]]
    dims = sorted({case["head_dim"] for case in cases})
    figure, axes = report.subplots(len(dims), 3, figsize=(12, 3 * len(dims)))
    for row, d in zip(axes, dims, strict=True):
        for axis, mode in zip(row, TITLES, strict=True):
            _panel(axis, [c for c in cases if c["head_dim"] == d and c["mode"] == mode])
            axis.set(title=f"{TITLES[mode]}, d={d}", xlabel="N", ylabel="TFLOP/s")
    axes[0][0].legend(fontsize=7)
    report.save(figure, path, f"Attention on packed qkv, {cases[0]['dtype']}", result["header"])


def _panel(axis, cases):
    tokens = sorted({case["shape"][1] for case in cases})
    variants = report.groups(cases, "variant")
    width = 0.8 / max(1, len(variants))
    for i, ((variant,), chosen) in enumerate(variants.items()):
        places = [tokens.index(c["shape"][1]) + (i - (len(variants) - 1) / 2) * width for c in chosen]
        hatch = "//" if is_ours(variant) else None
        axis.bar(places, [c["tflops"] for c in chosen], width, label=variant, hatch=hatch)
    axis.set_xticks(range(len(tokens)), tokens)
