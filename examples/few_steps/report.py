"""What the comparison found: JSON, a picture, and a table in docs/flow.md."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from ditfast.atomic import atomic_write

NAMES = {"diffusion": "diffusion (DDIM)", "flow": "flow matching (Euler)", "meanflow": "MeanFlow"}
START, END = "<!-- few steps: written by examples/few_steps/run.py -->", "<!-- end of few steps -->"


def write(found: dict, shown: dict, folder: Path, docs: Path | None) -> None:
    """few_steps.json and few_steps.png in the folder; the table, in docs too unless None."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "few_steps.json") as part:
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    with atomic_write(folder / "few_steps.png") as part:
        picture(shown).savefig(part, dpi=150, format="png")
    if docs:
        head, _, rest = docs.read_text(encoding="utf-8").partition(START)
        _, _, tail = rest.partition(END)
        with atomic_write(docs) as part:
            part.write_text(f"{head}{START}\n{table(found)}\n{END}{tail}", encoding="utf-8")
    print(table(found))


def table(found: dict) -> str:
    """Markdown: a row for each objective, a column for each number of steps."""
    objectives = found["objectives"]
    columns = [f"{n} step{'s' * (n != '1')}" for n in objectives["meanflow"]["steps"]]
    head = ["", "trained for", *columns]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, about in objectives.items():
        cost = f"{about['training_steps']:,} steps of {about['training_step_ms']:.0f} ms"
        cells = [_cell(each) for each in about["steps"].values()]
        lines.append("| " + " | ".join([NAMES[name], cost, *cells]) + " |")
    times = [f"{each['ms']:.0f} ms" for each in objectives["meanflow"]["steps"].values()]
    lines.append("| " + " | ".join(["60 samples of MeanFlow", "", *times]) + " |")
    return "\n".join([*lines, "", f"Training images: {_cell(found['known'])}. Noise: {_cell(found['noise'])}."])


def _cell(about):
    return f"{about['right']:.1%}, {about['frechet']:.2f}, {about['spread']:.2f}"


def picture(shown: dict):
    """Images (n, 8, 8) in [-1, 1] by objective and steps: a panel of each, a row for each number."""
    from matplotlib.figure import Figure

    steps = sorted({n for _, n in shown})
    figure = Figure(figsize=(12, 1.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(NAMES)), NAMES, strict=True):
        rows = [torch.cat([*F.pad(shown[name, n], (1, 1, 1, 1), value=-0.3)], 1) for n in steps]  # (10, 120) each
        axes.imshow(torch.cat(rows).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_yticks([5 + 10 * i for i in range(len(rows))], steps)
        axes.set(xticks=[], title=NAMES[name], ylabel="steps")
    return figure
