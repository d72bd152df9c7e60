"""What authors of packages do wrong: a module, or metadata, and what has to be said of it."""

# ruff: noqa: E501 - a failure a line

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field

HEADER = "from dataclasses import dataclass, field\nfrom typing import *\nfrom panda import *\n"

FINE = '''
@dataclass(frozen=True)
class Options:
    """Options."""

    width: int = 8
    """Width."""


@register_model("tiny", options=Options)
def build(options, context):
    """Tiny."""
    from torch import nn

    return nn.Sequential(nn.Embedding(context.vocab_size, options.width), nn.Linear(options.width, context.vocab_size))
'''


@dataclass
class Failure:
    """One thing that is wrong with acme-panda, and words of what is said of it."""

    said: str
    """By one of the commands."""
    source: str = FINE
    kind: str = "model"
    module: str = "acme.tiny"
    """In the entry point."""
    shown: str = ""
    """What messages name; by default the module."""
    entry_points: str = ""
    """The content of entry_points.txt; by default what is right."""
    requires: str = ""
    files: dict[str, str] = field(default_factory=dict)
    """More modules, or others."""
    name: str = "tiny"
    unnamed: tuple[str, ...] = ()
    """Commands that need not name the package: of a user's mistake, or of words that are the author's own."""


def options(fields: str, more: str = "", said: str = "", **others: object) -> Failure:
    """A model whose options have ``fields``."""
    source = f'''
@dataclass(frozen=True)
class Options:
    """Options."""

    {fields}
{more}

@register_model("tiny", options=Options)
def build(options, context):
    """Tiny."""
'''
    return Failure(said, source, **others)  # type: ignore[arg-type]


def factory(said: str, body: str = "return None", arguments: str = "options, context", how: str = "def") -> Failure:
    """A model whose factory has this body."""
    return Failure(said, f'@register_model("tiny")\n{how} build({arguments}):\n    """Tiny."""\n    {body}\n')


def arch(said: str, body: str, arguments: str = "", decorator: str = '"tiny", model="llama"') -> Failure:
    """An arch whose factory has this body."""
    source = f'@register_arch({decorator})\ndef tiny({arguments}):\n    """Tiny."""\n    {body}\n'
    return Failure(said, source, "arch")


def plugin(said: str, hook: str, init: str = "def __init__(self, options, context): ...") -> Failure:
    """A plugin with this hook."""
    source = f'@register_plugin("tiny")\nclass Tiny:\n    """Tiny."""\n    {init}\n    {hook}\n'
    return Failure(said, source, "plugin")


def reader(said: str, read: str = "", suffixes: str = 'suffixes = (".json",)') -> Failure:
    """A reader whose ``read`` is this."""
    init = "def __init__(self, options, context): ..."
    return Failure(
        said,
        f'@register_reader("tiny")\nclass Tiny:\n    """Tiny."""\n    {suffixes}\n    {init}\n    {read}\n',
        "reader",
    )


def task(said: str, dataset: str, unit: str = "samples", base: str = "Task") -> Failure:
    """A task with this data set."""
    source = f'''
from panda.tasks.task import Task

@register_task("tiny")
class Tiny({base}):
    """Tiny."""
    unit = "{unit}"

    def __init__(self, options, context):
        self.context = context

    {dataset}
    def collate(self, rows, shape): ...
    def loss(self, model, batch): ...
'''
    return Failure(said, source, "task")


def decorated(said: str, decorator: str, kind: str = "model") -> Failure:
    """A factory with this decorator."""
    return Failure(said, f'{decorator}\ndef build(options, context):\n    """Tiny."""\n', kind)


def beginning(said: str, line: str) -> Failure:
    """A module that begins with this line."""
    return Failure(said, f"{line}\n{FINE}")


