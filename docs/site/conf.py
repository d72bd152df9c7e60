"""The site of these pages: `sphinx-build -W -c docs/site . build/site`, from the root. Needs the extra `docs`.

MyST reads Markdown as GitHub does, and Sphinx finds every link that leads nowhere. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import posixpath
import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NAVIGATION = {
    "Begin": ["docs/tutorial-chats", "docs/recipes", "docs/concepts"],
    "Train": [
        *(
            "docs/data",
            "docs/models",
            "docs/optimizers",
            "docs/memory",
            "docs/machines",
            "docs/deploy",
            "docs/evaluation",
        ),
        *("docs/weights", "docs/serving", "docs/python"),
    ],
    "Look up": [
        *("docs/configuration", "docs/support", "docs/speed", "docs/refusals", "docs/certificates", "docs/other-tools"),
        *("docs/trust", "SECURITY"),
    ],
    "Extend": [
        *("docs/tutorial-plugin", "docs/plugins", "plugins/panda-example/README", "plugins/panda-preference/README"),
        "plugins/panda-rl/README",
    ],
    "Project": ["CHANGELOG", "CONTRIBUTING"],
}
"""Pages by part; the README is the first one. One that is in none, or is not there, fails the build."""

project = "panda"
author = "panda"
root_doc = "README"
extensions = ["myst_parser"]
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "plugins/*/README.md"]
exclude_patterns = ["build", "dist", "runs", "panda", "tests", "bench", "configs", ".venv", "*.egg-info", ".*"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "panda"
html_extra_path = ["index.html"]
html_css_files = ["site.css"]
html_static_path = ["static"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"source_repository": "", "footer_icons": []}


def setup(app: Any) -> None:
    app.connect("source-read", read)


def read(app: Any, page: str, content: list[str]) -> None:
    """The text of ``page`` as the site has it: the first one with the navigation, and links to what is no page."""
    content[0] = with_links(content[0], page)
    if page == root_doc:
        content[0] += "".join(
            f"\n```{{toctree}}\n:hidden:\n:caption: {part}\n\n" + "\n".join(f"/{each}" for each in pages) + "\n```\n"
            for part, pages in NAVIGATION.items()
        )


def with_links(markdown: str, page: str) -> str:
    """``markdown`` with links to folders and other files: to the repository, or, without an address, as their names."""
    pages = {page, *(each for part in NAVIGATION.values() for each in part), root_doc}

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = target.partition("#")[0]
        if "://" in target or not path:
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if file.removesuffix(".md") in pages or not (ROOT / file).exists():
            return match[0]  # of the latter Sphinx says that it is not there
        if f"{file}/README" in pages:
            return f"[{text}](/{file}/README.md)"
        if address := repository():
            return f"[{text}]({address}/{'tree' if (ROOT / file).is_dir() else 'blob'}/main/{file})"
        return f"`{file}`" if text.strip("`") in (target, file, path) else f"{text} (`{file}`)"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, part) for part in parts[::2]]
    return "".join(parts)


def repository() -> str:
    """The address of the repository; empty until it is public."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return settings["panda"]["repository"].rstrip("/")
