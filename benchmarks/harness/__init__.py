"""Implementation of the benchmark commands: one package per command, and shared modules."""
