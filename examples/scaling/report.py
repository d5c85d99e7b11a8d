"""What the runs say: plan, summary, table for the README, picture."""

import json
import math
from pathlib import Path

import correlation
import plan

from ditfast import flops
from ditfast.sampling.files import writing

START, END = "<!-- results: written by run.py --plot -->", "<!-- end of results -->"
COLOURS = {"S": "#7fb3d5", "B": "#2e86c1", "L": "#1a5276", "XL": "#c0392b"}
MARKERS = {"8": "o", "4": "s", "2": "^"}


def plan_table(settings: plan.Settings) -> str:
    """Every configuration and what it costs."""
    lines = ["model                 tokens    MMACs  parameters"]
    for config in plan.CONFIGS:
        model = plan.build(config)
        count = sum(p.numel() for p in model.parameters())
        lines.append(f"{config:20} {model.pos_embed.shape[1]:7} {1e3 * plan.gmacs(config):8.3f} {count:11,}")
    most, least = (f(map(plan.gmacs, plan.SCALING)) for f in (max, min))
    return "\n".join([*lines, f"{most / least:.0f} times from the cheapest to the costliest; {settings}"])


def summary(records) -> dict:
    """Means, spread and correlations of all finished runs."""
    models = {config: _group(records.of(config)) for config in plan.CONFIGS if records.of(config)}
    scaling = [models[config] for config in plan.SCALING if config in models]
    gmacs, fids = [m["gmacs"] for m in scaling], [m["fids"] for m in scaling]
    enough = len(scaling) > 2
    return {
        **records.setup,
        "runs": len(records.runs),
        "seconds": records.seconds(),
        "models": models,
        "spearman": correlation.spearman(gmacs, [m["fid"] for m in scaling]) if enough else None,
        "interval_seeds": correlation.interval(gmacs, fids, models=False) if enough else None,
        "interval_models": correlation.interval(gmacs, fids, models=True) if enough else None,
        "spearman_paper": correlation.spearman(*zip(*flops.PAPER.values(), strict=True)),
        "gmacs_ratio": max(gmacs) / min(gmacs) if gmacs else None,
    }


def _group(runs):
    fids = [run["fid"] for run in runs]
    mean = sum(fids) / len(fids)
    spread = math.sqrt(sum((fid - mean) ** 2 for fid in fids) / (len(fids) - 1)) if len(fids) > 1 else None
    means = {key: sum(run[key] for run in runs) / len(runs) for key in ("accuracy", "fresh_loss", "train_seconds")}
    same = {key: runs[0][key] for key in ("gmacs", "parameters")}
    return {**same, "seeds": len(runs), "fids": fids, "fid": mean, "spread": spread, **means}


def table(s: dict) -> str:
    """The README's part that is written from the results."""
    made, m = s["settings"], s["machine"]
    took = f"{s['seconds'] / 60:.0f} minutes, {s['runs']} runs"
    lines = [
        f"`{s['command']}` on {m['cores']}-core {m['cpu']}, torch {m['torch']}: {took}.",
        f"Each run: {made['steps']} steps of {made['batch']} glyphs; FID from {made['samples']} samples, "
        f"DDIM with {made['sampling_steps']} steps.",
        "",
        *_rows("model", s, plan.SCALING),
        "",
        f"Real glyphs have FID {s['floor_fid']:.1f} at as many samples, noise {s['noise_fid']:.0f}. "
        f"The classifier is right on {s['classifier_accuracy']:.1%} of fresh glyphs.",
    ]
    if s["spearman"] is not None:
        seeds, models = ("[{:.2f}, {:.2f}]".format(*s[key]) for key in ("interval_seeds", "interval_models"))
        lines += [
            "",
            f"Spearman's rank correlation of FID with Gflops, over a range of {s['gmacs_ratio']:.0f} times: "
            f"**{s['spearman']:.2f}**, 95% {seeds} if other seeds had been drawn, {models} if other models too. "
            f"The paper's twelve models: {s['spearman_paper']:.2f}.",
        ]
    variants = [plan.MIDDLE, *(f"{plan.MIDDLE} {kind}" for kind in plan.VARIANTS[1:])]
    return "\n".join([*lines, "", *_rows("conditioning", s, variants, "adaln_zero")])


def _rows(first, s, configs, plain=None):
    yield f"| {first} | Gflops (GMACs) | parameters | FID | of each seed | right class | loss |"
    yield "|---|---|---|---|---|---|---|"
    for config in configs:
        if m := s["models"].get(config):
            name = config if plain is None else f"{plan.MIDDLE} {config.partition(' ')[2] or plain}"
            spread = "" if m["spread"] is None else f" ± {m['spread']:.1f}"
            each = ", ".join(f"{fid:.1f}" for fid in m["fids"])
            numbers = f"{m['gmacs']:.5f} | {m['parameters']:,} | {m['fid']:.1f}{spread} | {each}"
            yield f"| {name} | {numbers} | {m['accuracy']:.1%} | {m['fresh_loss']:.4f} |"


def write(records, out: Path, readme: Path | None) -> None:
    """summary.json and scaling.png, and the README's table."""
    found = summary(records)
    with writing(out / "summary.json") as part:
        part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    with writing(out / "scaling.png") as part:
        picture(found).savefig(part, dpi=120, format="png")
    if readme:
        head, _, rest = readme.read_text(encoding="utf-8").partition(START)
        _, _, tail = rest.partition(END)
        with writing(readme) as part:
            part.write_text(f"{head}{START}\n{table(found)}\n{END}{tail}", encoding="utf-8")
    print(table(found))


def picture(s: dict):
    """FID against Gflops: the paper's twelve models, and these."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (gflops, fid) in flops.PAPER.items():
        _point(left, name.removeprefix("DiT-"), gflops, [fid])
    for config in plan.SCALING:
        if config in s["models"]:
            _point(right, config, s["models"][config]["gmacs"], s["models"][config]["fids"])
    right.axhline(s["floor_fid"], color="gray", linestyle=":")
    right.text(
        0.98, s["floor_fid"] * 1.05, "real glyphs", transform=right.get_yaxis_transform(), ha="right", color="gray"
    )
    left.set(title=f"The paper: Spearman {s['spearman_paper']:.2f}", ylabel="FID-50K (lower is better)")
    title = f": Spearman {s['spearman']:.2f}" if s["spearman"] is not None else ""
    right.set(title=f"Glyphs of 16²{title}", ylabel="FID in a classifier's features")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="Gflops as the paper counts them (GMACs of an image)")
        axes.margins(0.1)
    left.set_yticks([20, 40, 80, 160], ["20", "40", "80", "160"])
    left.minorticks_off()
    figure.supxlabel(f"left: {flops.SOURCE}", fontsize=8, color="gray")
    return figure


def _point(axes, name, gflops, fids):
    """Each seed as a dot, and their mean."""
    size, patch = name.split("/")
    mean, colour = sum(fids) / len(fids), COLOURS[size]
    axes.plot([gflops] * len(fids), fids, ".", color=colour, alpha=0.5)
    axes.plot(gflops, mean, MARKERS[patch], color=colour, markersize=8)
    axes.annotate(name, (gflops, mean), (8, 4), textcoords="offset points", color=colour)
