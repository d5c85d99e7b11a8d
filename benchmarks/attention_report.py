"""The measurement of attention as tables and as a picture."""

import sys

from ops_report import failures, parity, style, table
from report import WIDTH, digits, header_lines, ms_text
from rich.console import Console

COLUMNS = ("variant", "ms", "TFLOP/s", "of floor", "floor by", "vs best peer", "parity / budget", "kernels")
TITLES = {"fwd": "forward", "bwd": "backward", "both": "forward + backward"}


def show(result: dict) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(*header_lines(result["header"]), sep="\n", style="dim")
    for (dtype, shape, mode), cases in _groups(result["cases"]).items():
        b, n, d = shape
        title = f"{TITLES[mode]} · B={b} N={n} d={cases[0]['head_dim']} H={d // cases[0]['head_dim']} · {dtype}"
        console.print(table(title, COLUMNS, [(_cells(c), style(c)) for c in cases]))
    console.print(_ceiling(result["ceiling"]), style="dim")
    for line in (*failures(result["cases"]), *result["notes"]):
        console.print(line, style="dim")


def _groups(cases):
    found = {}
    for case in cases:
        found.setdefault((case["dtype"], tuple(case["shape"]), case["mode"]), []).append(case)
    return found


def _ceiling(ceiling):
    rates = ", ".join(f"{dtype} {digits(v)} TFLOP/s" for dtype, v in ceiling.items() if dtype != "copy_gb_per_s")
    return f"floor: least bytes at {digits(ceiling['copy_gb_per_s'])} GB/s, or the arithmetic at a GEMM's {rates}"


def _cells(case):
    found = {"variant": case["variant"], "parity / budget": parity(case)}
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
    """TFLOP/s at the true head dim, a panel for each mode and head dim, a group of bars for each N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in result["cases"] if case["ms"] and case["dtype"] == result["cases"][0]["dtype"]]
    dims = sorted({case["head_dim"] for case in cases})
    figure, axes = plt.subplots(len(dims), 3, figsize=(12, 3 * len(dims)), squeeze=False, layout="constrained")
    for row, d in zip(axes, dims, strict=True):
        for axis, mode in zip(row, TITLES, strict=True):
            _panel(axis, [c for c in cases if c["head_dim"] == d and c["mode"] == mode])
            axis.set(title=f"{TITLES[mode]}, d={d}", xlabel="N", ylabel="TFLOP/s")
    axes[0][0].legend(fontsize=7)
    machine = result["header"]["machine"]
    figure.suptitle(f"Attention on packed qkv, {cases[0]['dtype']}, {machine.get('gpu') or machine['cpu']}")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _panel(axis, cases):
    tokens = sorted({case["shape"][1] for case in cases})
    variants = list(dict.fromkeys(case["variant"] for case in cases))
    width = 0.8 / max(1, len(variants))
    for i, variant in enumerate(variants):
        chosen = [c for c in cases if c["variant"] == variant]
        places = [tokens.index(c["shape"][1]) + (i - (len(variants) - 1) / 2) * width for c in chosen]
        hatch = "//" if variant.startswith("ditfast") else None
        axis.bar(places, [c["tflops"] for c in chosen], width, label=variant, hatch=hatch)
    axis.set_xticks(range(len(tokens)), tokens)
    axis.spines[["top", "right"]].set_visible(False)
