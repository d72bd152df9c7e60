"""What the documentation says is true."""

from __future__ import annotations

import ast
import importlib
import math
import re
import runpy
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_hf
from distributions import Distributions
from distributions import fake_distributions
from distributions import forget_installed
from launching import run_panda
from launching import run_script

from panda.answers.metric import Answer
from panda.answers.metric import MetricContext
from panda.answers.scored import scored
from panda.cli.main import main as panda
from panda.cli.train import main as panda_train
from panda.data.batches import RowShape
from panda.data.json_reader import JsonReader
from panda.optim.unsharded import unsharded
from panda.registry import Catalog
from panda.registry import NoOptions
from panda.registry import components
from panda.registry.contexts import ModelContext
from panda.registry.contexts import OptimizerContext
from panda.registry.contexts import PluginContext
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import Reference
from panda.registry.contexts import TaskContext
from panda.registry.hooks import Hooks
from panda.registry.offers import kinds
from panda.registry.options import build
from panda.run.assembly import load_tokenizer
from panda.runner import Run
from panda.testing.processes import start

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "plugins" / "panda-example"
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "plugins.md"
TUTORIAL = ROOT / "docs" / "tutorial-plugin.md"
GUIDES = {TUTORIAL, ROOT / "docs" / "tutorial-chats.md", ROOT / "docs" / "recipes.md"}
"""Pages whose commands are run by tests of their own: below, and in test_guides.py."""
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of ``page`` that are in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


(OWN_RUN,) = (block for block in blocks(README, "console") if "\npanda generate " in block)
"""The README's own run, which is trained in a test of its own."""


def console_lines() -> list[str]:
    """Every command of every other ``console`` block, continuation lines joined."""
    lines = []
    for page in PAGES:
        for block in blocks(page, "console") if page not in GUIDES else []:
            if block == OWN_RUN:
                continue
            lines += block.replace("\\\n", " ").splitlines()
    return sorted({line.split(" # ")[0].strip() for line in lines if line.strip()})


def exit_code(command: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        return command(argv)
    except SystemExit as end:  # argparse exits this way after printing help
        return int(end.code or 0)


def test_generated_pages_are_up_to_date() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    for name, page in pages.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"run `python docs/generate.py`: docs/{name} is stale"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text()):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
                assert heading in anchors, f"{page.name}: {target}#{heading}"


def test_the_readme_lists_every_page() -> None:
    for page in PAGES:
        assert page == README or f"]({page.relative_to(ROOT)})" in README.read_text(), page


