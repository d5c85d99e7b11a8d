"""The changelog's section for a tag is found, and a tag that matches nothing is rejected."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("release_notes", ROOT / ".github/release_notes.py")
module = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(module)
CHANGELOG = """# Changelog

## Unreleased

## 0.2.0 (2026-12-01)

### Added
- Flows.

## 0.1.10

- Ten.

## 0.1.1

- One.
"""


@pytest.mark.parametrize(
    "version, notes", [("0.2.0", "### Added\n- Flows.\n"), ("0.1.1", "- One.\n"), ("0.1.10", "- Ten.\n")]
)
def test_the_section_of_a_version(version, notes):
    assert module.release_notes(f"v{version}", version, CHANGELOG) == notes


@pytest.mark.parametrize(
    "tag, version", [("v0.2.1", "0.2.0"), ("0.2.0", "0.2.0"), ("v0.1", "0.1"), ("v0.3.0", "0.3.0")]
)
def test_a_mismatch_is_rejected(tag, version):
    with pytest.raises(ValueError, match="does not match|has no section"):
        module.release_notes(tag, version, CHANGELOG)
