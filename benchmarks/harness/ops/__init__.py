"""bench_ops.py: operations in eager, torch.compile and ditfast."""
