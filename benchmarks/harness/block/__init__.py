"""bench_block.py: blocks in eager, torch.compile and ditfast."""
