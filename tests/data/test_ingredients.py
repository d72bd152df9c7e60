"""The code of a third-party task or reader decides where its tokens are cached: all of it, and its version."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributions import Distributions
from distributions import forget_installed
from transformers import AutoTokenizer

from panda.data import ingredients
from panda.data.ingredients import code_of
from panda.data.ingredients import tokenizer_ingredients
from panda.data.json_reader import JsonReader
from panda.data.reading import Reader
from panda.registry import Catalog
from panda.registry import NoOptions
from panda.registry.contexts import ReaderContext
from panda.registry.location import resolve_path
from panda.registry.offers import made_by

READER = """
from panda.data.json_reader import JsonReader
from acme_package.rows import change

class Reader(JsonReader):
    pass
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package, acme_package, with a reader and files beside its own."""
    folder = tmp_path / "acme_package"
    (folder / "deep").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "reader.py": READER,
        "rows.py": "change = 1",
        "deep/later.py": "x = 1",
    }.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme_package"]:
        del sys.modules[name]


def built() -> Any:
    return importlib.import_module("acme_package.reader").Reader(NoOptions(), ReaderContext())


def test_panda_s_own_code_is_its_name() -> None:
    assert code_of(JsonReader(NoOptions(), ReaderContext())) == ["panda.data.json_reader.JsonReader"]


@pytest.mark.parametrize("name", ["reader.py", "rows.py", "__init__.py", "deep/later.py"])
def test_every_file_of_a_package_decides_imported_or_not_yet(package: Path, name: str) -> None:
    before = code_of(built())
    assert code_of(built()) == before
    file = package / name
    file.write_text(file.read_text() + "\n# changed")
    assert code_of(built()) != before


def test_what_python_compiles_and_where_a_package_lies_do_not(package: Path) -> None:
    before = code_of(built())
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "rows.cpython-311.pyc").write_bytes(b"x")
    (package / "notes.txt").write_text("x")
    assert code_of(built()) == before


def test_a_class_of_panda_that_a_package_s_factory_returns_is_that_package_s(
    distributions: Distributions, tmp_path: Path
) -> None:
    source = """
        from panda.data.json_reader import JsonReader
        {imported}

        @register_reader("acme")
        def acme(options, context):
            '''Rows.'''
            return JsonReader(options, context)
        """

    def code(imported: str) -> list[Any]:
        (site / "acme_reader.py").write_text(text.replace("{imported}", imported))
        offer = Catalog().find("reader", "acme")
        component = Catalog().load(offer)
        assert component is not None
        reader: Reader = component.factory(NoOptions(), ReaderContext())
        made_by(offer, reader)
        return code_of(reader)

    modules = {"acme_reader": source, "acme_helpers": "x = 1"}
    site = distributions.install("acme", {"readers": {"acme": "acme_reader"}}, modules)
    text = (site / "acme_reader.py").read_text()
    (site / "acme-1.0.dist-info" / "top_level.txt").write_text("acme_reader\nacme_helpers\n")
    forget_installed()
    first = code("import acme_helpers")
    assert first[0] == "panda.data.json_reader.JsonReader" and first[1].keys() == {"acme"}
    assert code("import acme_helpers") == first
    (site / "acme_helpers.py").write_text("x = 2")
    changed = code("import acme_helpers")
    assert changed != first
    assert code("import acme_helpers  # changed") != changed


def test_each_special_token_that_a_template_may_write_decides() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(resolve_path("panda:data/sample/tokenizer")), local_files_only=True)
    before = tokenizer_ingredients(tokenizer)
    tokenizer.pad_token = "</s>"
    assert tokenizer_ingredients(tokenizer) != before


def test_versions_of_what_tokenises_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(resolve_path("panda:data/sample/tokenizer")), local_files_only=True)
    tokenizer.chat_template = None
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{{ messages }}"
    before = [tokenizer_ingredients(each) for each in (tokenizer, chatting)]
    assert before == [tokenizer_ingredients(copy.deepcopy(each)) for each in (tokenizer, chatting)]
    asked = ingredients.importlib.metadata.version
    for changed, decides in (("tokenizers", [True, True]), ("jinja2", [False, True]), ("transformers", [False, True])):
        monkeypatch.setattr(
            ingredients.importlib.metadata, "version", lambda name, new=changed: "9" if name == new else asked(name)
        )
        after = [tokenizer_ingredients(each) for each in (tokenizer, chatting)]
        assert [old != new for old, new in zip(before, after, strict=True)] == decides


def test_files_beside_a_module_that_no_package_has_decide_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's file may import those beside it, also later."""
    source = "from panda.data.json_reader import JsonReader\nclass Reader(JsonReader): ..."
    (tmp_path / "alone_reader.py").write_text(source)
    (tmp_path / "alone_rows.py").write_text("change = 1")
    monkeypatch.syspath_prepend(tmp_path)
    reader = importlib.import_module("alone_reader").Reader(NoOptions(), ReaderContext())
    before = code_of(reader)
    assert code_of(reader) == before
    (tmp_path / "alone_rows.py").write_text("change = 2")
    assert code_of(reader) != before
    del sys.modules["alone_reader"]


def test_code_in_no_file_is_taken_to_have_changed_in_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a notebook: a run sees one address, and another run does not take what it cached."""
    notebook = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    cell = "from panda.data.json_reader import JsonReader\nclass Reader(JsonReader): ..."
    exec(compile(cell, "/tmp/ipykernel_1/1.py", "exec"), vars(notebook))
    reader = notebook.Reader(NoOptions(), ReaderContext())
    monkeypatch.setattr(ingredients, "_unseen", "before")
    before = code_of(reader)
    assert code_of(reader) == before
    ingredients.forget_unseen_code()
    assert code_of(reader) != before
