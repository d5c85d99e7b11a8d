"""The parts of bench_model.py."""
