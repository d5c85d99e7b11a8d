"""The kernels compiled for GPUs that are not here: no spills, wide accesses, shared memory that fits.

`aot.py` compiles what the launchers would launch, in a process of its own, since here Triton interprets.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
ROWS = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")
DTYPES = {
    "fp32": {"dtype": "float32"},
    "fp16": {"dtype": "float16"},
    "bf16": {"dtype": "bfloat16"},
    "mixed": {"dtype": "bfloat16", "stream_dtype": "float32"},
}
KERNELS = {
    **dict.fromkeys(ROWS, {"forward_kernel", "backward_kernel", "_sum_partials_kernel"}),
    "mlp": {"backward_kernel", "_sum_partials_kernel"},
    "attention": {"forward_kernel", "backward_dkdv_kernel", "backward_dq_kernel", "_sum_partials_kernel"},
    "patches": {"embed_kernel", "patchify_kernel", "unpatchify_kernel"},
}
# the first sums over chunks and writes (B, D), a fraction 1/N of what the rows are; a patch is p elements wide
MAY_BE_NARROW = {"_sum_partials_kernel", *KERNELS["patches"]}
# statistics of the rows, in each of up to 3 stages; column sums are words too: 3, of both parts of a head of 72
WORDS = {"backward_dq_kernel": 2 + 6}
SHARED_LIMIT = {80: 163, 90: 227, 120: 99}  # KB per block; 120 has what 86 and 89 have
LARGE, SMALL = (64, 256), (1, 64)  # B, N: the launchers choose other chunks for each


def case(op, dtype, d, archs=tuple(SHARED_LIMIT), tokens=LARGE):
    return {"op": op, **DTYPES[dtype], "shape": [*tokens, d], "archs": archs}


def label(c):
    kinds = {k: v for k, v in c.items() if "dtype" in k}
    dtype = next(name for name, value in DTYPES.items() if value == kinds)
    return f"{c['op']}-{dtype}-{'x'.join(map(str, c['shape']))}"


THIN = [
    *(case(op, dtype, 1152) for op in ROWS for dtype in ("bf16", "mixed")),
    *(case(op, "bf16", d, archs=(90,)) for op in ROWS for d in (384, 1024)),
    case("mlp", "bf16", 1152),
    case("attention", "bf16", 1152),
    case("patches", "bf16", 1152, archs=(90,)),
]
FULL = [
    *(
        case(op, dtype, d, tokens=tokens)
        for op in (*ROWS, "mlp")
        for d in (96, 384, 768, 1024, 1152, 1536, 4096)
        for dtype in DTYPES
        for tokens in (LARGE, SMALL)
    ),
    *(case("patches", dtype, d) for d in (384, 1152) for dtype in DTYPES),
    *(
        case("attention", dtype, d, tokens=tokens)
        for d in (384, 1152)  # head dims 64 and 72
        for dtype in ("fp16", "bf16")  # in float32 it runs only where asked for by name
        for tokens in (LARGE, SMALL)
    ),
]


def python(*args, stdin=""):
    """Standard output of Python without the interpreter of Triton."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, *args], input=stdin, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def compiled(cases):
    """Reports of the kernels of each case, by its label; one process per core."""
    workers = min(os.cpu_count(), len(cases))
    with ThreadPoolExecutor(workers) as pool:
        slices = [json.dumps(cases[i::workers]) for i in range(workers)]
        answers = pool.map(lambda stdin: python(HERE / "aot.py", stdin=stdin), slices)
    reports = {label(c): [] for c in cases}
    for report in (r for answer in answers for r in answer):
        reports[label(report["case"])].append(report)
    return reports


@pytest.fixture(scope="session")
def thin():
    return compiled(THIN)


@pytest.fixture(scope="session")
def full():
    return compiled(FULL)


def assert_lean(reports, c):
    assert {(r["kernel"], r["arch"]) for r in reports} == {(k, arch) for k in KERNELS[c["op"]] for arch in c["archs"]}
    for r in reports:
        assert r["stack"] == 0 and r["spills"] == 0, r
        assert r["shared"] <= SHARED_LIMIT[r["arch"]] * 1024, r
        assert r["widths"], f"no access to global memory found: {r}"
        if r["kernel"] not in MAY_BE_NARROW:
            assert r["narrow"] == 0 and r["words"] <= WORDS.get(r["kernel"], 6), r


@pytest.mark.parametrize("c", THIN, ids=label)
def test_kernels(c, thin):
    assert_lean(thin[label(c)], c)


@pytest.mark.slow
@pytest.mark.parametrize("c", FULL, ids=label)
def test_kernels_for_every_shape(c, full):
    assert_lean(full[label(c)], c)


WRONG = """
import json
import aot
from aot_cases import launch

launches = []
with aot.captured(launches):
    launch({"op": "layer_norm_modulate", "dtype": "bfloat16", "shape": [1, 8, 8192]}, 90)
    launch({"op": "layer_norm_modulate", "dtype": "bfloat16", "shape": [1, 8, 40]}, 90)
(kernel, args, options), (narrow, narrow_args, narrow_options) = launches[0], launches[3]
print(json.dumps(aot.build(kernel, args, options | {"num_warps": 1}, 90)))
print(json.dumps(aot.build(narrow, narrow_args, narrow_options | {"num_warps": 8}, 90)))
"""


def test_the_inspector_sees_spills_and_narrow_accesses():
    """Rows of 8192 in one warp need more than 255 registers; rows of 40 in eight warps leave 2 bytes per thread."""
    spilling, narrow = python("-c", WRONG)
    assert spilling["stack"] > 0 and spilling["spills"] > 0
    assert narrow["narrow"] > 0 and narrow["spills"] == 0
