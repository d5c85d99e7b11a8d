"""Kernels compiled ahead of time for GPUs that are not present, and analysis of their machine code."""
