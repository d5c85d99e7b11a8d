"""bench_attention.py: attention in ditfast and other libraries."""
