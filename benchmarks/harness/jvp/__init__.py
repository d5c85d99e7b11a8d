"""The parts of bench_jvp.py."""
