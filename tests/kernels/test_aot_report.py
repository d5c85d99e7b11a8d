"""The page of predictions is generated from the files next to it, which describe the kernels' current forms."""

import json

import pytest

pytest.importorskip("triton")

from ditfast.kernels.rows import FORMS  # noqa: E402
from harness import aot_report  # noqa: E402
from harness.aot.gpus import GPUS  # noqa: E402


def result(name):
    return json.loads((aot_report.RESULTS / f"{name}.json").read_text())


def test_page_is_generated_from_the_files():
    page = (aot_report.RESULTS / "rows.md").read_text()
    assert page == aot_report.document(result("pieces"), result("masked"))


def test_files_describe_the_current_kernels():
    forms = {r["d"]: [None, None] for r in result("pieces")["kernels"]}
    for r in result("pieces")["kernels"]:
        forms[r["d"]][r["kernel"] == "backward_kernel"] = (*r["form"], r["num_warps"])
    assert {d: tuple(pair) for d, pair in forms.items()} == FORMS


def test_prediction():
    """A row of 1000 + 500 bytes in chunks of 4, for each of the three limits."""
    row = {"registers": 64, "num_warps": 1, "shared": 0, "rows_ahead": 2, "chunk": 4}
    row |= {"loaded": 1000, "stored": 500, "sums": 0.0, "slots": 10.0, "outside": 8.0}
    memory = 1500 * 132 * 1.98e9 / 4.3e12
    bound = aot_report.predict(row, "H200")
    assert bound["blocks"] == 32 and bound["in_flight"] == 64 * 64 / 132 * 2000
    assert bound["memory"] == pytest.approx(memory) and bound["limit"] == "memory" and bound["share"] == 1
    slow = aot_report.predict(row | {"slots": 2 * memory - 2}, "H200")
    assert slow["limit"] == "issue" and slow["share"] == pytest.approx(0.5)
    waiting = aot_report.predict(row | {"registers": 255, "num_warps": 8, "rows_ahead": 1}, "H200")
    assert waiting["blocks"] == 1 and waiting["limit"] == "latency" and waiting["latency"] == pytest.approx(1980)


def test_resident_blocks():
    gpu = GPUS["H200"]
    assert gpu.resident(registers=32, warps=1, shared=0) == 32
    assert gpu.resident(registers=129, warps=4, shared=0) == 65536 // (136 * 32 * 4)
    assert gpu.resident(registers=32, warps=16, shared=0) == 4
    assert gpu.resident(registers=32, warps=1, shared=100 * 1024) == 2
