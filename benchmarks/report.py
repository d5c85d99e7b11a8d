"""A measurement as a table and as a picture."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 136  # where the output is not a terminal
TEXT = ("variant", "parity\n/ budget")
COLUMNS = (
    *("variant", "ms", "10–90 %", "TFLOP/s", "GMACs", "of\nGEMM", "peak\nGB", "kept\nMB", "U per\nblock"),
    *("vs\neager", "vs\ncompile", "parity\n/ budget"),
)
MODES = {"fwd": "forward", "fwd_bwd": "forward + backward"}


def busy(what: str):
    """A line on the terminal while something takes long."""
    return Console(stderr=True).status(what)


def show(result: dict) -> None:
    """Print header, table, footnotes and the backends that ran."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(*header_lines(result["header"]), sep="\n", style="dim")
    console.print(_table(result))
    for line in (*_foot(result), *result["notes"]):
        console.print(line, style="dim")


def header_lines(header):
    machine, versions, state = header["machine"], header["versions"], header["gpu_state"]
    name = machine["gpu"] if "gpu" in machine else f"{header['cpu']}, {machine['threads']} threads"
    if state:
        name += f" · SM {state['clocks.sm']} of {state['clocks.max.sm']} · memory {state['clocks.mem']}"
        name += f" · limit {state['power.limit']} · driver {state['driver_version']}"
    shown = [f"{k} {v}" for k, v in versions.items() if v]
    return name, " · ".join([*shown, f"commit {header['commit'] or 'unknown'}", header["date"]])


def _table(result):
    w = result["workload"]
    title = (
        f"{w['model']} {w['image_size']}² · {_blocks(w)} of "
        f"B={w['batch']} N={w['tokens']} D={w['dim']} H={w['heads']} · {w['dtype']}"
    )
    has_peak = any(case["peak_bytes"] is not None for case in result["cases"])
    columns = [c for c in COLUMNS if c != "peak\nGB" or has_peak]
    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in TEXT else "right", no_wrap=True)
    for mode, ceiling in result["ceiling"].items():
        table.add_row(MODES[mode], style="italic")
        for case in result["cases"]:
            if case["mode"] == mode:
                _add(table, columns, _cells(case), _style(case))
        _add(table, columns, _ceiling(ceiling), "dim")
        table.add_section()
    if result["kernels"]:
        case = result["kernels"]
        cells = {"variant": "triton kernels", "10–90 %": "interpreter", "parity\n/ budget": _parity(case)}
        _add(table, columns, cells, _style(case | cells))
    return table


def _blocks(workload):
    return "1 block" if workload["blocks"] == 1 else f"{workload['blocks']} blocks"


def _add(table, columns, cells, style):
    table.add_row(*(cells.get(name, "") for name in columns), style=style)


def is_green(case: dict) -> bool:
    return case["error"] is None and case["parity"]["used"] <= 1


def _style(case):
    if not is_green(case):
        return "red"
    return "bold" if case["variant"].startswith("ditfast") else None


def _cells(case):
    cells = {"variant": case["variant"], "parity\n/ budget": _parity(case)}
    if not case["ms"]:
        return cells
    faster, peak, kept = case["speedup"], case["peak_bytes"], case["kept_bytes"]
    return cells | {
        **_times(case["ms"]),
        "TFLOP/s": digits(case["tflops"]),
        "GMACs": digits(case["gmacs"]),
        "of\nGEMM": f"{case['gemm_share']:.1%}",
        "peak\nGB": "" if peak is None else f"{peak / 1e9:.2f}",
        "kept\nMB": "" if kept is None else f"{kept / 1e6:.1f}",
        "U per\nblock": "" if kept is None else f"{case['kept_units']:.2f}",
        **{f"vs\n{base}": f"{ratio:.2f}x" for base, ratio in faster.items()},
    }


