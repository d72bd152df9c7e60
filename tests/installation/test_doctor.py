"""``panda doctor``: installations that are stale, names that others have, requirements, the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributions import Distributions
from distributions import forget_installed
from failures import FINE
from failures import HEADER

from panda.cli.main import main
from panda.installation import machine

METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: {}\nRequires-Dist: panda-train>=0.1\n"


def install(made: Distributions, name: str = "acme-panda", version: str = "1.0", **names: str) -> Path:
    """A package with models of these names and modules."""
    modules = {module: HEADER + FINE.replace("tiny", each) for each, module in names.items()}
    return made.install(name, {"models": names}, modules, version=version, metadata=METADATA.format(name, version))


def examined(capsys: pytest.CaptureFixture[str], *names: str) -> tuple[int, str]:
    code = main(["doctor", *names])
    return code, capsys.readouterr().out


def make_editable(site: Path, folder: Path) -> None:
    """Let the distribution in ``site`` refer to its source in ``folder``."""
    (info,) = site.glob("*.dist-info")
    origin = {"url": folder.as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(origin))
    forget_installed()


SOURCES = {
    "pyproject.toml": '[project.entry-points."panda.models"]\ntiny = "acme.tiny"\nlarge = "acme.tiny"\n',
    "setup.cfg": "[options.entry_points]\npanda.models =\n    tiny = acme.tiny\n    large = acme.tiny\n",
    "setup.py": "setup(entry_points={'panda.models': ['tiny = acme.tiny', 'large = acme.tiny'], 'x': 'a = b'})\n",
}


@pytest.mark.parametrize("file", SOURCES)
def test_entry_points_that_changed_since_the_installation(
    file: str, distributions: Distributions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, folder = install(distributions, tiny="acme.tiny"), tmp_path / "source"
    folder.mkdir()
    make_editable(site, folder)
    (folder / file).write_text(SOURCES[file])
    code, text = examined(capsys, "acme-panda")
    assert code == 1
    assert f"acme-panda 1.0: {folder} has large = acme.tiny under panda.models, unlike what is installed" in text
    assert f"Install it again: `pip install -e {folder}`." in text


def test_what_is_installed_as_its_source_says_is_not_stale(
    distributions: Distributions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = install(distributions, tiny="acme.tiny")
    (tmp_path / "pyproject.toml").write_text('[project.entry-points."panda.models"]\ntiny = "acme.tiny"\n')
    make_editable(site, tmp_path)
    assert [examined(capsys, name)[0] for name in ("acme-panda", "Acme_Panda")] == [0, 0]
    (tmp_path / "pyproject.toml").unlink()
    assert examined(capsys, "acme-panda")[0] == 0, "what cannot be read is not stale"


def test_a_source_that_is_gone(
    distributions: Distributions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_editable(install(distributions, tiny="acme.tiny"), tmp_path / "gone")
    code, text = examined(capsys, "acme-panda")
    assert code == 1 and f"editable mode from {tmp_path / 'gone'}, which is gone" in text


def test_metadata_that_is_there_twice(distributions: Distributions, capsys: pytest.CaptureFixture[str]) -> None:
    install(distributions, version="2.0", tiny="acme.tiny")
    install(distributions, version="1.0", small="acme.small")
    code, text = examined(capsys, "acme-panda")
    assert "acme-panda 2.0: its metadata is there again as version 1.0" in text and "pip uninstall acme-panda" in text
    assert code == 0, "what is used works"


def test_names_that_others_have(distributions: Distributions, capsys: pytest.CaptureFixture[str]) -> None:
    install(distributions, llama="acme.tiny", shared="acme.other")
    install(distributions, "bolt-panda", shared="bolt.tiny")
    code, text = examined(capsys, "acme-panda")
    assert code == 0
    assert "panda has 'llama' itself, and that is what the name alone means" in text
    assert "'shared' is offered by bolt-panda 1.0 (bolt.tiny), too" in text and "Write `acme-panda:shared`" in text


def test_versions_of_the_api_that_several_state_are_no_names(
    distributions: Distributions, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, module, version in (("acme-panda", "acme.tiny", "v1"), ("bolt-panda", "bolt.tiny", "1")):
        site = install(distributions, name, **{module.partition(".")[0]: module})
        (file,) = site.glob("*.dist-info/entry_points.txt")
        file.write_text(file.read_text() + f"[panda.api]\nversion = {version}\n")
    forget_installed()
    code, text = examined(capsys, "acme-panda")
    assert code == 0 and text.endswith("\nnothing is wrong\n")
    file.write_text(file.read_text().replace("version = 1", "version = v9\nvresion = v1"))
    code, text = examined(capsys, "bolt-panda")
    assert code == 1
    assert "panda.api: version = v9)" in text and "it was written for version 9 of panda's API" in text
    assert "'vresion' states nothing" in text
    assert "nothing is wrong" in examined(capsys, "acme-panda")[1]


def test_requirements_and_extras(distributions: Distributions, capsys: pytest.CaptureFixture[str]) -> None:
    more = (
        "Requires-Dist: pyyaml<1\nRequires-Dist: nothing-there>=2; python_version < '3'\nProvides-Extra: fast\n"
        "Requires-Dist: not-there-at-all; extra == 'fast'\nRequires-Dist: pluggy>=99; extra == 'fast'\n"
    )
    site = install(distributions, tiny="acme.tiny")
    (info,) = site.glob("*.dist-info")
    (info / "METADATA").write_text(METADATA.format("acme-panda", "1.0") + more)
    code, text = examined(capsys, "acme-panda")
    assert code == 1
    assert "it requires pyyaml<1, and pyyaml " in text and "`pip install 'pyyaml<1'`" in text
    assert "its extra 'fast' requires pluggy>=99" in text and "extra fast: not-there-at-all not installed" in text
    assert "nothing-there" not in text


def test_a_folder_of_the_users(
    distributions: Distributions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = tmp_path / "lab"
    lab.mkdir()
    (lab / "doctored_good.py").write_text(HEADER + FINE)
    code, text = examined(capsys, "--user_dir", str(lab))
    assert (code, text) == (0, f"{lab}: model tiny\n\nnothing is wrong\n")
    (lab / "doctored_odd.py").write_text(HEADER + FINE.replace("tiny", "llama").replace("width: int = 8", "width = 8"))
    (lab / "doctored_bad.py").write_text("def (")
    hook = "    def __init__(self, o, c): ...\n    def panda_step_ned(self, run): ...\n"
    (lab / "doctored_hook.py").write_text(HEADER + f'@register_plugin("hook")\nclass P:\n    "P."\n{hook}')
    code, text = examined(capsys, "--user_dir", str(lab))
    assert code == 1 and text.startswith(f"{lab}: model tiny, plugin hook, model llama\n")
    assert f"BROKEN  {lab}: {lab / 'doctored_bad.py'}:1: SyntaxError" in text
    assert "'llama' is also a name of panda-train 0.1.0\n    Write `user_dir:llama` for this one" in text
    assert "Options.width has no type, so it is no option" in text and "Did you mean 'panda_step_end'" in text
    assert main(["doctor", "--user_dir", str(tmp_path / "gone")]) == 2


def test_a_package_that_nobody_has_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "panda-trian"]) == 2
    assert "Did you mean 'panda-train'?" in capsys.readouterr().err


def test_pandas_own_installation_is_healthy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "LITTLE_DISK", 0)
    code, text = examined(capsys)
    assert code == 0, text
    assert "\npanda-train 0.1.0: " in text and "torch 2" in text
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    monkeypatch.setenv("PANDA_CACHE", "/dev/null/cache")
    code, text = examined(capsys)
    assert code == 1
    assert (
        f"HOME is '{tmp_path}/gone'" in text
        and "PANDA_CACHE (the token cache): /dev/null/cache: it cannot be written" in text
    )
    monkeypatch.setattr(machine, "LITTLE_DISK", 2**80)
    assert "GiB are free there" in examined(capsys)[1]


def test_a_user_without_a_home_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nobodys_home: None
) -> None:
    monkeypatch.delenv("PANDA_CACHE", raising=False)
    code, text = examined(capsys)
    assert code == 1
    assert "HOME is None" in text and "PANDA_CACHE (the token cache): '~/.cache/panda': this user has no home" in text


def test_a_torch_for_cpus_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia/gpus/0").mkdir(parents=True)
    monkeypatch.setattr(machine, "GPUS", tmp_path / "proc/driver/nvidia/gpus")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    assert "built for CPUs" in str(machine.examine_machine()[0])
