"""The measurement of the operations as a table and as a picture."""

import sys

from report import WIDTH, digits, header_lines, ms_text
from rich import box
from rich.console import Console
from rich.table import Table

COLUMNS = ("op", "variant", "ms", "GB/s", "of copy", "vs eager", "vs compile", "parity / budget")
COLORS = {"eager": "#8d99ae", "compile": "#2b2d42", "ditfast": "#d1495b"}
MARKERS = {"fwd": "o", "bwd": "s"}


def is_green(case: dict) -> bool:
    return case["error"] is None and case["parity"]["reason"] is None


def show(result: dict) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(*header_lines(result["header"]), sep="\n", style="dim")
    groups = {}
    for case in result["cases"]:
        groups.setdefault((case["dtype"], *case["shape"], case["mode"]), []).append(case)
    for (dtype, b, n, d, mode), cases in groups.items():
        title = f"{dict(fwd='forward', bwd='backward')[mode]} · B={b} N={n} D={d} · {dtype}"
        console.print(table(title, COLUMNS, [(cells(c), style(c)) for c in cases]))
    console.print("of copy: time of copying the least bytes that the pass must move, over its time.", style="dim")
    for line in (*failures(result["cases"]), *result["notes"]):
        console.print(line, style="dim")


def table(title, columns, rows):
    made = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        made.add_column(name, justify="left" if name in ("op", "variant", "parity / budget") else "right")
    for texts, look in rows:
        made.add_row(*(texts.get(name, "") for name in columns), style=look)
    return made


def style(case):
    if not is_green(case):
        return "red"
    return "bold" if case["variant"].startswith("ditfast") else None


def cells(case):
    found = {"op": case["op"], "variant": case["variant"], "parity / budget": parity(case)}
    if case["interpreted"]:
        return found | {"ms": "interpreter"}
    if case["ms"] is None:
        return found
    faster = {f"vs {base}": f"{ratio:.2f}x" for base, ratio in case["speedup"].items()}
    rate = {"GB/s": digits(case["gb_per_s"]), "of copy": f"{case['copy_share']:.1%}"}
    return found | {"ms": ms_text(case["ms"]["median"])} | rate | faster


def parity(case):
    if case["error"] is not None:
        return "FAILED, see below"
    worst = case["parity"]
    return "parity FAILED, see below" if worst["reason"] else f"{worst['used']:.2f} {worst['tensor']}"


def failures(cases):
    for case in cases:
        if not is_green(case):
            why = case["error"] or case["parity"]["reason"]
            yield f"{case['variant']}, {case['op']} {case['mode']} {case['shape']} {case['dtype']}: {why}"


def plot(result: dict, path) -> None:
    """GB/s of every case over the bytes that it must move; a copy of as many bytes is the line above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in result["cases"] if case["ms"]]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for variant in dict.fromkeys(case["variant"] for case in cases):
        for mode, marker in MARKERS.items():
            chosen = [c for c in cases if c["variant"] == variant and c["mode"] == mode]
            points = [c["bytes"] / 1e6 for c in chosen], [c["gb_per_s"] for c in chosen]
            label = f"{variant}, {dict(fwd='forward', bwd='backward')[mode]}"
            axis.scatter(*points, s=18, alpha=0.8, marker=marker, color=COLORS[variant], label=label)
    line = sorted({c["bytes"]: c["copy_gb_per_s"] for c in cases}.items())
    axis.plot([size / 1e6 for size, _ in line], [rate for _, rate in line], "k--", linewidth=1, label="copy")
    axis.set(xscale="log", yscale="log", xlabel="MB that must be moved", ylabel="GB/s")
    axis.legend(fontsize=7, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    machine = result["header"]["machine"]
    figure.suptitle(f"Operations, {machine.get('gpu') or machine['cpu']}")
    figure.savefig(path, dpi=160)
    plt.close(figure)
