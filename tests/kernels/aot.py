"""Compile what the launchers would launch, for a GPU that is not here.

Run as a script, in a process without the interpreter: reads cases as JSON on standard input, writes one line of
JSON per compiled kernel. A case is {"op", "dtype", "stream_dtype", "shape": [B, N, D], "archs": [80, 90, ...]}.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

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
    """Registers, stack bytes, shared bytes and the widths of global accesses of the cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = signature(kernel, args, kwargs)
    source = ASTSource(kernel, types, constants, attributes)
    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages", "enable_fp_fusion")}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = {"kernel": kernel.__name__, "arch": arch, "shared": compiled.metadata.shared, **options}
    return report | inspect_cubin(compiled.asm["cubin"])


def inspect_cubin(cubin):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))
    accesses = re.findall(r"\b(LDG|STG|LDGSTS)\.E(\S*)", sass)
    return {
        "registers": registers,
        "stack": stack,
        "spills": len(re.findall(r"\b(STL|LDL)\b", sass)),
        "widths": sorted({access_bytes(suffix) for _, suffix in accesses}),
        "narrow": sum(access_bytes(suffix) < 4 for _, suffix in accesses),
        "words": sum(access_bytes(suffix) == 4 for _, suffix in accesses),
        "tensor_core": len(re.findall(r"\b(HMMA|HGMMA|QGMMA)", sass)),
    }


def access_bytes(suffix):
    for name, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if name in suffix:
            return size
    return 4


def main():
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(Path(__file__).parent))
    from aot_cases import launch

    for case in json.load(sys.stdin):
        for arch in case["archs"]:
            launches = []
            with captured(launches):
                launch(case, arch)
            for kernel, args, kwargs in launches:
                print(json.dumps({"case": case, **build(kernel, args, kwargs, arch)}), flush=True)


if __name__ == "__main__":
    main()
