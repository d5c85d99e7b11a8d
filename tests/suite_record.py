"""A record of gpu_suite.py that no GPU has made."""


def synthetic(gpu="NVIDIA X", date="2026-01-02T03:04:05+00:00", **changes):
    """A run in which one kernel was right at one size and wrong at another, and one kernel was right."""
    check = {"stage": "tests", "op": "mlp", "backend": "triton", "dtype": "bf16", "direction": "bwd", "why": None}
    wrong = check | {"size": "2x2x2", "is_right": False, "why": "dh: 2 > 1"}
    ms = {"median": 0.5, "p10": 0.4, "p90": 0.6, "repeats": 3}
    case = {
        "op": "gated_residual_layer_norm_modulate",
        "mode": "fwd",
        "dtype": "bf16",
        "shape": [64, 256, 1152],
        "variant": "ditfast",
        "ms": ms,
        "bytes": 10**8,
        "gb_per_s": 200.0,
        "copy_gb_per_s": 250.0,
        "copy_share": 0.8,
        "speedup": {"eager": 2.5, "compile": 1.25},
    }
    header = {"machine": {"gpu": gpu}, "gpu_state": None, "versions": {"torch": "2", "triton": "3"}, "date": date}
    return {
        "schema": 1,
        "benchmark": "gpu_suite",
        "interpreted": False,
        "header": header | {"commit": "abcdef1234"},
        "stages": [{"name": "ops", "status": "green", "result": {"header": header, "cases": [case]}}],
        "checks": [
            check | {"size": "1x1x1", "is_right": True},
            wrong,
            {**wrong, "direction": "fwd", "is_right": True},
        ],
    } | changes
