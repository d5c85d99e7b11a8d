"""bench_attention.py: attention by ditfast and by its peers."""
