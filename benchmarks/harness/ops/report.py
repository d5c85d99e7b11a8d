"""The results for operations, as tables and a plot."""

from harness import report
from harness.report import OURS, THEIRS, digits, ms_text

COLUMNS = (
    "op",
    "variant",
    "ms",
    "GB/s",
    "of copy",
    "TFLOP/s",
    "of GEMM",
    "vs eager",
    "vs compile",
    "parity / budget",
)
PRODUCTS = ("TFLOP/s", "of GEMM")
TEXTS = ("op", "variant", "parity / budget")
TITLES = {"fwd": "forward", "bwd": "backward"}
COLORS = {"eager": THEIRS, "compile": "#2b2d42", "ditfast": OURS}
MARKERS = {"fwd": "o", "bwd": "s"}


def show(result: dict) -> None:
    tables = []
    for (dtype, (b, n, d), mode), cases in report.groups(result["cases"], "dtype", "shape", "mode").items():
        title = f"{TITLES[mode]} · B={b} N={n} D={d} · {dtype}"
        columns = [c for c in COLUMNS if c not in PRODUCTS or any("tflops" in case for case in cases)]
        tables.append(report.table(title, columns, [(_cells(c), report.style(c)) for c in cases], TEXTS))
    foot = ["of copy: time of a copy of the minimum bytes the pass must move, divided by its time."]
    if any("tflops" in case for case in result["cases"]):
        foot.append("of GEMM: rate of the pass's matrix products, divided by the library's for a large one.")
    report.show(result, tables, foot + report.failures(result["cases"], _what))


def _what(case):
    return f"{case['op']} {case['mode']} {case['shape']} {case['dtype']}"


def _cells(case):
    found = {"op": case["op"], "variant": case["variant"], "parity / budget": report.parity_text(case)}
    if case["interpreted"]:
        return found | {"ms": "interpreter"}
    if case["ms"] is None:
        return found
    faster = {f"vs {base}": f"{ratio:.2f}x" for base, ratio in case["speedup"].items()}
    if "tflops" in case:
        rate = {"TFLOP/s": digits(case["tflops"]), "of GEMM": f"{case['gemm_share']:.1%}"}
    else:
        rate = {"GB/s": digits(case["gb_per_s"]), "of copy": f"{case['copy_share']:.1%}"}
    return found | {"ms": ms_text(case["ms"]["median"])} | rate | faster


def plot(result: dict, path) -> None:
    """Plot GB/s of every case over the bytes it must move, and of a copy of the same size."""
    cases = [case for case in result["cases"] if case["ms"] and case["bytes"]]
    figure, ((axis,),) = report.subplots(figsize=(8, 4.5))
    for (variant, mode), chosen in report.groups(cases, "variant", "mode").items():
        points = [c["bytes"] / 1e6 for c in chosen], [c["gb_per_s"] for c in chosen]
        look = {"marker": MARKERS[mode], "color": COLORS[variant], "label": f"{variant}, {TITLES[mode]}"}
        axis.scatter(*points, s=18, alpha=0.8, **look)
    line = sorted({c["bytes"]: c["copy_gb_per_s"] for c in cases}.items())
    axis.plot([size / 1e6 for size, _ in line], [rate for _, rate in line], "k--", linewidth=1, label="copy")
    axis.set(xscale="log", yscale="log", xlabel="minimum MB moved", ylabel="GB/s")
    axis.legend(fontsize=7, ncols=2)
    report.save(figure, path, "Operations", result["header"])