FAILURES: dict[str, Failure] = {
    # -- metadata
    "group in the singular": Failure("Write `panda.models`", entry_points="[panda.model]\ntiny = acme.tiny"),
    "group of pandas": Failure("Write `panda.models`", entry_points="[pandas.models]\ntiny = acme.tiny"),
    "group with an underscore": Failure("Write `panda.models`", entry_points="[panda_models]\ntiny = acme.tiny"),
    "group in capitals": Failure("Write `panda.models`", entry_points="[Panda.Models]\ntiny = acme.tiny"),
    "group misspelt": Failure("Write `panda.models`", entry_points="[panda.modles]\ntiny = acme.tiny"),
    "group with a hyphen": Failure("Write `panda.models`", entry_points="[panda-models]\ntiny = acme.tiny"),
    "kind that nobody adds": Failure("Write one of panda.tasks", entry_points="[panda.judges]\ntiny = acme.tiny"),
    "entry point without =": Failure("is no `name = module`", entry_points="[panda.models]\ntiny acme.tiny"),
    "entry point without module": Failure("is no `name = module`", entry_points="[panda.models]\ntiny =", shown="tiny"),
    "no entry points": Failure(
        "has no entry points for it",
        entry_points="[console_scripts]\na = b:c",
        shown="no names",
        unnamed=("show", "check"),
    ),
    "module relative": Failure("is no absolute module name", module=".tiny"),
    "module as a path": Failure("is no absolute module name", module="acme/tiny.py"),
    "module of the distribution's name": Failure("is no absolute module name", module="acme-panda.tiny"),
    "module with the function": Failure("'acme.tiny.build' is not there", module="acme.tiny.build"),
    "module renamed": Failure("'acme.small' is not there", module="acme.small"),
    "package left out": Failure("'acmme', in which it would be, is not there", module="acmme.tiny"),
    "name declared twice": Failure("are one name", entry_points="[panda.models]\ntiny = acme.tiny\nTiny = acme.tiny"),
    "name of the kind": Failure(
        "is no word in small letters",
        '@register_kind("Big-Kind")\nclass K:\n    """K."""\n',
        "kind",
        name="Big-Kind",
        unnamed=("show",),
    ),
    "kind of panda's own": Failure(
        "is one of panda's own",
        '@register_kind("model")\nclass K:\n    """K."""\n',
        "kind",
        name="model",
        unnamed=("show",),
    ),
    "requirement missing": Failure("which is not installed", requires="not-there-at-all>=2", shown="not-there"),
    "panda too old": Failure("panda-train>=99, and panda-train", requires="panda-train>=99", shown="panda-train"),
    "requirement unreadable": Failure("cannot be read", requires="panda train >> 2", shown="panda train"),
    # -- decorators
    "no decorator": decorated("did not register that name: it registers no model", ""),
    "decorator without a call": decorated("which is no name. Write `@register_model", "@register_model"),
    "decorator without a name": decorated("missing 1 required positional argument: 'name'", "@register_model()"),
    "name misspelt": decorated("registers 'tinny', and no model 'tiny'", '@register_model("tinny")'),
    "decorator of another kind": decorated("Declare `tiny = acme.tiny` under `panda.tasks`", '@register_task("tiny")'),
    "name a number": decorated("registered under 3, which is no name", "@register_model(3)"),
    "name empty": decorated("a name must not be empty", '@register_model("")'),
    "name with a colon": decorated("a name must not be empty, contain ':'", '@register_model("acme:tiny")'),
    "name with a space": decorated("or begin or end with space", '@register_model(" tiny")'),
    "unknown keyword": decorated("unexpected keyword argument 'option'", '@register_model("tiny", option=None)'),
    "aliases in a text": decorated("aliases must be a tuple of names", '@register_model("tiny", aliases="small")'),
    "decorator misspelt": decorated("name 'register_modle' is not defined", '@register_modle("tiny")'),
    "two of one name": beginning(
        "two components of one name", FINE + '@register_model("TINY")\ndef two(o, c):\n    """Two."""\n'
    ),
    "declared nowhere": beginning(
        "which no entry point names, so nobody finds it", '@register_reader("lost")\ndef lost(o, c):\n    """L."""\n'
    ),
    # -- imports
    "syntax": beginning("SyntaxError: invalid syntax", "def build(:"),
    "tabs": beginning("TabError", "def f():\n\tif 1:\n        pass"),
    "null bytes": beginning("null bytes", "x = '\0'"),
    "missing dependency": beginning("No module named 'acme_missing'", "import acme_missing"),
    "import of no name of panda's": beginning(
        "cannot import name 'register_modle'", "from panda import register_modle"
    ),
    "raises": beginning("RuntimeError: no licence", "raise RuntimeError('no licence')"),
    "raises a UserError": beginning("no licence", "raise UserError('no licence')"),
    "exits": beginning("SystemExit: 3", "raise SystemExit(3)"),
    "exits without a word": beginning("SystemExit", "raise SystemExit"),
    "raises what ends Python": beginning("Odd: x", "class Odd(BaseException): ...\nraise Odd('x')"),
    "recursion": beginning("RecursionError", "def f(): f()\nf()"),
    "circular": Failure(
        "circular import",
        f"from acme.other import WIDTH\n{FINE}",
        files={"acme.other": "from acme.tiny import Options\nWIDTH = 1\n"},
    ),
    "package that fails": Failure("RuntimeError: in init", files={"acme.__init__": "raise RuntimeError('in init')\n"}),
    "prints": beginning("importing it prints 'hello'", "print('hello')"),
    "heavy": beginning("importing it imports numpy", "import numpy"),
    "changes the folder": beginning("it changes the working directory", "import os\nos.chdir('/')"),
    "starts a thread": beginning(
        "it starts a thread",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1,), daemon=True).start()",
    ),
    "reads a relative file": beginning("No such file or directory: 'words.txt'", "WORDS = open('words.txt').read()"),
    "parses arguments": beginning("SystemExit: 2", "import argparse\nargparse.ArgumentParser().parse_args(['--x'])"),
    # -- options
    "options no dataclass": Failure(
        "options must be a frozen dataclass",
        "class O: ...\n@register_model('tiny', options=O)\ndef build(o, c):\n    'T.'\n",
    ),
    "options not frozen": Failure(
        "Write `@dataclass(frozen=True)`",
        "@dataclass\nclass O: ...\n@register_model('tiny', options=O)\ndef build(o, c):\n    'T.'\n",
    ),
    "options an object": Failure(
        "options must be a frozen dataclass",
        "@register_model('tiny', options=NoOptions())\ndef build(o, c):\n    'T.'\n",
    ),
    "options a dict": Failure(
        "options must be a frozen dataclass",
        "@register_model('tiny', options={'width': 8})\ndef build(o, c):\n    'T.'\n",
    ),
    "options without a docstring": Failure(
        "Options has no docstring",
        "@dataclass(frozen=True)\nclass Options:\n    width: int = 8\n    'W.'\n@register_model('tiny', options=Options)\ndef build(o, c):\n    'T.'\n",
    ),
    "default of another type": options(
        'width: int = "8"\n    "W."', said="the default of 'width', '8', is not an integer"
    ),
    "default none": options('width: int = None\n    "W."', said="the default of 'width', None, is not an integer"),
    "default out of bounds": options('width: Annotated[int, Meta(ge=1)] = 0\n    "W."', said="is not an integer >= 1"),
    "default of no choice": options('width: Literal["a", "b"] = "c"\n    "W."', said="is not one of a, b"),
    "default that can change": options('width: tuple[int, ...] = [1]\n    "W."', said="mutable default <class 'list'>"),
    "default made a list": options(
        'width: tuple[int, ...] = field(default_factory=lambda: ["x"])\n    "W."', said="the default of 'width', ['x']"
    ),
    "type list": options('width: list[int] = ()\n    "W."', said="has the type list[int]; panda's are"),
    "type dict": options('width: dict = None\n    "W."', said="has the type <class 'dict'>; panda's are"),
    "type any": options('width: Any = None\n    "W."', said="has the type typing.Any; panda's are"),
    "type union": options('width: int | str = 1\n    "W."', said="an option's type must be one type"),
    "type that is nowhere": options('width: "Widht" = 1\n    "W."', said="name 'Widht' is not defined"),
    "bounds of another type": options(
        'width: Annotated[str, Meta(ge=1)] = "a"\n    "W."', said="the bounds of 'width' do not fit its type"
    ),
    "pattern that is none": options(
        'width: Annotated[str, Meta(pattern="(")] = "a"\n    "W."', said="the bounds of 'width' do not fit its type"
    ),
    "key of panda's own": options('seed: int = 1\n    "S."', said="is one of panda's own", unnamed=("check",)),
    "no annotation": options("width = 8", said="has no type, so it is no option"),
    "no help": options("width: int = 8", said="its option 'width' has no help"),
    "names of a kind that is not there": options(
        'judge: Annotated[str, Names("judge")] = "x"\n    "J."', said="which no installed package adds"
    ),
    "values that are refused by themselves": options(
        'width: int = 8\n    "W."', "    def __post_init__(self):\n        raise ValueError('odd')", said="odd"
    ),
    # -- factories
    "factory without arguments": factory("is called as `build(options, context)`, and takes ()", arguments=""),
    "factory of one": factory("and takes (options): too many positional arguments", arguments="options"),
    "factory of three": factory("missing a required argument: 'more'", arguments="options, context, more"),
    "factory by keywords": factory("and takes (*, options, context)", arguments="*, options, context"),
    "factory returns none": factory("returned None, and not a Module"),
    "factory returns a class": factory("and not a Module", "import torch; return torch.nn.Linear"),
    "factory returns a dict": factory("returned {}, and not a Module", "return {}"),
    "factory async": factory("its factory is async", how="async def"),
    "factory a generator": factory("its factory is a generator", "yield 1"),
    "factory exits": factory("ended the process (SystemExit: 4)", "raise SystemExit(4)"),
    "factory lacks a dependency": factory("No module named 'acme_missing'", "import acme_missing"),
    "factory of no option": factory("has no attribute 'width'", "return options.width"),
    "factory of no context": factory("has no attribute 'vocabulary'", "return context.vocabulary"),
    "factory of no name": factory("name 'torch' is not defined", "return torch.nn.Linear(1, 1)"),
    "factory without docstring": Failure(
        "it has no description", '@register_model("tiny")\ndef build(o, c):\n    pass\n'
    ),
    "factory a lambda": Failure("it has no description", 'register_model("tiny")(lambda options, context: None)\n'),
    "arch of no model": arch(
        "unknown model 'lama'. Did you mean 'llama'?", "return {}", decorator='"tiny", model="lama"'
    ),
    "arch without a model": arch("missing 1 required keyword-only argument: 'model'", "return {}", decorator='"tiny"'),
    "arch of no option": arch("sets 'hiden_size', which model 'llama' lacks", 'return {"hiden_size": 3}'),
    "arch of a bad value": arch("hidden_size: 'big' is not an integer", 'return {"hidden_size": "big"}'),
    "arch returns none": arch("returned None, not a mapping", "pass"),
    "arch with arguments": arch("is called as `tiny()`, and takes (options, context)", "return {}", "options, context"),
    "arch raises": arch("division by zero", "return 1 / 0"),
    "schedule a number": Failure(
        "returned 0.5, and not a Callable",
        '@register_lr_scheduler("tiny")\ndef build(o, c):\n    """S."""\n    return 0.5\n',
        "lr_scheduler",
    ),
    "optimizer without decorator": Failure(
        "it registers no optimizer", 'def build(o, c):\n    """S."""\n', "optimizer"
    ),
    # -- hooks
    "hook misspelt": plugin(
        "is no hook of panda's. Did you mean 'panda_step_end'", "@hookimpl\n    def panda_step_ned(self, run): ..."
    ),
    "hook unmarked": plugin("is not marked with @hookimpl", "def panda_step_end(self, run): ..."),
    "hook async": plugin(
        "is async, and nothing would await it", "@hookimpl\n    async def panda_step_end(self, run): ..."
    ),
    "hook of no argument": plugin("{'loss'} are declared", "@hookimpl\n    def panda_step_end(self, loss): ..."),
    "hook that yields": plugin("has a `yield`", "@hookimpl\n    def panda_step_end(self, run): yield"),
    "plugin without arguments": plugin(
        "is called as `Tiny(options, context)`", "@hookimpl\n    def panda_step_end(self, run): ...", "pass"
    ),
    "plugin without hooks": plugin("it implements no hook, so it does nothing", "pass"),
    "plugin an empty module": Failure("it registers no plugin", '"""Doc."""\n', "plugin"),
    # -- readers and tasks
    "reader without endings": reader("which has `suffixes`", "def read(self, file): yield from ()", "pass"),
    "reader without read": reader("which has `read`"),
    "reader raises": reader("odd", "def read(self, file):\n        raise ValueError('odd')\n        yield"),
    "reader yields dicts": reader("yielded a dict for a row of", "def read(self, file): yield {'input': 'a'}"),
    "reader returns none": reader("returned None for", "def read(self, file): return None"),
    "task that is none": task("and not a Task", "def dataset(self): ...", base="object"),
    "task without a method": task("abstract", ""),
    "task without samples": task("`dataset` returned None, and not samples", "def dataset(self): return None"),
    "task of a list": task("`dataset` returned [1, 2], and not samples", "def dataset(self): return [1, 2]"),
    "task whose unit is taken": task("its unit is called 'loss'", "def dataset(self): return None", unit="loss"),
}
