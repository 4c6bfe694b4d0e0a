"""The python blocks of every page run, top to bottom, in one namespace a page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITHOUT_CODE: frozenset[str] = frozenset()  # pages that have none, by name
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_there_are_pages():
    assert PAGES
    assert {page.name for page in PAGES} >= WITHOUT_CODE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert bool(blocks) != (page.name in WITHOUT_CODE), "no python block, or one on a page listed"
    namespace = {"__name__": page.stem}
    for block in blocks:
        # Empty lines before it, so that a traceback has the line of the page.
        before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * before + block[1], str(page), "exec"), namespace)
