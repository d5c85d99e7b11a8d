"""Run the stages and record what they found: see gpu_suite.py."""

import re
import signal
import tempfile
import time
from pathlib import Path

import torch

from harness import jsonfile
from harness.arguments import Parser, count, one_of
from harness.machine import header
from harness.suite import digest, documents, readme, record
from harness.suite.execute import run_stage
from harness.suite.stages import BENCHMARKS, ROOT, STAGES


def parse(argv):
    parser = Parser(prog="gpu_suite.py", description="Verify and time everything on this machine's GPU.")
    add = parser.add_argument
    names = [stage.name for stage in STAGES]
    add("--stages", nargs="+", type=one_of(names), default=names, metavar="NAME", help=f"any of {', '.join(names)}")
    add("--deadline", type=count, default=480, metavar="SECONDS", help="for all stages together (default 480)")
    add("--commit", metavar="SHA", help="the measured commit, if this is not a git checkout")
    add("--out", type=Path, metavar="DIR", help="folder of the JSON (default benchmarks/results/<GPU>)")
    add("--merge", nargs="+", type=Path, metavar="FILE", help="merge the newest result of every stage, and exit")
    add("--interpret", action="store_true", help="rehearse without a GPU: tiny sizes, kernels in the interpreter")
    add(
        "--docs",
        action="store_true",
        help="generate docs/verification.md, docs/performance.md and README's first table, and exit",
    )
    options = parser.parse_args(argv)
    if not (options.docs or options.merge or options.interpret or torch.cuda.is_available()):
        parser.error("argument --interpret: required without a CUDA GPU")
    if options.commit and not re.fullmatch(r"[0-9a-f]{7,40}(\+dirty)?", options.commit):
        parser.error(f"argument --commit: must be 7 to 40 hexadecimal digits, got {options.commit!r}")
    try:
        options.merged = record.merge([record.load(path) for path in options.merge]) if options.merge else None
    except ValueError as error:
        parser.error(f"argument --merge: {error}")
    return options


def run(stages, options) -> list[dict]:
    """Run stages and return their results. The file is always complete and keeps earlier results of other stages."""
    head = header("cpu" if options.interpret else "cuda")
    head["commit"] = options.commit or head["commit"]
    path = record.result_path(options.out, head)
    made, end = record.new(head, options), time.monotonic() + options.deadline
    earlier, results = _earlier(path, made), {}

    def save(found, checks):
        if "header" in (found["result"] or {}):
            found["result"]["header"]["commit"] = head["commit"]
        results[found["name"]] = found, [{"stage": found["name"], **check} for check in checks]
        now = {"stages": [f for f, _ in results.values()], "checks": [c for _, cs in results.values() for c in cs]}
        jsonfile.write(path, record.merge([*earlier, made | now]))

    for i, stage in enumerate(stages):
        seconds = stage.weight / sum(s.weight for s in stages[i:]) * (end - time.monotonic())
        with tempfile.TemporaryDirectory() as folder:
            run_stage(stage, seconds, options.interpret, Path(folder), save, golden=path.parent.resolve())
        _show(results[stage.name][0])
    print(path)
    return [found for found, _ in results.values()]


def _earlier(path, made):
    """The record in the file, if it can be merged."""
    try:
        found = record.load(path)
        record.merge([found, made])
    except ValueError:
        return []
    return [found]


def _show(found):
    compiled = (found["result"] or {}).get("compiling")
    text = f"{found['name']:10} {found['status']:8} {found['seconds']:6.1f} s"
    if compiled:
        text += f", compilers {compiled['triton_s'] + compiled['inductor_s']:.0f} s ({compiled['kernels']} kernels)"
    print(f"{text}  {found['why'] or ''}", *digest.lines(found["result"]), sep="\n    ", flush=True)


def main(argv=None) -> int:
    options = parse(argv)
    if options.docs:
        documents.generate(BENCHMARKS / "results", ROOT / "docs")
        measured = documents.measured_on_cpus(BENCHMARKS / "results")
        readme.update(ROOT / "README.md", measured["block"], measured["model"])
        return 0
    if options.merge:
        path = record.result_path(options.out, options.merged["header"])
        jsonfile.write(path, options.merged)
        print(path)
        stages = options.merged["stages"]
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a stage's subprocesses end too
        stages = run([stage for stage in STAGES if stage.name in options.stages], options)
    return 0 if all(stage["status"] == "green" for stage in stages) else 1
