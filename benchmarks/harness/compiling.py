"""Time this process has spent compiling, which is long on a new machine, where nothing is cached."""

import sys
from functools import wraps
from importlib.util import find_spec

SECONDS_PER_KERNEL = 0.35  # assumed for Triton in its interpreter, which compiles nothing
INDUCTOR = ("_compile.compile_inner", "backward._backward_impl")
COUNTS = ("kernels", "triton_s", "inductor_s")


class Watch:
    """Counts Triton kernels from now on, and Inductor's seconds since the process started."""

    def __init__(self):
        self.kernels, self.seconds, self.seen = 0, 0.0, set()
        if find_spec("triton") is None:
            return
        from triton import knobs

        if knobs.runtime.interpret:
            _before_each_run(self._interpreted)
        else:
            knobs.compilation.listener = self._compiled

    def result(self) -> dict:
        dynamo = sys.modules.get("torch._dynamo.utils")  # if nothing was compiled, it may not be imported
        inductor = sum(sum(dynamo.compilation_time_metrics.get(name, ())) for name in INDUCTOR) if dynamo else 0.0
        return dict(zip(COUNTS, (self.kernels, round(self.seconds, 1), round(inductor, 1)), strict=True))

    def _compiled(self, *, times, cache_hit, **_):
        if not cache_hit:
            self.kernels, self.seconds = self.kernels + 1, self.seconds + times.total / 1e6

    def _interpreted(self, function, args, named):
        """Count what a GPU would compile: one kernel per combination of dtypes and constants."""
        values = [*args, *(named[name] for name in sorted(named) if name != "grid")]
        key = (function.__name__, *(str(getattr(value, "dtype", value)) for value in values))
        if key not in self.seen:
            self.seen.add(key)
            self.kernels, self.seconds = self.kernels + 1, self.seconds + SECONDS_PER_KERNEL


def total(results) -> dict:
    """The sum of several processes' results."""
    results = list(results)
    return {name: round(sum(found.get(name, 0) for found in results), 1) for name in COUNTS}


def _before_each_run(call):
    """Make Triton's interpreter call ``call(function, args, named arguments)`` before it runs a function."""
    from triton.runtime.interpreter import InterpretedFunction

    run = getattr(InterpretedFunction.run, "__wrapped__", InterpretedFunction.run)  # not wrapped by an earlier watch

    @wraps(run)
    def watched(self, *args, **named):
        call(self, args, named)
        return run(self, *args, **named)

    InterpretedFunction.run = watched
