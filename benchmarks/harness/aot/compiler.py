"""Compile what the launchers would launch, for a GPU that is not present.

Run as a script, in a process without the interpreter: reads cases as JSON from standard input, writes one line of
JSON per compiled kernel. A case is {"op", "dtype", "stream_dtype", "shape": [B, N, D], "archs": [80, 90, ...]},
and "choice", the index of attention's tiles if it has several.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(Path(__file__).parents[2]))

from harness.aot.cases import launch, row_bytes
from harness.aot.sass import inspect, issue_slots, wgmma_advice

TYPES = {"torch.float32": "*fp32", "torch.float16": "*fp16", "torch.bfloat16": "*bf16"}


@contextmanager
def captured(launches):
    """Collect (kernel, args, kwargs) instead of launching."""
    from triton.runtime.jit import JITFunction

    original = JITFunction.run

    def collect(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    JITFunction.run = collect
    try:
        yield
    finally:
        JITFunction.run = original


def launches(case, arch):
    """(kernel, args, kwargs) of every launch of ``case["op"]``."""
    found = []
    with captured(found):
        launch(case, arch)
    return found


def signature(kernel, args, kwargs):
    """Types, constants and alignment hints as Triton's own launcher would derive them."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        k: v for k, v in kwargs.items() if k in kernel.arg_names
    }
    types, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value, parameter = values[name], kernel.params[i]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            types[name], constants[name] = "constexpr", value
        elif hasattr(value, "data_ptr"):
            types[name] = TYPES[str(value.dtype)]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    return types, constants, attributes


def build(kernel, args, kwargs, arch):
    """Results of `inspect`, shared memory, ptxas' advice on wgmma, and launch options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = signature(kernel, args, kwargs)
    source = ASTSource(kernel, types, constants, attributes)
    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages", "enable_fp_fusion")}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = {"kernel": kernel.__name__, "arch": arch, "shared": compiled.metadata.shared, **options}
    return report | inspect(compiled.asm["cubin"]) | {"wgmma_advice": wgmma_advice(compiled.asm["ptx"], arch)}


def build_all(case, arch):
    """One report per launch; for row kernels, with the issue slots of a row and the launch's chunk."""
    for kernel, args, kwargs in launches(case, arch):
        report = build(kernel, args, kwargs, arch)
        sass = report.pop("sass")
        if "MAIN" in kwargs and "STAGES" in kwargs:
            lanes = kwargs["MAIN"] + kwargs["TAIL"]
            stored = row_bytes(case, kernel.__name__)["stored"]
            report |= issue_slots(sass, kwargs["num_warps"], stored, kwargs["D"], lanes)
            report |= {"form": [kwargs["MAIN"], kwargs["TAIL"]], "rows_ahead": kwargs["STAGES"] - 1}
            report["chunk"] = args[kernel.arg_names.index("chunk")]
        yield report


def main():
    for case in json.load(sys.stdin):
        for arch in case["archs"]:
            for report in build_all(case, arch):
                print(json.dumps({"case": case, **report}), flush=True)


if __name__ == "__main__":
    main()
