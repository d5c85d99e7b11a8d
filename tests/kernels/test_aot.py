"""The kernels compiled for GPUs that are not present: no spills, wide accesses, few instructions per row.

`harness.aot.compiler` compiles what the launchers would launch, in a separate process, as here Triton interprets.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

from ditfast.kernels.rows import FORMS  # noqa: E402
from harness.aot import cases, compiler  # noqa: E402
from harness.aot.gpus import GPUS  # noqa: E402
from harness.aot.sass import issue_slots  # noqa: E402

ROWS = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")
ROW_JVPS = tuple(f"{op}_jvp" for op in ROWS)
DTYPES = {
    "fp32": {"dtype": "float32"},
    "fp16": {"dtype": "float16"},
    "bf16": {"dtype": "bfloat16"},
    "mixed": {"dtype": "bfloat16", "stream_dtype": "float32"},
}
KERNELS = {
    **dict.fromkeys(ROWS, {"forward_kernel", "backward_kernel", "sum_partials_kernel"}),
    "mlp": {"backward_kernel", "sum_partials_kernel"},
    "attention": {"forward_kernel", "backward_dkdv_kernel", "backward_dq_kernel", "sum_partials_kernel"},
    "patches": {"embed_kernel", "patchify_kernel", "unpatchify_kernel"},
    **dict.fromkeys((*ROW_JVPS, "mlp_jvp", "attention_jvp"), {"jvp_kernel"}),
}
# the first sums over chunks and writes (B, D), 1/N of the rows' bytes; a patch is p elements wide
MAY_BE_NARROW = {"sum_partials_kernel", *KERNELS["patches"]}
# column sums: 3, of both parts of a head of 72, and the log-sum-exp
WORDS = {"backward_dq_kernel": 2 + 6}
# per thread on sm_90 at D = 1152, in every dtype, by triton 3.6 and 3.7; with more, fewer programs fit the GPU
REGISTERS = {
    "layer_norm_modulate": {"forward_kernel": 128, "backward_kernel": 168},
    "gated_residual": {"forward_kernel": 128, "backward_kernel": 128},
    "gated_residual_layer_norm_modulate": {"forward_kernel": 255, "backward_kernel": 255},
    "mlp": {"backward_kernel": 128},
    "attention": {"forward_kernel": 255, "backward_dkdv_kernel": 255, "backward_dq_kernel": 184},
    "layer_norm_modulate_jvp": {"jvp_kernel": 168},
    "gated_residual_jvp": {"jvp_kernel": 184},
    "gated_residual_layer_norm_modulate_jvp": {"jvp_kernel": 255},
    "mlp_jvp": {"jvp_kernel": 128},
    "attention_jvp": {"jvp_kernel": 255},
}
# ptxas keeps two or four words in local memory rather than fit one program less
STACK = {
    ("gated_residual_layer_norm_modulate-fp32", 2048, 120): 8,
    ("attention-fp32", 1152, 120): 8,
    ("layer_norm_modulate-mixed", 1152, 80): 8,  # by triton 3.6
    ("attention-bf16", 1152, 90): 8,  # by triton 3.6
    ("attention-bf16-64x256x1152", 1152, 90): 8,  # by triton 3.6, its second choice of tiles
    ("gated_residual_layer_norm_modulate_jvp-fp32", 1152, 120): 16,
    ("attention_jvp-bf16", 1152, 120): 16,
    ("attention_jvp-fp16", 1152, 120): 16,
}
SHARED_LIMIT = {80: 163, 90: 227, 120: 99}  # KB per block; 120 has as much as 86 and 89
LARGE, SMALL = (64, 256), (1, 64)  # B, N: the launchers choose different chunks for each


def case(op, dtype, d, archs=tuple(SHARED_LIMIT), tokens=LARGE):
    return {"op": op, **DTYPES[dtype], "shape": [*tokens, d], "archs": archs}


def label(c):
    kinds = {k: v for k, v in c.items() if "dtype" in k}
    dtype = next(name for name, value in DTYPES.items() if value == kinds)
    tiles = f"-tiles{c['choice']}" if "choice" in c else ""
    return f"{c['op']}-{dtype}-{'x'.join(map(str, c['shape']))}{tiles}"


THIN = [
    *(case(op, dtype, 1152) for op in ROWS for dtype in ("bf16", "mixed")),
    *(case(op, "bf16", d, archs=(90,)) for op in ROWS for d in FORMS if d != 1152),
    *(case(op, "fp32", 1152, archs=(90,)) for op in ROWS),
    case("mlp", "bf16", 1152),
    case("attention", "bf16", 1152),
    case("attention", "bf16", 1152, archs=(90,)) | {"choice": 1},
    case("attention", "fp32", 1152, archs=(90,)),
    case("patches", "bf16", 1152, archs=(90,)),
    *(case(op, "bf16", 1152, archs=(80, 90)) for op in ROW_JVPS),
    *(case(op, dtype, 1152, archs=(90,)) for op in ROW_JVPS for dtype in ("mixed", "fp32")),
    *(case(ROW_JVPS[-1], "bf16", d, archs=(90,)) for d in FORMS if d != 1152),  # the one that holds the most rows
    case("attention_jvp", "fp32", 1152, archs=(90,)),
    case("mlp_jvp", "bf16", 1152, archs=(80, 90)),
    case("attention_jvp", "bf16", 1152, archs=(80, 90)),
    case("attention_jvp", "bf16", 1152, archs=(90,)) | {"choice": 1},
]


def spread(op, dtypes, widths):
    """Every width in every dtype for sm_90; for the others every width and every dtype, and few tokens."""
    longer = range(max(len(dtypes), len(widths)))
    return [
        *(case(op, dtype, d, archs=(90,)) for dtype in dtypes for d in widths),
        *(case(op, dtypes[i % len(dtypes)], widths[i % len(widths)], (80, 120), SMALL) for i in longer),
    ]


FULL = [  # of all combinations, 3000 seconds of a core, what takes 740
    *(c for op in (*ROWS, "mlp", *ROW_JVPS, "mlp_jvp") for c in spread(op, [*DTYPES], (96, *FORMS, 1536, 4096))),
    *spread("patches", [*DTYPES], (384, 1152)),
    *(c for op in ("attention", "attention_jvp") for c in spread(op, ("fp32", "fp16", "bf16"), (384, 1152))),
    *(
        case(op, dtype, d, archs=(90,)) | {"choice": 1}
        for op in ("attention", "attention_jvp")
        for d in (384, 1152)  # head dims 64 and 72
        for dtype in ("fp16", "bf16")
    ),
]


def python(*args, stdin=""):
    """Run Python without Triton's interpreter; return its standard output."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(compiler.__file__).parents[2])}
    done = subprocess.run([sys.executable, *args], input=stdin, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def compiled(cases):
    """Reports on every case's kernels, by label; one process per core."""
    workers = min(os.cpu_count(), len(cases))
    with ThreadPoolExecutor(workers) as pool:
        slices = [json.dumps(cases[i::workers]) for i in range(workers)]
        answers = pool.map(lambda stdin: python(compiler.__file__, stdin=stdin), slices)
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
        stack = STACK.get((label(c).rsplit("-", 1)[0], c["shape"][2], r["arch"]), 0)
        assert r["stack"] <= stack and r["spills"] <= stack, r
        assert r["shared"] <= SHARED_LIMIT[r["arch"]] * 1024, r
        assert r["widths"], f"no access to global memory found: {r}"
        assert not r["wgmma_advice"], r
        is_attention = c["op"] in ("attention", "attention_jvp")
        if is_attention and r["kernel"] != "sum_partials_kernel":
            assert (r["tensor_core"] > 0) == (c["dtype"] != "float32"), r
        if r["kernel"] not in MAY_BE_NARROW:
            statistics = 2 * (1 + r.get("rows_ahead", 2))  # per row in flight
            one_each = is_attention and c["dtype"] == "float32"  # elements of a tail, for this many threads
            assert r["narrow"] == 0, r
            assert r["words"] <= WORDS.get(r["kernel"], statistics) or one_each, r


@pytest.mark.parametrize("c", THIN, ids=label)
def test_kernels(c, thin):
    assert_lean(thin[label(c)], c)


@pytest.mark.slow
@pytest.mark.parametrize("c", FULL, ids=label)
def test_kernels_for_every_shape(c, full):
    assert_lean(full[label(c)], c)


def assert_memory_bound(reports, c):
    """On an H200, a multiprocessor issues a row's instructions faster than memory delivers the row.

    Instructions outside the loop over tokens are spread over the tokens of a full chunk.
    """
    rows = [r for r in reports if r["arch"] == 90 and "slots" in r]
    assert {r["kernel"] for r in rows} == KERNELS[c["op"]] - {"sum_partials_kernel"}
    for r in rows:
        columns = c["shape"][2]
        moved = sum(cases.row_bytes(c, r["kernel"]).values()) * columns
        slots = r["slots"] + r["outside"] / r["chunk"]
        assert slots <= GPUS["H200"].memory_clocks(moved), r


@pytest.mark.parametrize("c", [c for c in THIN if c["op"] in REGISTERS and c["shape"][2] == 1152], ids=label)
def test_registers(c, thin):
    used = {r["kernel"]: r["registers"] for r in thin[label(c)] if r["arch"] == 90}
    limits = REGISTERS[c["op"]]
    assert limits.keys() <= used.keys()
    assert all(used[kernel] <= limit for kernel, limit in limits.items()), used


def has_form(c):
    return c["op"] in (*ROWS, *ROW_JVPS) and c["shape"][2] in FORMS and c["shape"][:2] == list(LARGE)


@pytest.mark.parametrize("c", [*filter(has_form, THIN)], ids=label)
def test_rows_are_memory_bound(c, thin):
    assert_memory_bound(thin[label(c)], c)


@pytest.mark.slow
@pytest.mark.parametrize("c", [*filter(has_form, FULL)], ids=label)
def test_rows_of_every_dtype_are_memory_bound(c, full):
    assert_memory_bound(full[label(c)], c)


WRONG = """
import json
from harness.aot.compiler import build, launches

wide, *_ = launches({"op": "layer_norm_modulate", "dtype": "bfloat16", "shape": [1, 8, 8192]}, 90)
narrow, *_ = launches({"op": "layer_norm_modulate", "dtype": "bfloat16", "shape": [1, 8, 40]}, 90)
_, dkdv, *_ = launches({"op": "attention", "dtype": "bfloat16", "shape": [1, 64, 1152]}, 90)
for (kernel, args, options), change in (
    (wide, {"num_warps": 1}), (narrow, {"num_warps": 8}), (dkdv, {"num_warps": 8, "num_stages": 2})
):
    print(json.dumps(build(kernel, args, options | change, 90)))
"""


def test_the_inspector_detects_problems():
    """Rows of 8192 need more than 255 registers in one warp; rows of 40 leave 2 bytes per thread in eight warps.

    With eight warps and two stages, dK/dV's wgmma is serialized.
    """
    spilling, narrow, serialized = python("-c", WRONG)
    assert spilling["stack"] > 0 and spilling["spills"] > 0
    assert narrow["narrow"] > 0 and narrow["spills"] == 0
    assert serialized["wgmma_advice"] == ["C7515"]


LOOP = """
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/                   FADD R4, R4, R5 ;  /* 0x0 */
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*0040*/                   STG.E desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*0050*/                   NOP ;  /* 0x0 */
        /*0060*/               @P0 BRA 0x20 ;  /* 0x0 */
        /*0070*/                   EXIT ;  /* 0x0 */
        /*0080*/                   BRA 0x80 ;  /* 0x0 */
"""


def test_issue_slots_of_a_loop():
    """Four instructions in two warps for two rows; the load, the exit and the trap are outside."""
    expected = {"slots": 4 * 2 / 2 / 4, "outside": 3 * 2 / 4, "rows_per_iteration": 2, "loops": 1}
    assert issue_slots(LOOP, warps=2, column_bytes=2, d=256, lanes=256) == expected
    assert issue_slots(LOOP, warps=2, column_bytes=2, d=200, lanes=320) == expected  # masked: a store was dropped
    with pytest.raises(ValueError, match="a loop stores 512 columns"):
        issue_slots(LOOP, warps=2, column_bytes=2, d=300, lanes=384)
