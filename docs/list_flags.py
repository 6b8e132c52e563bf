"""Lists every flag of every command in docs/reference/flags.md, from the dataclasses themselves: `make reference`."""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from unittest.mock import patch

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from heartseg.config.experiment import Experiment  # noqa: E402
from heartseg.config.recipes import RECIPES  # noqa: E402
from heartseg.datasets.phantom import write_phantom  # noqa: E402
from jobs.support import command_line  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "flags.md"
# A command as it is typed, and the words that choose its flags; the order of the page.
COMMANDS = {
    "download": [], "preprocess": [], "inspect_shards": [], "train": [], "tune": [], "evaluate": [], "predict": [],
    "measure": [], "compare": [], "export": [], "pipeline": [], "pipeline status": ["status"], "doctor": [],
    **{f"benchmark {table}": [table] for table in ("data", "train", "scores", "predict", "postprocess")},
}  # fmt: skip
TYPES = {int: "integer", float: "number", str: "text"}
INTRODUCTION = """# Flags

Every flag of every command, with its default. `make reference` generates it from the dataclasses that also define `--help`.

- The flag of a setting in a section starts with the section's name: `--optim.lr 0.0005`. `optim.lr=0.0005` means the same.
- A flag listed as "on or off" takes no value: `--fresh`, and `--no-fresh` for the opposite. A flag that lists `on` and `off`
  among its values takes one: `--page off`.
- `preprocess`, `train`, `tune` and `pipeline` also accept the settings of [the experiment](#the-experiment) and, anywhere on
  the command line, a recipe: `seed` (the default), `camus`, `compact` or `quick`. `--config FILE`, a complete experiment as
  JSON, replaces the recipe.
- A command rejects a flag that would have no effect in it, and gives the reason.
"""


@dataclass(frozen=True)
class Flag:
    """One flag: its group (the dotted prefix, empty at the top), its values in words, its default as a value, and its help."""

    group: str
    name: str
    values: str
    default: object
    help: str


class Captured(Exception):
    """Raised to stop a job once its command line is known."""


def command(name: str, words: list[str]) -> dict:
    """The arguments that a job passes to the command-line parser: `kind`, `prog`, `description`, `default`."""
    found: dict = {}

    def capture(kind: Callable, argv: list[str], prog: str, description: str = "", default: object = None) -> None:
        found.update(kind=kind, prog=prog, description=description, default=default)
        raise Captured

    with patch.object(command_line, "parse_line", capture), contextlib.suppress(Captured):
        importlib.import_module(f"jobs.{name.split()[0]}").job(words)
    return found


