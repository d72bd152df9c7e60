"""What setup.cfg cannot say: the README as a package index shows it, with absolute links, and addresses.

The rest of the metadata is in setup.cfg, where ``[panda] repository`` is the one place for the address of the
repository.
"""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
INDEX = "https://pypi.org/project/panda-train/"


def long_description(readme: str, repository: str) -> str:
    """``readme`` with links into ``repository``; where that is not known, relative links become names of files.

    Comments, which an index does not need, are left out.
    """

    def absolute(match: re.Match[str]) -> str:
        text, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        if not repository:
            file = target.rstrip("/")
            return f"`{file}`" if text.strip("`") in (target, file) else f"{text} (`{file}`)"
        kind = "tree" if (ROOT / target.partition("#")[0]).is_dir() else "blob"
        return f"[{text}]({repository}/{kind}/main/{target})"

    without_comments = re.sub(r"^<!--.*?-->\n", "", readme, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", absolute, without_comments)


def project_urls(repository: str) -> dict[str, str]:
    """The addresses in the metadata."""
    if not repository:
        return {"Homepage": INDEX}
    return {
        "Homepage": repository,
        "Documentation": f"{repository}/tree/main/docs",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


if __name__ == "__main__":
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    repository = settings["panda"]["repository"].rstrip("/")
    setup(
        long_description=long_description((ROOT / "README.md").read_text(encoding="utf-8"), repository),
        long_description_content_type="text/markdown",
        project_urls=project_urls(repository),
    )