@pytest.mark.parametrize("line", console_lines())
def test_a_documented_command_resolves(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every panda command in the documentation, without its launcher, is checked on a copy of its data; `.ci/run` runs
    the README's first two blocks. In this process, since starting another takes seconds."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)  # an earlier test may have joined a process group of one
    monkeypatch.setattr("panda.engine.memory._host_memory", lambda: 2**42)  # the documentation names models of any size
    words = shlex.split(line)
    while re.match(r"\w+=", words[0]):  # variables
        words.pop(0)
    names = [word.rpartition("/")[2] for word in words]
    if "panda" in names:
        monkeypatch.chdir(tmp_path if "new" in names else ROOT)
        code = exit_code(panda, words[names.index("panda") + 1 :])
    elif "panda-train" in names and "herons" in line:
        return  # of a package that tests/cli/test_new.py makes and trains
    elif "panda-train" in names:
        flags = words[names.index("panda-train") + 1 :]
        (tmp_path / "run.yaml").write_text((ROOT / "configs" / "instruct-tiny.yaml").read_text())
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        if "DIR" in flags:
            save_hf(llama(max_position_embeddings=2048), tmp_path / "DIR")
        (tmp_path / "lab").mkdir()
        shutil.copy(EXAMPLE / "panda_example" / "lion.py", tmp_path / "lab")
        (plugin,) = (block for block in blocks(GUIDE, "python") if '@register_plugin("shout")' in block)
        (tmp_path / "mine.py").write_text(plugin)
        monkeypatch.setattr(sys, "path", list(sys.path))
        flags = ["panda:data/sample/instruct" if flag == "DATA" else flag for flag in flags]
        monkeypatch.chdir(tmp_path)
        code = exit_code(panda_train, flags) if "--help" in flags else exit_code(panda, ["check", *flags])
    elif names[0] == "python":
        assert (ROOT / words[1]).exists()
        return
    else:
        assert names[0] in ("python3", "pytest", "pip"), f"who runs {line!r}?"
        return
    assert code == 0, capsys.readouterr().err


def test_the_readmes_own_run_fine_tunes_a_checkpoint_and_says_so_first(tmp_path: Path) -> None:
    """Its commands, with small stand-ins for the checkpoint and the chats, and only one step."""
    _, train, generate = map(shlex.split, OWN_RUN.replace("\\\n", " ").splitlines())
    save_hf(llama(max_position_embeddings=2048), tmp_path / "SmolLM2-135M-Instruct")
    given = re.search(r"^`(\{.*\})`", README.read_text(), re.MULTILINE)
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "a.jsonl").write_text(f"{given[1]}\n" if given else "")
    trained = run_panda(*train, "--max_steps", 1, "--num_workers", 0, "-p", "no:plot", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    (shown,) = (block for block in blocks(README, "text") if block.startswith("loading torch"))
    begun, loading, _ = trained.stdout.partition("loading the weights ...\n")
    labels = [[line[:12] for line in text.splitlines() if not line.startswith("note: ")] for text in (shown, begun)]
    assert labels[0] == labels[1] and len(labels[0]) > 10 and loading
    assert "\nweights     SmolLM2-135M-Instruct (a folder): " in begun and "random" not in begun
    assert "is high for" not in begun
    answered = run_panda(*generate, cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr


def test_the_readme_names_what_there_is() -> None:
    """The table of components, against panda's own entry points."""
    rows = dict(re.findall(r"^\| (\w+) \| (`.*) \|$", README.read_text(), re.MULTILINE))
    titles = {"lr_schedulers": "schedules"}
    catalog = Catalog()
    for kind in catalog.kinds.values():
        if kind.name == "kind" or (kind.providers and "panda-train" not in kind.providers):
            continue
        named = re.findall(r"`([^`]+)`", rows[titles.get(kind.plural, kind.plural)])
        offered = [offer.name for offer in catalog.offers(kind.name) if offer.distribution == "panda-train"]
        assert sorted(named) == sorted(offered)


# -- Python blocks ----------------------------------------------------------------------------


def python_blocks(*, that_train: bool = False) -> list[Any]:
    """Every ``python`` block, with an id that says where it is: those that train, or the others."""
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in PAGES
        if page != TUTORIAL
        for number, block in enumerate(blocks(page, "python"), 1)
        if ("panda.train(" in block) == that_train
    ]


@pytest.mark.parametrize("block", python_blocks(that_train=True))
def test_a_python_block_that_trains_is_a_script_that_works(block: str, tmp_path: Path) -> None:
    """In an empty folder; what it prints of the run is true."""
    (tmp_path / "script.py").write_text(
        block + "\nassert len(run.records) == run.step > 1 and run.directory.is_dir()\n"
    )
    printed = run_script(tmp_path / "script.py", cwd=tmp_path)
    assert "print(run" not in block or re.search(r"^runs/shorter 5 \d\.\d+$", printed, re.MULTILINE)


def try_model(component: Any, tmp_path: Path, printed: Any) -> None:
    context = ModelContext(vocab_size=50, max_seq_length=8, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    model = component.factory(build(component.options, {"hidden_size": 4}), context)
    assert model(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 50)


def try_arch(component: Any, tmp_path: Path, printed: Any) -> None:
    catalog = Catalog()
    (offer,) = (each for each in catalog.offers("model") if each.module == component.module)
    model = catalog.load(offer)
    assert model is not None and component.model == model.name
    values = component.factory()
    assert values and build(model.options, values) != build(model.options, {})


def try_optimizer(component: Any, tmp_path: Path, printed: Any) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    context = OptimizerContext([{"params": [parameter], "lr": 0.5, "weight_decay": 0.0}], torch.device("cpu"))
    optimizer = component.factory(component.options(), context)
    parameter.grad = torch.tensor([2.0, 0.0, -1.0])
    if hasattr(optimizer, "bind"):
        optimizer.bind(unsharded(optimizer.param_groups))
        optimizer.step()
        expected = 1 - 0.5 * (3 / 5) ** 0.5 * torch.tensor([2.0, 0.0, -1.0])  # a ratio of norms
        assert torch.allclose(parameter.detach(), expected)
        return
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.tensor([0.5, 1.0, 1.5]))  # the sign of momentum


def try_reader(component: Any, tmp_path: Path, printed: Any) -> None:
    reader = component.factory(component.options(), ReaderContext())
    file = tmp_path / f"rows{reader.suffixes[0]}"
    file.write_text("a\tb\nalone\n")
    first, second = reader.read(file)
    assert (first.fields, first.number) == ({"input": "a", "target": "b"}, 1)
    assert str(second).endswith("rows.tsv, row 2: expected 2 columns, found 1")


def try_plugin(component: Any, tmp_path: Path, printed: Any) -> None:
    catalog = Catalog()
    offer = catalog.find("plugin", f"documented:{component.name}")
    catalog.load(offer)
    hooks = Hooks()
    hooks.add(component.factory(component.options(), PluginContext()), offer)
    if component.name == "impatient":
        try_stopping(hooks)
        return
    for rank in (0, 1):
        run = SimpleNamespace(processes=SimpleNamespace(rank=rank))
        hooks.call.panda_checkpoint_saved(run=run, path=tmp_path)
    assert printed.readouterr().out == f"saved {tmp_path}\n"


def try_stopping(hooks: Hooks) -> None:
    """A plugin that stops a run at an evaluation that is worse, also than one before the run was resumed."""
    stopped: list[str] = []
    run = SimpleNamespace(stop=stopped.append)
    for loss in (2.0, 1.5, 1.5):
        hooks.call.panda_evaluation(run=run, record={"eval_loss": loss})
    assert stopped == [] and hooks.acts("panda_evaluation")
    [state] = hooks.call.panda_save_state(run=run)
    hooks.call.panda_load_state(run=run, state=state)
    hooks.call.panda_evaluation(run=run, record={"eval_loss": 1.75})
    assert stopped == ["eval_loss rose from 1.500 to 1.750"]


def try_kind(component: Any, tmp_path: Path, printed: Any) -> None:
    site = next(Path(path) for path in sys.path if Path(path, "documented_block.py").exists())
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    with entry_points.open("a") as file:
        file.write(f"[panda.{component.name}s]\nbrevity = documented_block\n")
    forget_installed()
    catalog = Catalog()
    (listed,) = (each for each in catalog.offers(component.name) if each.distribution == "documented")
    assert listed.declaration and listed.declaration.summary and kinds()[component.name].summary == component.summary
    loaded = catalog.load(listed)
    assert loaded is not None
    judge = loaded.factory(build(loaded.options, {"characters": 8}), None)
    assert judge("four") == 0.5


def try_metric(component: Any, tmp_path: Path, printed: Any) -> None:
    metric = component.factory(component.options(), MetricContext(None))
    found = scored({component.name: metric}, [Answer("", "abc", "ab", ended=True), Answer("", "", "a", ended=True)])
    assert found.scores == {"length": 0.75}


def try_task(component: Any, tmp_path: Path, printed: Any) -> None:
    """A pair that the reference likes as the model does has the loss of a toss, a better one less."""
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "chosen": "bb", "rejected": "c"}]')
    tokenizer = load_tokenizer("panda:data/sample/tokenizer")
    context = TaskContext(tokenizer, JsonReader(NoOptions(), ReaderContext()), 20)
    task: Any = component.factory(build(component.options, {"pairs_dir": str(tmp_path / "rows.json")}), context)
    batch = task.collate([[task.dataset()[0]]], RowShape())
    model: Any = Table(len(tokenizer))
    task.reference = model
    loss, metrics = task.loss(model, batch)
    assert float(loss) == pytest.approx(math.log(2)) and batch.units == 1
    task.reference = lambda input_ids: torch.zeros(*input_ids.shape, len(tokenizer))
    assert float(task.loss(model, batch).sum) != pytest.approx(math.log(2), abs=1e-3)
    assert metrics["accuracy"][1] == 1 and task.reference_of(None) == Reference()


