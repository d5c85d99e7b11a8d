"""A mkdocs hook: the site has the repository's files in the same places, so that links work in both."""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")  # relative ones
LIST = re.compile(r"(?<=:\n)(?=- )")  # one right after a line of text


def on_files(files: Files, config) -> Files:
    """Keep the theme's files, all pages in the navigation, and what they link to."""
    pages = [ROOT / name for name in _pages(config["nav"])]
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text("utf-8"))}
    found = {path for path in {*pages, *linked} if path.is_file()}
    place = config["site_dir"], config["use_directory_urls"]
    kept = [file for file in files if not file.src_dir or Path(file.src_dir) != ROOT / "docs"]
    return Files([*kept, *(File(str(path.relative_to(ROOT)), str(ROOT), *place) for path in sorted(found))])


def on_page_markdown(markdown: str, **_) -> str:
    """Add empty lines before lists, which the site's Markdown needs and GitHub's does not."""
    return LIST.sub("\n", markdown)


def _pages(nav):
    """The paths in a nested navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(part)]
