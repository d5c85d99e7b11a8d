"""Report the runs: plan, summary, README table, plot."""

import json
import math
from pathlib import Path

import correlation
import plan
from records import Records

from ditfast import flops
from ditfast.atomic import atomic_write

START, END = "<!-- results: written by run.py --plot -->", "<!-- end of results -->"
COLOURS = {"S": "#7fb3d5", "B": "#2e86c1", "L": "#1a5276", "XL": "#c0392b"}
MARKERS = {"8": "o", "4": "s", "2": "^"}


def plan_table(settings: plan.Settings) -> str:
    """Every configuration and its cost."""
    lines = ["model                 tokens    MMACs  parameters"]
    for config in plan.CONFIGS:
        model = plan.build_model(config)
        count = sum(p.numel() for p in model.parameters())
        lines.append(f"{config:20} {model.pos_embed.shape[1]:7} {1e3 * plan.gmacs(config):8.3f} {count:11,}")
    most, least = (f(map(plan.gmacs, plan.SCALING)) for f in (max, min))
    return "\n".join([*lines, f"{most / least:.0f} times from the cheapest to the costliest; {settings}"])


def summary(records) -> dict:
    """Means, spread and correlations of all finished runs."""
    models = {config: _group(records.runs_of(config)) for config in plan.CONFIGS if records.runs_of(config)}
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
        "spearman_loss": correlation.spearman(gmacs, [m["fresh_loss"] for m in scaling]) if enough else None,
        "spearman_paper": correlation.spearman(*zip(*flops.PAPER.values(), strict=True)),
        "gmacs_ratio": max(gmacs) / min(gmacs) if gmacs else None,
    }


def _group(runs):
    fids = [run["fid"] for run in runs]
    mean = sum(fids) / len(fids)
    spread = math.sqrt(sum((fid - mean) ** 2 for fid in fids) / (len(fids) - 1)) if len(fids) > 1 else None
    means = {key: sum(run[key] for run in runs) / len(runs) for key in ("accuracy", "fresh_loss", "train_seconds")}
    same = {key: runs[0][key] for key in ("gmacs", "parameters")}
    return {**same, "seeds": len(runs), "fids": fids, "fid": mean, "spread": spread, **means, "runs": runs}


def table(s: dict, others=()) -> str:
    """The generated part of the README: these results, and other studies' of some of the models."""
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
            f"The paper's twelve models: {s['spearman_paper']:.2f}. "
            f"Of the loss on fresh glyphs with Gflops: **{s['spearman_loss']:.2f}**.",
        ]
    variants = [plan.MIDDLE, *(f"{plan.MIDDLE} {kind}" for kind in plan.VARIANTS[1:])]
    lines += ["", *_rows("conditioning", s, variants, "adaln_zero")]
    return "\n".join([*lines, *(line for other in others for line in _comparison(s, other))])


def _comparison(s, other):
    """The same models and seeds in this study and another."""
    changed = {name: value for name, value in other["settings"].items() if value != s["settings"][name]}
    number = changed.pop("seeds", s["settings"]["seeds"])
    changed = ", ".join(f"{name} = {value}" for name, value in changed.items())
    before = {config: _group(s["models"][config]["runs"][:number]) for config in other["models"]}
    rank = {key: correlation.spearman(*_columns(m)) for key, m in (("before", before), ("after", other["models"]))}
    seeds = "seed 0" if number == 1 else f"seeds 0 to {number - 1}"
    words = other["command"].split()
    earlier = "" if set(other["models"]) <= set(words) else ", after calls with the other models"
    yield from ("", f"`{other['command']}`{earlier}; {other['seconds'] / 60:.0f} minutes in all, {seeds} of both.")
    models = "[{:.2f}, {:.2f}]".format(*other["interval_models"])
    yield (
        f"Rank correlation of FID with Gflops over these models: {rank['before']:.2f}, then **{rank['after']:.2f}**, "
        f"95% {models} if other models had been drawn."
    )
    yield from (
        "",
        f"| model | FID | FID, {changed} | right class | right class, {changed} |",
        "|---|---|---|---|---|",
    )
    for config, after in other["models"].items():
        (fid, right), (new_fid, new_right) = ((m["fid"], m["accuracy"]) for m in (before[config], after))
        yield f"| {config} | {fid:.1f} | {new_fid:.1f} | {right:.1%} | {new_right:.1%} |"