class Table(torch.nn.Module):
    """A model that gives a token the logits of a table."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(entries, entries, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table[input_ids]


TRIED = {
    "task": try_task,
    "model": try_model,
    "arch": try_arch,
    "optimizer": try_optimizer,
    "reader": try_reader,
    "plugin": try_plugin,
    "kind": try_kind,
    "metric": try_metric,
}


@pytest.mark.parametrize("block", python_blocks())
def test_a_python_block_is_a_component_that_works(
    block: str,
    distributions: Distributions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each block is a complete module: it is installed with entry points, found by name, built and used."""
    monkeypatch.syspath_prepend(str(EXAMPLE))  # for the imports that a factory makes from the example
    every = re.findall(r'^@register_(\w+)\("([^"]+)"', block, re.MULTILINE)
    registered = [(kind, name) for kind, name in every if kind in TRIED]
    assert registered
    entry_points: dict[str, dict[str, str]] = {}
    for kind, name in registered:
        entry_points.setdefault(kinds()[kind].plural, {})[name] = "documented_block"
    site = distributions.install("documented", entry_points, {})
    (site / "documented_block.py").write_text(block)  # without the imports that install() writes above a module
    distributions.modules |= {"documented_block", "panda_example"}
    forget_installed()
    catalog = Catalog()
    for kind, name in registered:
        component = catalog.load(catalog.find(kind, f"documented:{name}"))
        assert component is not None and component.summary
        TRIED[kind](component, tmp_path, capsys)


