"""The paper's thesis in miniature: DiTs with more multiply-adds make better samples. See README.md.

python examples/scaling/run.py                 # the study; resumes if interrupted
python examples/scaling/run.py --quick         # all of it in two minutes, too short for conclusions
python examples/scaling/run.py --plan          # print the models that would be trained
python examples/scaling/run.py --plot          # redo summary, table and plot from the results
python examples/scaling/run.py --steps 16000 --seeds 1 --models S/8 S/2 --out folder      # your own study
"""

import argparse
import multiprocessing
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import classifier
import plan
import report
import torch
import training
from records import Records, machine

from ditfast.evaluation.metrics import frechet_distance, moments
from ditfast.progress import progress

HERE = Path(__file__).parent
CHANGES = ("steps", "seeds")  # settings with a command-line option


def main(arguments=None) -> None:
    options = _parse(arguments)
    settings = plan.QUICK if options.quick else plan.Settings()
    settings = replace(settings, **{name: value for name in CHANGES if (value := getattr(options, name))})
    if options.predict_noise:
        settings = replace(settings, predict_xstart=False)
    out = Path(options.out or HERE / ("results-quick" if options.quick else "results"))
    if options.plan:
        print(report.plan_table(settings))
        return
    records = Records(out / "runs.jsonl")
    if not options.plot:
        if options.quick:
            print("--quick: a rehearsal of the whole study; its numbers show nothing")
        try:
            study(records, settings, options.workers, options.models)
        except KeyboardInterrupt:
            sys.exit("stopped; finished runs are kept; repeat the command to resume")
    elif not records.runs:
        sys.exit(f"--plot: {records.path} has no finished runs")
    report.write_report(records, out, readme=None if options.quick or options.out else HERE / "README.md")


def study(records: Records, settings: plan.Settings, workers: int, configs=None) -> None:
    """Do all runs, or those of some configurations, that are not in the records."""
    start = time.perf_counter()
    torch.set_num_threads(1)  # the same order of sums on any machine; the models are too small for more threads
    print(f"training the classifier, {settings.classifier_steps} steps", flush=True)
    judge = classifier.train(settings.classifier_steps)
    reference, _ = classifier.judge_fresh_glyphs(judge, settings.reference, classifier.REFERENCE)
    records.begin(_setup(settings, judge, reference))
    missing = [run for run in plan.runs(settings, configs) if not records.has(*run)]
    session = 1 + max((run["session"] for run in records.runs), default=0)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, _prepare, (settings, judge.state_dict(), reference)) as pool,
        progress(len(missing), "run", hidden=not missing) as bar,
    ):
        for run in _finished(pool, missing):
            records.add(run | {"session": session, "elapsed": round(time.perf_counter() - start, 1)})
            took = f"{run['train_seconds'] + run['sample_seconds']:.0f} s"
            bar.write(f"{run['config']}, seed {run['seed']}: FID {run['fid']:.1f}, {took}", file=sys.stderr)
            bar.update()


def _finished(pool, runs):
    """Yield each run's measurements as it finishes; an interruption or error cancels runs that have not started."""
    try:
        for done in as_completed([pool.submit(_measure, run) for run in runs]):
            yield done.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _setup(settings, judge, reference):
    """What all runs share, including the reference for their FIDs."""
    floor, accuracy = classifier.judge_fresh_glyphs(judge, settings.samples, classifier.FLOOR)
    noise = torch.randn(settings.samples, 1, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    features, _ = classifier.judge_images(judge, noise, torch.zeros(len(noise)))
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "settings": asdict(settings),
        "sizes": plan.SIZES,
        "classifier": classifier.fingerprint(judge),
        "classifier_accuracy": accuracy,
        "floor_fid": frechet_distance(*floor, *reference),
        "noise_fid": frechet_distance(*moments(features), *reference),
    }


def _prepare(settings, weights, reference):
    """Set up a worker with its own copy of what all runs need."""
    global _shared
    torch.set_num_threads(1)
    judge = classifier.Classifier().eval().requires_grad_(False)
    judge.load_state_dict(weights)
    _shared = settings, judge, reference


def _measure(run):
    return training.measure(run, *_shared)


def _parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps and samples, in a separate folder")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="parallel runs, one core each (1)")
    for name in CHANGES:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"override the study's {name}; needs --out")
    parser.add_argument(
        "--models", nargs="+", choices=plan.CONFIGS, metavar="NAME", help="a subset, by the names in --plan"
    )
    parser.add_argument("--predict-noise", action="store_true", help="predict noise, as in the paper; needs --out")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the results (beside this file)")
    parser.add_argument("--plan", action="store_true", help="only print the models and their costs")
    parser.add_argument("--plot", action="store_true", help="only write summary, table and plot from the results")
    options = parser.parse_args(arguments)
    for name in ("workers", *CHANGES):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if (options.steps or options.seeds or options.models or options.predict_noise) and not options.out:
        parser.error("--steps, --seeds, --predict-noise and --models need --out: another study, another folder")
    return options


if __name__ == "__main__":
    main()
