"""Triton kernels and their launchers. Importing this package imports none of them."""

if "." not in __name__:
    raise ImportError(f"import ditfast.kernels instead of {__name__}: another package is published as `kernels`")