def field_texts(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass and of those that it inherits from."""
    texts: dict[str, str] = {}
    for parent in reversed([each for each in kind.__mro__ if dataclasses.is_dataclass(each)]):
        with contextlib.suppress(OSError):  # made by make_dataclass, and has no source
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
            for field, text in zip(body.body, body.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    texts[field.target.id] = " ".join(text.value.value.split())
    return texts


def values_of(hint: object) -> str:
    """The values that a type allows, in words."""
    inner, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" if value else "nothing" for value in inner)
    if origin is tuple:
        return f"list: {values_of(inner[0])}" if inner[-1] is Ellipsis else " ".join(map(values_of, inner))
    if NoneType in inner:
        return values_of(next(each for each in inner if each is not NoneType))
    return "on or off" if hint is bool else TYPES[hint]


def flags_of(kind: type, values: object, prefix: str = "") -> Iterator[Flag]:
    """The flags of a dataclass, those of the dataclasses in it included; `values` is an instance, or None for its defaults."""
    texts, hints = field_texts(kind), typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, *marks = typing.get_args(hints[field.name]) if hasattr(hints[field.name], "__metadata__") else [hints[field.name]]
        default = getattr(values, field.name) if values is not None else field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(hint):
            yield from flags_of(hint, default, prefix if command_line.FLAT in marks else f"{prefix}{field.name}.")
            continue
        renamed = next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)
        name = f"--{prefix}{renamed}".replace("_", "-")
        if tyro.conf.Positional in marks:
            name = next(mark.metavar for mark in marks if getattr(mark, "metavar", None))
        yield Flag(prefix.rstrip("."), name, values_of(hint), default, texts.get(field.name, ""))


def function_flags(function: Callable) -> list[Flag]:
    """The flags of a function: its parameters, with the texts of its docstring."""
    texts = dict(re.findall(r"^ {8}(\w+): (.+)$", function.__doc__, re.MULTILINE))
    parameters, hints = inspect.signature(function).parameters.values(), typing.get_type_hints(function)
    return [
        Flag(
            "",
            each.name.upper() if each.default is each.empty else f"--{each.name}".replace("_", "-"),
            values_of(hints[each.name]),
            None if each.default is each.empty else each.default,
            texts[each.name],
        )
        for each in parameters
    ]


def shown(value: object) -> str:
    """A default as it is typed; empty if there is none."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return " ".join(map(shown, value))
    return "" if value in ("", None) else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def table(flags: list[Flag], defaults: list[str]) -> list[str]:
    """A Markdown table of flags."""
    rows = ["| flag | values | default | |", "|---|---|---|---|"]
    for flag, default in zip(flags, defaults, strict=True):
        cells = [f"`{flag.name}`", flag.values, default, flag.help]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return [*rows, ""]


def recipe_default(values: list[object]) -> str:
    """One default for all recipes, or the first one's and what differs from it."""
    texts = [shown(value) or "none" for value in values]
    if len(set(texts)) == 1:
        return shown(values[0])
    others = {text: [name for name, each in zip(RECIPES, texts, strict=True) if each == text] for text in texts}
    return ", ".join(f"{text} ({', '.join(names)})" for text, names in others.items())


def experiment_section() -> list[str]:
    """The tables of the experiment's settings, a group each."""
    lines = ["## The experiment", "", "What makes a run: a recipe and its changes. Some defaults differ by recipe.", ""]
    by_recipe = [list(flags_of(Experiment, recipe())) for recipe in RECIPES.values()]
    hints = typing.get_type_hints(Experiment)
    for group in dict.fromkeys(flag.group for flag in by_recipe[0]):
        rows = [flags for flags in zip(*by_recipe, strict=True) if flags[0].group == group]
        about = hints[group].__doc__.splitlines()[0] if group else "Where it reads and writes, and on how many processes."
        lines += [f"### {group or 'Paths and workers'}", "", about, ""]
        lines += table([flags[0] for flags in rows], [recipe_default([flag.default for flag in flags]) for flags in rows])
    return lines


def command_section(name: str, found: dict) -> list[str]:
    """A heading, the command and the table of its own flags."""
    kind, default = found["kind"], found["default"]
    takes_experiment = "experiment" in {field.name for field in dataclasses.fields(kind)}
    options = default.options if takes_experiment else default
    flags, about = list(flags_of(type(options) if takes_experiment else kind, options)), found["description"]
    synopsis = " ".join(filter(None, [found["prog"], "[RECIPE]" * takes_experiment, "[FLAGS]"]))
    lines = [f"## {name}", "", f"    {synopsis}", "", f"{about[0].upper()}{about[1:]}", ""]
    if takes_experiment:
        lines += ["It also takes the flags of [the experiment](#the-experiment).", ""]
        reasons: dict[str, list[str]] = {}
        for field, reason in default.options.unused.items():
            is_group = dataclasses.is_dataclass(getattr(default.experiment, field, None))
            reasons.setdefault(reason, []).append(f"`--{field.replace('_', '-')}{'.…' if is_group else ''}`")
        lines += [f"No effect: {', '.join(sorted(fields))} ({reason})." for reason, fields in reasons.items()]
        lines += [""] if reasons else []
    return lines + table(flags, [shown(flag.default) for flag in flags])


def render() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for name, words in COMMANDS.items():
        lines += command_section(name, command(name, words))
    about = "A synthetic CAMUS tree with known outlines, volumes and ejection fraction; the demo and the tests use it."
    lines += ["## phantom", "", "    python -m heartseg.datasets.phantom SOURCE [FLAGS]", "", about, ""]
    flags = function_flags(write_phantom)
    lines += table(flags, [shown(flag.default) for flag in flags])
    return "\n".join([*lines, *experiment_section()]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
