"""This package's operations in models of other packages, one folder each."""
