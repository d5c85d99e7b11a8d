"""The results for a model, as a table and a plot."""

from harness import report
from harness.model.variants import FP32
from harness.model.workload import MODES
from harness.report import OURS, THEIRS, digits, ms_text
from harness.verdicts import is_ours

PARITY = "parity\n/ budget"
TEXTS = ("variant", PARITY)
BASES = {
    "eager": "vs\neager",
    FP32: "vs\nfp32",
    "compile": "vs\ncompile",
    "compile-frozen": "vs\nfrozen",
    "diffusers": "vs\ndiffusers",
}
COLUMNS = ("variant", "ms", "10–90 %", "images/s", "TFLOP/s", "of\nGEMM", "peak\nMB", "page\nfaults", *BASES.values())


def show(result: dict) -> None:
    """Print header, table, footnotes and the backends that ran."""
    w = result["workload"]
    title = f"{w['model']} {w['image_size']}² · B={w['batch']} · {w['dtype']}"
    missing = {BASES[base] for base in BASES if not any(base in case["speedup"] for case in result["cases"])}
    columns = [name for name in (*COLUMNS, PARITY) if name not in missing]
    table = report.table(title, columns, _rows(result), TEXTS, no_wrap=True)
    report.show(result, [table], _foot(result))


def _rows(result):
    for mode, ceiling in result["ceiling"].items():
        yield {"variant": MODES[mode]}, "italic"
        for case in result["cases"]:
            if case["mode"] == mode:
                yield _cells(case, result["backends"]), report.style(case)
        yield {"variant": "GEMMs alone", "TFLOP/s": digits(ceiling["tflops"])} | _times(ceiling["ms"]), "dim"
        yield None


def _cells(case, backends):
    cells = {"variant": report.variant_text(case, backends), PARITY: _parity(case)}
    if not case["ms"]:
        return cells
    peak = case["peak_bytes"]
    return {
        **cells,
        **_times(case["ms"]),
        "images/s": digits(case["images_per_s"]),
        "TFLOP/s": digits(case["tflops"]),
        "of\nGEMM": f"{case['gemm_share']:.1%}",
        "peak\nMB": "" if peak is None else f"{peak / 1e6:.0f}",
        "page\nfaults": f"{case['ms']['faults']:.0f}" if "faults" in case["ms"] else "",
        **{BASES[base]: f"{ratio:.2f}x" for base, ratio in case["speedup"].items()},
    }


def _times(ms):
    return {"ms": ms_text(ms["median"]), "10–90 %": f"{ms_text(ms['p10'])}–{ms_text(ms['p90'])}"}


def _parity(case):
    return (
        report.parity_text(case)
        .replace("grad of ", "d ")
        .replace("blocks.", "")
        .replace("adaLN_modulation.1", "adaLN")
    )


def _foot(result):
    repeats, steps = result["repeats"], result["workload"]["steps"]
    yield f"ms: median of {repeats} runs, variants interleaved. TFLOP/s: 2 per multiply-add of the paper's count."
    yield f"guided step: in a DDIM run of {steps} steps, including its share of the run's one-time work;"
    yield "weights are packed once for all runs, which is not included."
    yield "training step: forward, backward, clipping, fused AdamW, weight averaging."
    yield "eager-fp32: weights and arithmetic in float32, as the original samples. vs fp32: speed-up over it."
    yield "of GEMM: share of the library's rate on the blocks' products alone. peak: memory added by the run."
    yield "parity: error relative to float64; budget: 2x that of eager, + 2 ulp in the maximum, + 1 ulp in the norm."
    for variant, ops in result["backends"].items():
        ran = ", ".join(f"{op}: {' + '.join(names)}" for op, names in sorted(ops.items()))
        yield f"{variant} ran on {ran or 'plain operations, as torch.compile fused them'}"
    yield from report.failures(result["cases"], lambda case: MODES[case["mode"]])


def plot(result: dict, path) -> None:
    """Plot images per second of each variant as bars; one panel per mode."""
    modes = result["ceiling"]
    figure, axes = report.subplots(1, len(modes), figsize=(5.5 * len(modes), 3.6))
    for axis, mode in zip(axes[0], modes, strict=True):
        cases = [case for case in result["cases"] if case["mode"] == mode and case["ms"]]
        colors = [OURS if is_ours(case["variant"]) else THEIRS for case in cases]
        bars = axis.barh([case["variant"] for case in cases], [case["images_per_s"] for case in cases], color=colors)
        texts = [f"{ms_text(case['ms']['median'])} ms" for case in cases]
        axis.bar_label(bars, texts, label_type="center", color="white")
        axis.set(title=MODES[mode], xlabel="images/s")
        axis.invert_yaxis()
    w = result["workload"]
    report.save(figure, path, f"{w['model']}, B={w['batch']}, {w['image_size']}², {w['dtype']}", result["header"])
