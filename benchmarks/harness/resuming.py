"""Results that a second process can continue if the first one crashes or hangs, as a faulty kernel makes it do."""

import json
import time
from pathlib import Path

from harness import compiling, jsonfile
from harness.errors import error_line, leave_if_gpu_is_lost
from harness.report import busy


def add_option(parser) -> None:
    text = "continue the file of --json, whose process ended, without the problem it ended in"
    parser.add_argument("--resume", action="store_true", help=text)


def earlier(options) -> dict:
    """What the earlier process wrote; {} if nothing, or if there was none."""
    path: Path | None = options.json if options.resume else None
    return json.loads(path.read_text()) if path and path.exists() else {}


def measure_each(problems: dict, cases_of, result: dict, options) -> None:
    """Add the cases of each problem to ``result`` and write it, until ``options.deadline``.

    After a problem that ended a process, those whose names start with the same word are left out, too.

    Args:
        problems: by name.
        cases_of: problem -> its cases.
        result: gets `cases`, `notes`, `tried` (names), `running` (the name under way), `ended` (names of problems in
            which a process ended).
    """
    end, watch, before = time.monotonic() + (options.deadline or float("inf")), compiling.Watch(), earlier(options)
    tried, ended = before.get("tried", []), [*before.get("ended", ()), *filter(None, [before.get("running")])]
    result["cases"] = before.get("cases", [])
    result["notes"] = list(dict.fromkeys([*result["notes"], *before.get("notes", ())]))
    result |= {"tried": tried, "running": None, "ended": ended}
    for done, (name, problem) in enumerate(problems.items()):
        if name in tried or name.split()[0] in [other.split()[0] for other in ended]:
            continue
        if time.monotonic() > end:
            result["notes"].append(f"deadline: {len(problems) - done} of {len(problems)} problems skipped")
            break
        tried.append(name)
        jsonfile.write(options.json, result | {"running": name})
        try:
            with busy(name):
                result["cases"] += cases_of(problem)
        except Exception as error:  # a failing reference must not lose the others
            result["notes"].append(f"{name} skipped: {error_line(error)}")
        result["compiling"] = compiling.total([before.get("compiling", {}), watch.result()])
        jsonfile.write(options.json, result)
        leave_if_gpu_is_lost()
    result["notes"] += [f"{name}: its process ended" for name in ended]
