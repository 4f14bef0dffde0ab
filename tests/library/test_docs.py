"""The snippets of the documentation run, in the order in which they stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/library").glob("*.md"))
DETECTOR = ROOT / "docs/library/another_detector.md"


def _snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_all_pages_are_found() -> None:
    names = {"own_loop.md", "lightning_module.md", "spconv_unet.md", "another_detector.md"}
    assert {page.name for page in PAGES} == names


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "snippet"}
    for snippet in _snippets(page):
        exec(compile(snippet, page.name, "exec"), names)


def test_another_detector_is_short() -> None:
    network = _snippets(DETECTOR)[0]
    classes = [node.name for node in ast.parse(network).body if isinstance(node, ast.ClassDef)]
    assert classes == ["Residual", "PillarNet"]
    assert len(network.splitlines()) <= 80
