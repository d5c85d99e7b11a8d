"""The results for blocks, as a table and a plot."""

from harness import report
from harness.report import OURS, THEIRS, digits, ms_text
from harness.verdicts import is_ours

PARITY = "parity\n/ budget"
TEXTS = ("variant", PARITY)
COLUMNS = (
    "variant",
    "ms",
    "10–90 %",
    "TFLOP/s",
    "GMACs",
    "of\nGEMM",
    "peak\nGB",
    "kept\nMB",
    "U per\nblock",
    "page\nfaults",
    "vs\neager",
    "vs\ncompile",
    PARITY,
)
MODES = {"fwd": "forward", "fwd_bwd": "forward + backward"}


def show(result: dict) -> None:
    """Print header, table, footnotes and the backends that ran."""
    w = result["workload"]
    title = f"{w['model']} {w['image_size']}² · {_size(w)} H={w['heads']} · {w['dtype']}"
    left_out = "page\nfaults" if _has_peak(result) else "peak\nGB"  # a GPU has one of the two, a CPU the other
    columns = [c for c in COLUMNS if c != left_out]
    report.show(result, [report.table(title, columns, _rows(result), TEXTS, no_wrap=True)], _foot(result))


def _rows(result):
    for mode, ceiling in result["ceiling"].items():
        yield {"variant": MODES[mode]}, "italic"
        for case in result["cases"]:
            if case["mode"] == mode:
                yield _cells(case, result["backends"]), report.style(case)
        yield _ceiling(ceiling), "dim"
        yield None
    if result["kernels"]:
        case = {"variant": "ditfast", **result["kernels"]}
        yield {"variant": "triton kernels", "10–90 %": "interpreter", PARITY: _parity(case)}, report.style(case)


def _blocks(workload):
    return "1 block" if workload["blocks"] == 1 else f"{workload['blocks']} blocks"


def _size(workload):
    return f"{_blocks(workload)} of B={workload['batch']} N={workload['tokens']} D={workload['dim']}"


def _has_peak(result):
    return any(case["peak_bytes"] is not None for case in result["cases"])


def _cells(case, backends):
    cells = {"variant": report.variant_text(case, backends), PARITY: _parity(case)}
    if not case["ms"]:
        return cells
    peak, kept = case["peak_bytes"], case["kept_bytes"]
    return {
        **cells,
        **_times(case["ms"]),
        "TFLOP/s": digits(case["tflops"]),
        "GMACs": digits(case["gmacs"]),
        "of\nGEMM": f"{case['gemm_share']:.1%}",
        "peak\nGB": "" if peak is None else f"{peak / 1e9:.2f}",
        "kept\nMB": "" if kept is None else f"{kept / 1e6:.1f}",
        "U per\nblock": "" if kept is None else f"{case['kept_units']:.2f}",
        "page\nfaults": f"{case['ms']['faults']:.0f}" if "faults" in case["ms"] else "",
        **{f"vs\n{base}": f"{ratio:.2f}x" for base, ratio in case["speedup"].items()},
    }


def _times(ms):
    return {"ms": ms_text(ms["median"]), "10–90 %": f"{ms_text(ms['p10'])}–{ms_text(ms['p90'])}"}


def _parity(case):
    text = report.parity_text(case)
    return text.replace("grad of ", "d ").replace("blocks.", "").replace("adaLN_modulation.1", "adaLN")


def _ceiling(ceiling):
    cells = {"variant": "GEMMs alone", "TFLOP/s": digits(ceiling["tflops"]), "of\nGEMM": "100.0%"}
    return cells | _times(ceiling["ms"])


def _foot(result):
    peak = " peak: excluding weights." if _has_peak(result) else ""
    yield f"ms: median of {result['repeats']} runs, variants interleaved, L2 flushed before each on a GPU."
    yield "TFLOP/s: 2 per multiply-add, without recomputation."
    yield "GMACs: multiply-adds of one sample, the paper's Gflops. of GEMM: share of the library's GEMM rate."
    yield f"kept: for backward, excluding weights; U = B*N*D*2 bytes.{peak}"
    yield "parity: error of output and gradients relative to float64, in the maximum and in each sample's L2 norm;"
    yield "budget: 2x that of eager, + 2 ulp in the maximum, + 1 ulp in the norm."
    for variant, ops in result["backends"].items():
        yield f"{variant} ran on {_grouped(ops) or 'plain operations, as torch.compile fused them'}"
    yield from report.failures(result["cases"], lambda case: MODES[case["mode"]])
    kernels = result["kernels"]
    if kernels and kernels["error"] is not None:
        yield f"Triton kernels failed: {kernels['error']}"
    elif kernels:
        shape = f"{_size(kernels['workload'])} in {kernels['workload']['dtype']}"
        yield f"Triton kernels, {shape}, ran on {_grouped(kernels['backends'])}"


def _grouped(ops):
    """{operation: backends} as "backend: operation, operation; backend: operation"."""
    found = {}
    for op, names in ops.items():
        found.setdefault(" + ".join(names), []).append(op)
    return "; ".join(f"{name}: {', '.join(sorted(found[name]))}" for name in sorted(found))


def plot(result: dict, path) -> None:
    """Plot TFLOP/s of each variant as bars, with the GEMM ceiling as a line; one panel per mode."""
    modes = result["ceiling"]
    figure, axes = report.subplots(1, len(modes), figsize=(5.5 * len(modes), 3.6))
    for axis, mode in zip(axes[0], modes, strict=True):
        cases = [case for case in result["cases"] if case["mode"] == mode and case["ms"]]
        _bars(axis, cases, modes[mode]["tflops"])
        axis.set(title=MODES[mode], xlabel="TFLOP/s")
    w = result["workload"]
    title = f"{_blocks(w)} of {w['model']}, B={w['batch']}, N={w['tokens']}, {w['dtype']}"
    report.save(figure, path, title, result["header"])


def _bars(axis, cases, ceiling):
    colors = [OURS if is_ours(case["variant"]) else THEIRS for case in cases]
    bars = axis.barh([case["variant"] for case in cases], [case["tflops"] for case in cases], color=colors)
    axis.bar_label(
        bars, [f"{ms_text(case['ms']['median'])} ms" for case in cases], label_type="center", color="white"
    )
    axis.axvline(ceiling, color="black", linestyle="--", linewidth=1)
    anchor = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points", "va": "center"}
    axis.annotate("GEMMs alone", (ceiling, 0.5), (4, 0), rotation=90, **anchor)
    axis.invert_yaxis()
