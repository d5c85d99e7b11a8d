"""This package's operations in models of other packages: a folder for each."""