def digits(value):
    """At least three significant digits, and no exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def _times(ms):
    return {"ms": ms_text(ms["median"]), "10–90 %": f"{ms_text(ms['p10'])}–{ms_text(ms['p90'])}"}


def ms_text(value):
    return f"{value:.{1 if value >= 100 else 2 if value >= 10 else 3}f}"


def _parity(case):
    if case["error"] is not None:
        return "FAILED, see below"
    worst = case["parity"]
    name = worst["tensor"].replace("grad of ", "d ").replace("blocks.", "").replace("adaLN_modulation.1", "adaLN")
    verdict = "" if is_green(case) else "parity FAILED: "
    return f"{verdict}{worst['used']:.2f} {name}"


def _ceiling(ceiling):
    cells = {"variant": "GEMMs alone", "TFLOP/s": digits(ceiling["tflops"]), "of\nGEMM": "100.0%"}
    return cells | _times(ceiling["ms"])


def _foot(result):
    repeats, has_peak = result["repeats"], any(case["peak_bytes"] is not None for case in result["cases"])
    yield f"ms: median of {repeats} runs, variants in turns. TFLOP/s: 2 per multiply-add, no recomputation."
    yield "GMACs: multiply-adds of one sample, the paper's Gflops. of GEMM: of the library's rate on those alone."
    yield "kept: for backward, without weights; U = B*N*D*2 bytes." + (" peak: beyond weights." if has_peak else "")
    yield "parity: largest error of output and gradients against float64; budget: 2x the error of eager + 2 ulp."
    for variant, ops in result["backends"].items():
        yield f"{variant} ran on {_grouped(ops) or 'plain operations, as torch.compile fused them'}"
    for case in result["cases"]:
        if case["error"] is not None:
            yield f"{case['variant']}, {MODES[case['mode']]}, failed: {case['error']}"
    if result["kernels"] and result["kernels"]["error"] is not None:
        yield f"triton kernels failed: {result['kernels']['error']}"
    elif result["kernels"]:
        w = result["kernels"]["workload"]
        shape = f"{_blocks(w)} of B={w['batch']} N={w['tokens']} D={w['dim']} in {w['dtype']}"
        yield f"triton kernels, {shape}, ran on {_grouped(result['kernels']['backends'])}"


def _grouped(ops):
    """{operation: backends} as "backend: operation, operation; backend: operation"."""
    found = {}
    for op, names in ops.items():
        found.setdefault(" + ".join(names), []).append(op)
    return "; ".join(f"{name}: {', '.join(sorted(found[name]))}" for name in sorted(found))


def show_ratios(found: list[dict], fail_below: float | None) -> bool:
    """Print old over new time for each case; whether none is below the limit."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    table = Table(title="against the earlier measurement", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for name in ("variant", "mode", "old ms", "new ms", "old / new"):
        table.add_column(name, justify="left" if name in ("variant", "mode") else "right")
    slower = [r for r in found if fail_below is not None and r["ratio"] < fail_below]
    for r in found:
        times = ms_text(r["old_ms"]), ms_text(r["new_ms"]), f"{r['ratio']:.3f}"
        table.add_row(r["variant"], r["mode"], *times, style="red" if r in slower else None)
    console.print(table)
    if slower:
        console.print(f"{len(slower)} of {len(found)} cases below {fail_below}", style="red")
    return not slower


def plot(result: dict, path) -> None:
    """Bars of TFLOP/s for each variant, the GEMM ceiling as a line; one panel for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    modes = result["ceiling"]
    figure, axes = plt.subplots(1, len(modes), figsize=(5.5 * len(modes), 3.6), squeeze=False, layout="constrained")
    for axis, mode in zip(axes[0], modes, strict=True):
        cases = [case for case in result["cases"] if case["mode"] == mode and case["ms"]]
        colors = ["#d1495b" if case["variant"].startswith("ditfast") else "#8d99ae" for case in cases]
        bars = axis.barh([case["variant"] for case in cases], [case["tflops"] for case in cases], color=colors)
        labels = [f"{ms_text(case['ms']['median'])} ms" for case in cases]
        axis.bar_label(bars, labels, label_type="center", color="white")
        top = modes[mode]["tflops"]
        axis.axvline(top, color="black", linestyle="--", linewidth=1)
        place = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points", "va": "center"}
        axis.annotate("GEMMs alone", (top, 0.5), (4, 0), rotation=90, **place)
        axis.set(title=MODES[mode], xlabel="TFLOP/s")
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    w = result["workload"]
    machine = result["header"]["machine"]
    name = machine.get("gpu") or machine["cpu"]
    figure.suptitle(f"{_blocks(w)} of {w['model']}, B={w['batch']}, N={w['tokens']}, {w['dtype']}, {name}")
    figure.savefig(path, dpi=160)
    plt.close(figure)
