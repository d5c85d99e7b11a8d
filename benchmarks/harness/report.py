"""Shared parts of reports: tables on the terminal, and plots."""

import sys

from ditfast.ops.op import PYTORCH
from harness.verdicts import is_excused, is_green, is_ours

WIDTH = 136  # columns of text if the output is not a terminal
OURS, THEIRS = "#d1495b", "#8d99ae"  # colors in plots


def busy(what: str):
    """Context with a status line on the terminal."""
    from rich.console import Console

    return Console(stderr=True).status(what)


def console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def show(result: dict, tables, foot) -> None:
    """Print the header, tables, lines below them, and the notes of a result."""
    out = console()
    out.print(*_header_lines(result["header"]), sep="\n", style="dim")
    for each in tables:
        _print_whole(out, each)
    for line in (*foot, *result["notes"]):
        out.print(line, style="dim")


def _print_whole(out, made):
    """Print a table, on a narrow terminal in longer lines: rich would replace digits by an ellipsis."""
    from rich.console import Console
    from rich.measure import Measurement

    needed = Measurement.get(out, out.options.update_width(1000), made).maximum
    Console(file=out.file, width=max(out.width, needed), highlight=False).print(made)


def _header_lines(header):
    machine, versions, state = header["machine"], header["versions"], header["gpu_state"]
    on_cpu = f"{header['cpu']}, {machine.get('threads')} threads, kernels for {header['isa'] or 'none'}"
    name = machine.get("gpu") or on_cpu
    if state:
        name += f" · SM {state['clocks.sm']} of {state['clocks.max.sm']} · memory {state['clocks.mem']}"
        name += f" · limit {state['power.limit']} · driver {state['driver_version']}"
    shown = [f"{k} {v}" for k, v in versions.items() if v]
    return name, " · ".join([*shown, f"commit {header['commit'] or 'unknown'}", header["date"]])


def table(title: str, columns, rows, texts, no_wrap: bool = False):
    """A table for `console`.

    Args:
        rows: (cells by column name, style) each, or None for a gap.
        texts: columns of text, which are left-aligned.
    """
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        made.add_column(name, justify="left" if name in texts else "right", no_wrap=no_wrap)
    for row in rows:
        if row is None:
            made.add_section()
        else:
            made.add_row(*(row[0].get(name, "") for name in columns), style=row[1])
    return made


def groups(cases, *keys) -> dict:
    """{values of the keys: cases}, in order."""
    found = {}
    for case in cases:
        values = tuple(tuple(case[k]) if isinstance(case[k], list) else case[k] for k in keys)
        found.setdefault(values, []).append(case)
    return found


def style(case: dict) -> str | None:
    if is_green(case):
        return "bold" if is_ours(case["variant"]) else None
    return "red" if is_ours(case["variant"]) or case["error"] is not None else "yellow"


def variant_text(case: dict, backends: dict) -> str:
    """The variant's name, and whether it is ditfast running PyTorch's own operations alone.

    Args:
        backends: variant of ditfast -> operation -> names of the backends that ran.
    """
    ran = backends.get(case["variant"])
    if ran is None or not case["ms"] or any(set(names) - {*PYTORCH} for names in ran.values()):
        return case["variant"]
    return f"{case['variant']} (no kernel ran)"


def parity_text(case: dict) -> str:
    """Share of the error budget used by the worst tensor, and whether it fails."""
    if case["error"] is not None:
        return "FAILED, see below"
    worst = case["parity"]
    used = "" if worst["used"] is None else f"{worst['used']:.2f} "
    text = used + worst["tensor"]
    if not is_green(case):
        return f"parity FAILED: {text}" if is_ours(case["variant"]) else f"over budget: {text}"
    return f"as compile: {text}" if is_excused(case) else text


def failures(cases, what) -> list[str]:
    """One line per case that is not green; ``what(case)`` identifies it."""
    found = []
    for case in cases:
        if case["error"] is not None:
            found.append(f"{case['variant']}, {what(case)}, failed: {case['error']}")
        elif not is_green(case):
            how = "failed" if is_ours(case["variant"]) else "exceeds its error budget"
            found.append(f"{case['variant']}, {what(case)}, {how}: {case['parity']['reason']}")
    return found


def digits(value: float) -> str:
    """At least three significant digits, without exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def ms_text(value: float) -> str:
    return f"{value:.{1 if value >= 100 else 2 if value >= 10 else 3}f}"


def subplots(*shape, **options):
    """Returns (figure, axes), without needing a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*shape, squeeze=False, layout="constrained", **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, path, title: str, header: dict) -> None:
    """Write the figure, titled with ``title`` and the machine's name."""
    from matplotlib import pyplot

    machine = header["machine"]
    figure.suptitle(f"{title}, {machine.get('gpu') or machine['cpu']}")
    figure.savefig(path, dpi=160)
    pyplot.close(figure)