@pytest.mark.parametrize("page", [README, GUIDE], ids=lambda page: page.name)
def test_documented_entry_points_are_those_of_the_example(page: Path) -> None:
    actual = ConfigParser()
    actual.read(EXAMPLE / "setup.cfg")
    (block,) = blocks(page, "ini")
    documented = ConfigParser()
    documented.read_string(block)
    (module,) = (block for block in blocks(page, "python") if block.startswith("# panda_example/"))
    names = set()
    for group, text in documented["options.entry_points"].items():
        lines = text.strip().splitlines()
        assert set(lines) <= set(actual["options.entry_points"][group].strip().splitlines())
        names |= {line.partition(" = ")[0] for line in lines}
    assert names == set(re.findall(r'^@register_\w+\("([^"]+)"', module, re.MULTILINE))


# -- the tutorial --------------------------------------------------------------------------------


def install_from_source(folder: Path, site: Path) -> None:
    """What `pip install -e` does, offline: metadata of the package in ``folder``, and a link to its source."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {module}\n" for name, module in names.items()) for group, names in groups
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (site / folder.name).symlink_to(folder / folder.name)


def write_block(block: str, folder: Path) -> None:
    """Write ``block`` to the file that its first line names, or in place of one method of a class there."""
    place, _, method = block.splitlines()[0].removeprefix("# ").partition(": ")
    file, text = folder / place, block.partition("\n")[2]
    if method:
        class_name, _, name = method.partition(".")
        source = file.read_text()
        (found,) = (
            item
            for node in ast.parse(source).body
            if isinstance(node, ast.ClassDef) and node.name == class_name
            for item in node.body
            if isinstance(item, ast.FunctionDef) and item.name == name
        )
        lines = source.splitlines(keepends=True)
        text = "".join([*lines[: found.lineno - 1], text, *lines[found.end_lineno :]])
    file.write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for packages of the tutorial, which are installed in it until the end of a test."""
    monkeypatch.chdir(tmp_path)
    with fake_distributions(tmp_path) as made:
        made.modules |= {"herons", "bitterns", "egrets"}
        sys.path.append(str(tmp_path / "site"))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        yield tmp_path / "site"


def run_tests(place: Path) -> None:
    """What `pytest` does with the tests in ``place``, a package or a file, without importing torch in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == place.parts[0]]:
        del sys.modules[name]  # its files may have been written again
    components.forget({key[2] for key in components._recorded if key[2].startswith(place.parts[0])})
    forget_installed()
    for file in sorted(place.glob("tests/test_*.py")) or [place]:
        tests = [test for name, test in runpy.run_path(str(file)).items() if name.startswith("test_")]
        for test in tests:
            needed = test.__code__.co_varnames[: test.__code__.co_argcount]
            test(**{name: Path(tempfile.mkdtemp(dir=Path.cwd())) for name in needed})
        assert tests


TUTORIAL_PARTS = TUTORIAL.read_text().split("\n## ")


def test_the_tutorial_works_as_it_is_written(tmp_path: Path, site: Path) -> None:
    """Its commands and its files, in their order, where only panda is installed."""
    done = 0
    for part in TUTORIAL_PARTS:
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```", part, re.MULTILINE | re.DOTALL):
            if language == "python":
                write_block(block, tmp_path)
            for line in block.replace("\\\n", " ").splitlines() if language == "console" else []:
                command, *words = shlex.split(line)
                done += 1
                if command == "pip":
                    install_from_source(tmp_path / words[-1].partition("[")[0], site)
                    forget_installed()
                elif command == "panda":
                    assert panda(words) == 0, line
                elif command == "pytest":
                    run_tests(Path(words[0]))
                else:
                    assert command == "panda-train"
                    with start("panda.cli.train", *words, "-p", "no:plot", cwd=tmp_path) as started:
                        ended = started.wait()
                    assert ended.returncode == 0, f"{line}\n{ended.stdout}{ended.stderr}"
    assert done >= 9


def test_what_the_tutorial_breaks_is_rejected(tmp_path: Path, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two mistakes that it suggests, by the first words that it shows of what is said of them."""
    (network,) = (block for block in blocks(TUTORIAL, "python") if "network.py" in block.splitlines()[0])
    decays = "distance >= 0, self.keep ** distance.clamp(min=0), 0"
    wrong = {
        "herons": ("model", decays, decays.replace(">= 0", ">= -1")),
        "bitterns": ("task", '-(batch["grade"] * scores).sum()', '-(batch["grade"] * scores).mean()'),
    }
    for (name, (kind, right, mistaken)), shown in zip(wrong.items(), blocks(TUTORIAL, "text"), strict=True):
        assert panda(["new", "plugin", name, "--kind", kind]) == 0
        if kind == "model":
            write_block(network, tmp_path)
        file = tmp_path / name / name / ("network.py" if kind == "model" else "task.py")
        assert right in file.read_text()
        file.write_text(file.read_text().replace(right, mistaken))
        install_from_source(tmp_path / name, site)
        capsys.readouterr()
        with pytest.raises(AssertionError):
            run_tests(Path(name) / "tests" / f"test_{kind}.py")
        printed = capsys.readouterr().out
        assert shown.partition(" by ")[0].rstrip() in printed, printed


