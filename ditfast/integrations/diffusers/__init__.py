"""Diffusers models on this package's operations: see docs/diffusers.md."""

from ditfast.integrations.diffusers.patching import patch, unpatch
from ditfast.integrations.diffusers.report import Report

__all__ = ["Report", "patch", "unpatch"]
