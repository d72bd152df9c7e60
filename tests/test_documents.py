"""What the documents say is what happens."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import llama
from checkpoint_files import save_hf

from panda.cli.main import main as panda
from panda.cli.train import main as panda_train

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def console_lines() -> list[str]:
    """Every command of every ``console`` block, continuation lines joined."""
    lines = []
    for page in PAGES:
        for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines += block.replace("\\\n", " ").splitlines()
    return sorted({line.split(" # ")[0].strip() for line in lines if line.strip()})


def exit_code(command: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        return command(argv)
    except SystemExit as end:  # argparse leaves that way where it is asked for help
        return int(end.code or 0)


def test_generated_pages_are_up_to_date() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    for name, page in pages.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"run `python docs/generate.py`: docs/{name} is stale"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("line", console_lines())
def test_a_documented_command_resolves(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every panda command of the documents, behind any launcher, is checked on a copy of its data; `.ci/run` runs the
    README's two blocks as they stand. In this process: starting one takes seconds each."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)  # a test before may have been a process group of one
    words = shlex.split(line)
    names = [word.rpartition("/")[2] for word in words]
    if "panda" in names:
        monkeypatch.chdir(ROOT)
        code = exit_code(panda, words[names.index("panda") + 1 :])
    elif "panda-train" in names:
        flags = words[names.index("panda-train") + 1 :]
        (tmp_path / "run.yaml").write_text((ROOT / "configs" / "instruct-tiny.yaml").read_text())
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        if "DIR" in flags:
            save_hf(llama(max_position_embeddings=2048), tmp_path / "DIR")
        flags = ["panda:data/sample/instruct" if flag == "DATA" else flag for flag in flags]
        monkeypatch.chdir(tmp_path)
        code = exit_code(panda_train, flags) if "--help" in flags else exit_code(panda, ["check", *flags])
    else:
        assert names[0] in ("python3", "pytest", "python"), f"who runs {line!r}?"
        return
    assert code == 0, capsys.readouterr().err


def test_the_reader_of_the_plugin_guide_reads(tmp_path: Path) -> None:
    guide = (ROOT / "docs/plugins.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "register_reader" in block)
    scope: dict[str, Any] = {"__name__": "guide"}
    exec(block, scope)
    file = tmp_path / "rows.tsv"
    file.write_text("a\tb\nalone\n")
    first, second = scope["TsvReader"](None, None).read(file)
    assert (first.fields, first.number) == ({"input": "a", "target": "b"}, 1)
    assert str(second).endswith("rows.tsv, row 2: expected 2 columns, found 1")
