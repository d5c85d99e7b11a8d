"""gpu_suite.py: everything on a GPU, in stages."""
