"""panda writes over nothing that is not its own, and reads from nobody whom it does not trust."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from panda.data.content_hash import remember
from panda.files.locks import held
from panda.files.own import refuse_links_out
from panda.files.own import refuse_others
from panda.files.own import refuse_strangers
from panda.registry import UserError
from panda.weights.export import exporting


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """A folder of somebody's work, beside the run directory ``run``."""
    for name in ("thesis", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("Years of work.")
    return tmp_path / "thesis"


@pytest.mark.parametrize("link", ["export", "checkpoints", "metrics.jsonl", "model/config.json", "checkpoints/latest"])
def test_a_link_out_of_a_run_is_refused(link: str, thesis: Path) -> None:
    run = thesis.parent / "run"
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).symlink_to(thesis if link in ("export", "checkpoints") else thesis / "chapter.tex")
    with pytest.raises(UserError, match=rf"run/{link}: it is a link to {thesis}.*, and panda writes only inside"):
        refuse_links_out(run)


def test_a_link_that_stays_inside_is_none_of_them(thesis: Path) -> None:
    run = thesis.parent / "run"
    (run / "old").mkdir()
    (run / "best").symlink_to("old")
    (thesis.parent / "elsewhere").symlink_to(run)
    refuse_links_out(thesis.parent / "elsewhere")


@pytest.mark.parametrize("linked", [True, False])
def test_an_export_replaces_only_an_export(linked: bool, thesis: Path) -> None:
    folder = thesis.parent / "run/export"
    folder.symlink_to(thesis) if linked else thesis.rename(folder)
    message = r"export: an export would replace it, and it holds 'chapter.tex'"
    with pytest.raises(UserError, match=message), exporting(folder) as new:
        new.mkdir()
    assert (folder / "chapter.tex").read_text() == "Years of work."
    (folder / "chapter.tex").rename(folder / "notes.json")  # as an export may have it, but for what makes it one
    with pytest.raises(UserError, match="an export would replace it, and it is something else"):
        refuse_others(folder, ("*.json",), ("config.json",), "an export")
    (folder / "notes.json").rename(folder / "config.json")
    refuse_others(folder, ("*.json",), ("config.json",), "an export")


def test_a_lock_does_not_empty_what_a_link_leads_to(thesis: Path) -> None:
    lock = thesis.parent / "run/.lock"
    lock.symlink_to(thesis / "chapter.tex")
    with pytest.raises(OSError, match="symbolic links"), held(lock):
        pass
    note = thesis.parent / "run/hashes"
    note.mkdir()
    remember(thesis, "0", note)
    [name] = note.iterdir()
    name.unlink()
    name.symlink_to(thesis / "chapter.tex")
    remember(thesis, "0", note)
    assert (thesis / "chapter.tex").read_text() == "Years of work."


def test_of_a_shared_cache_only_what_trusted_users_wrote_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, entry = tmp_path / "cache", tmp_path / "cache/entry"
    entry.mkdir(parents=True)
    refuse_strangers(entry, cache, "token_cache")
    refuse_strangers(cache / "none", cache, "token_cache")
    cache.chmod(0o1777)
    refuse_strangers(entry, cache, "token_cache")  # this user's own
    if os.geteuid() == 0:
        os.chown(entry, 12345, 12345)
        with pytest.raises(UserError, match=r"it belongs to the user with the number 12345, and everybody may write"):
            refuse_strangers(entry, cache, "token_cache")
        cache.chmod(0o2775)  # a group's
        refuse_strangers(entry, cache, "token_cache")
    cache.chmod(0o755)
    entry.chmod(0o777)
    with pytest.raises(UserError, match=r"token_cache: .*entry: everybody may write into it"):
        refuse_strangers(entry, cache, "token_cache")
    (cache / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link, and panda follows none in a cache"):
        refuse_strangers(cache / "link", cache, "token_cache")
