"""The site of docs/: built as it is published, without a warning, and without anything from elsewhere."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs" / "site"
for needed in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(needed, reason="the extra `docs` is not installed")


@pytest.fixture(scope="module")
def conf() -> dict[str, Any]:
    return runpy.run_path(str(SITE / "conf.py"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built by the command that docs/site/conf.py names."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", SITE, ROOT, folder]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_each_page_is_in_the_site_and_in_its_navigation(built: Path, conf: dict[str, Any]) -> None:
    pages = [page for part in conf["NAVIGATION"].values() for page in part]
    there = {str(file.relative_to(ROOT).with_suffix("")) for file in (ROOT / "docs").glob("*.md")}
    assert there < set(pages) and len(set(pages)) == len(pages)
    home = (built / "README.html").read_text(encoding="utf-8")
    for page in pages:
        assert (built / f"{page}.html").exists() and f'href="{page}.html"' in home, page
    assert "README.html" in (built / "index.html").read_text()
    assert "suppress_warnings" not in conf, "links that lead nowhere are warnings"


def test_nothing_is_loaded_from_elsewhere(built: Path) -> None:
    for file in [*built.rglob("*.html"), *built.rglob("*.css")]:
        text = file.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]*?src=\"(?:https?:)?//[^\"]+|url\(['\"]?https?://|@import", text
        )
        loaded += re.findall(r"<link[^>]*?rel=\"stylesheet\"[^>]*?href=\"(?:https?:)?//", text)
        assert not loaded, file


def test_links_to_what_is_no_page_lead_to_the_repository_or_name_a_file(
    conf: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_links = conf["with_links"]
    text = "[a](../setup.cfg) [configs](../configs/) [p](../plugins/panda-rl) [b](data.md#fields) [no](../no.md)"
    monkeypatch.setitem(with_links.__globals__, "repository", lambda: "")
    named = "a (`setup.cfg`) `configs` [p](/plugins/panda-rl/README.md) [b](data.md#fields) [no](../no.md)"
    assert with_links(text, "docs/x") == named
    monkeypatch.setitem(with_links.__globals__, "repository", lambda: "https://host/panda")
    assert "[a](https://host/panda/blob/main/setup.cfg) [configs](https://host/panda/tree/main/configs)" in with_links(
        text, "docs/x"
    )
    fenced = "```\n[a](../setup.cfg)\n```"
    assert with_links(fenced, "docs/x") == fenced