def _columns(models):
    return [m["gmacs"] for m in models.values()], [m["fid"] for m in models.values()]


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


def other_studies(out: Path) -> list[dict]:
    """The summaries of other studies, of at least three models, in a study's folder."""
    found = [summary(Records(path)) for path in sorted(out.glob("*/runs.jsonl"))]
    return [s for s in found if len(s["models"]) > 2]


def write_report(records, out: Path, readme: Path | None) -> None:
    """Write summary.json, scaling.png and the README's table."""
    found = summary(records)
    compared = other_studies(out)
    shown = table(found, compared)
    with atomic_write(out / "summary.json") as part:
        part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    with atomic_write(out / "scaling.png") as part:
        picture(found, compared).savefig(part, dpi=120, format="png")
    if readme:
        head, _, rest = readme.read_text(encoding="utf-8").partition(START)
        _, _, tail = rest.partition(END)
        with atomic_write(readme) as part:
            part.write_text(f"{head}{START}\n{shown}\n{END}{tail}", encoding="utf-8")
    print(shown)


def picture(s: dict, compared=()):
    """Plot FID against Gflops, for the paper's twelve models, this study and another complete one; and the loss."""
    from matplotlib.figure import Figure

    complete = [other for other in compared if set(plan.SCALING) <= other["models"].keys()]
    figure = Figure(figsize=(12, 9), layout="constrained")
    paper, fid, loss, *more = figure.subplots(2, 2).flat
    _panel(paper, {name.removeprefix("DiT-"): (gflops, [value]) for name, (gflops, value) in flops.PAPER.items()})
    paper.set(title=f"The paper{_rank(s, 'spearman_paper')}", ylabel="FID-50K (lower is better)")
    paper.set_yticks([20, 40, 80, 160], ["20", "40", "80", "160"])
    paper.minorticks_off()
    _panel(loss, _ours(s, "fresh_loss"))
    loss.set(title=f"Glyphs of 16²{_rank(s, 'spearman_loss')}", ylabel="squared error on fresh glyphs")
    loss.set_yticks([0.1, 0.11, 0.12], ["0.10", "0.11", "0.12"])
    loss.set_yticks([], minor=True)
    for axes, study in zip([fid, *more], [s, *complete], strict=False):
        _panel(axes, _ours(study, "fid"))
        steps = f"{study['settings']['steps']:,} steps"
        axes.set(title=f"Glyphs of 16², {steps}{_rank(study, 'spearman')}", ylabel="FID in a classifier's features")
        axes.axhline(s["floor_fid"], color="gray", linestyle=":")
        style = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom", "color": "gray"}
        axes.text(0.98, s["floor_fid"], "real glyphs", **style)
        axes.set_ylim(s["floor_fid"] * 0.8, 2000)
    for axes in more[len(complete) :]:
        axes.set_axis_off()
    figure.supxlabel(f"the paper: {flops.SOURCE}; lines join models of the same patch size", fontsize=8, color="gray")
    return figure


def _ours(s, key):
    """Name -> (Gflops, one value per seed)."""
    found = {config: s["models"][config] for config in plan.SCALING if config in s["models"]}
    return {config: (m["gmacs"], [run[key] for run in m["runs"]]) for config, m in found.items()}


def _rank(s, name):
    return "" if s[name] is None else f": Spearman {s[name]:.2f}"


def _panel(axes, points):
    """Plot each seed as a dot, and each model's mean. points: name -> (Gflops, values)."""
    axes.set(xscale="log", yscale="log", xlabel="Gflops as the paper counts them (GMACs of an image)")
    axes.margins(0.15)
    means = {name: (gflops, sum(values) / len(values)) for name, (gflops, values) in points.items()}
    for patch in MARKERS:
        mine = [mean for name, mean in means.items() if name.endswith(f"/{patch}")]
        axes.plot(*zip(*mine, strict=True), "-", color="lightgray", zorder=0)
    for name, (gflops, values) in points.items():
        size, patch = name.split("/")
        style = {"color": COLOURS[size]}
        axes.plot([gflops] * len(values), values, ".", alpha=0.5, **style)
        axes.plot(*means[name], MARKERS[patch], markersize=8, **style)
        axes.annotate(name, means[name], (8, 4), textcoords="offset points", **style)
