"""Print the changelog's section for a tag; fail if tag, version and changelog do not agree.

python .github/release_notes.py v0.2.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def release_notes(tag: str, version: str, changelog: str) -> str:
    """Return the text below ``## <version>`` in a changelog, up to the next version.

    Raises:
        ValueError: ``tag`` is not "v" + ``version``, or the changelog's section is missing or empty.
    """
    if tag != f"v{version}":
        raise ValueError(f"the tag {tag} does not match ditfast.__version__, {version}")
    section = re.search(rf"^## \[?{re.escape(version)}(?![\w.]).*\n((?:(?!## ).*\n?)*)", changelog, re.MULTILINE)
    if section is None or not section[1].strip():
        raise ValueError(f"CHANGELOG.md has no section '## {version}' with text in it")
    return section[1].strip() + "\n"


if __name__ == "__main__":
    package = (ROOT / "ditfast/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"', package, re.MULTILINE)[1]
    try:
        print(release_notes(sys.argv[1], version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")), end="")
    except ValueError as error:
        sys.exit(str(error))