# -- what plugins may rely on -----------------------------------------------------------------


def promises() -> str:
    return GUIDE.read_text().partition("\n## What you may rely on\n")[2].partition("\n## ")[0]


PROMISED = re.findall(r"`(panda(?:\.\w+)+)`", promises())


def imported_from_panda(source: str) -> set[str]:
    """The dotted names of panda that ``source`` imports, also those only for the type checker."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "panda"}


def is_promised(name: str) -> bool:
    """Whether ``name`` is promised, or a name in a module that is."""
    return name == "panda" or name in PROMISED or name.rpartition(".")[0] in PROMISED


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_name_is_there(name: str) -> None:
    parent, _, last = name.rpartition(".")
    if not hasattr(importlib.import_module(parent), last):
        importlib.import_module(name)


def test_the_list_of_promised_names_is_whole() -> None:
    """It has all that `panda` itself exports, and the attributes of a run that it names exist."""
    exported = [name for name, value in vars(sys.modules["panda"]).items() if name[0] != "_" and callable(value)]
    assert {f"panda.{name}" for name in exported} | {"panda.hookimpl"} <= set(PROMISED)
    described = promises().partition("Of a `Run`")[2]
    attributes = {name.partition(".")[0] for name in re.findall(r"`([a-z][\w.]*)", described)}
    assert len(attributes) > 5
    assert attributes <= {field.name for field in fields(Run)} | set(vars(Run))


@pytest.mark.parametrize("file", sorted((ROOT / "plugins").rglob("*.py")), ids=lambda file: file.name)
def test_a_plugin_here_imports_only_promised_names(file: Path) -> None:
    assert [name for name in imported_from_panda(file.read_text()) if not is_promised(name)] == []


@pytest.mark.parametrize("block", python_blocks())
def test_a_python_block_imports_only_promised_names(block: str) -> None:
    imported = imported_from_panda(block)
    assert imported and [name for name in imported if not is_promised(name)] == []


@pytest.mark.parametrize("block", [*python_blocks(), *python_blocks(that_train=True)])
def test_a_python_block_uses_only_promised_names_of_panda(block: str) -> None:
    used = set(re.findall(r"\bpanda\.[A-Za-z]\w*", re.sub(r"^ *(from|import) .*", "", block, flags=re.MULTILINE)))
    assert [name for name in used if not is_promised(name)] == []


def test_the_walk_sees_every_import() -> None:
    source = "import panda.a\nif X:\n    from panda.b import C as D\ndef f():\n    from panda import e\nimport other"
    assert imported_from_panda(source) == {"panda.a", "panda.b.C", "panda.e"}
    assert is_promised("panda.registry.contexts.ModelContext") and is_promised("panda.UserError")
    assert not is_promised("panda.models.forward.isolation.refuse_without_positions") and not is_promised(
        "panda.registry"
    )


def test_the_map_of_the_code_is_that_of_the_code() -> None:
    """Rooms in CONTRIBUTING.md are those of ``panda/``, and the files that it names are there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawn = text.partition("panda/\n")[2].partition("plugins/")[0]
    rooms = set(re.findall(r"^  ([\w.]+)", drawn, re.MULTILINE))
    package = ROOT / "panda"
    there = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert rooms == there | {"runner.py", "training.py"}
    table = text.partition("## Where would I change")[2].partition("\n## ")[0]
    for name in re.findall(r"`([\w/]+\.py)`", table):
        assert (package / name).exists(), name
