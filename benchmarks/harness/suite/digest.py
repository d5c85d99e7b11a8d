"""What a stage found in a few lines, for the terminal; the file has everything."""

from harness.errors import error_line
from harness.verdicts import is_green

KEYS = ("op", "mode", "shape", "head_dim", "dtype")  # of a case; variants with equal ones share a line
LINES, WIDTH = 30, 200
REASONS = 6


def lines(result: dict | None) -> list[str]:
    """At most `LINES` lines of at most `WIDTH` characters."""
    if not result:
        return []
    found = []
    for part in PARTS:
        try:
            found += [line[:WIDTH] for line in part(result)]
        except Exception as error:  # a result that is not as expected must not end the suite
            found.append(f"not shown: {error_line(error)}")
    return found if len(found) <= LINES else [*found[: LINES - 1], f"and {len(found) - LINES + 1} more lines"]


def _reasons(result):
    """Failures first: whatever they are, they matter more than times."""
    cases = [(case["variant"], case["mode"], _reason(case)) for case in result.get("cases", ())]
    tests = [(failure["test"], failure["why"]) for failure in result.get("failures", ())]
    tools = [(tool["tool"], tool["why"], *tool["tail"][-2:]) for tool in result.get("tools", ()) if tool["why"]]
    found = [", ".join(map(str, each)) for each in [*tests, *tools, *(case for case in cases if case[-1])]]
    found = list(dict.fromkeys(found))
    yield from found[:REASONS]
    if len(found) > REASONS:
        yield f"and {len(found) - REASONS} more failures"
    ended = [f"{name}: its process ended" for name in result.get("ended", ())]
    yield from dict.fromkeys([*result.get("notes", ()), *ended])


def _reason(case):
    return None if is_green(case) else case["error"] or case["parity"]["reason"]


def _counts(result):
    if "passed" in result:
        yield ", ".join(f"{result[name]} {name}" for name in ("passed", "failed", "skipped"))


def _cases(result):
    groups = {}
    for case in result.get("cases", ()):
        key = " ".join("x".join(map(str, v)) if isinstance(v := case[k], list) else str(v) for k in KEYS if k in case)
        groups.setdefault(key, []).append(case)
    for key, cases in groups.items():
        yield f"{key}: {', '.join(map(_case, cases))}"


def _case(case):
    time = _time(case["ms"]) if case["ms"] else "no time"
    share = next((f" ({case[name]:.0%})" for name in ("copy_share", "floor_share", "gemm_share") if name in case), "")
    return f"{case['variant']} {time}{share}{'' if is_green(case) else ' WRONG'}"


def _time(ms):
    return f"{1e3 * ms['median']:.0f} us"


def _backends(result):
    for variant, operations in result.get("backends", {}).items():
        ran = [f"{name} on {' + '.join(names)}" for name, names in operations.items()]
        yield f"{variant} ran {', '.join(ran) or 'what torch.compile fused'}"


def _questions(result):
    for question in result.get("questions", ()):
        cases = [f"{c['alternative']} {_time(c['ms']) if c['ms'] else c['error']}" for c in question["cases"]]
        what = f"{question['what']} {'x'.join(map(str, question['shape']))}"
        yield f"{what}: {question.get('error') or '; '.join(cases)}"


def _rates(result):
    if "copies" in result:
        yield "copies, GB/s: " + ", ".join(f"{c['bytes'] >> 20} MiB {c['gb_per_s']:.0f}" for c in result["copies"])
        gemms = [f"{g['gemm']} {g['dtype']} {g['tflops']:.0f}" for g in result["gemms"]]
        for first in range(0, len(gemms), 6):
            yield "GEMMs, TFLOP/s: " + ", ".join(gemms[first : first + 6])


PARTS = (_counts, _reasons, _cases, _backends, _questions, _rates)
