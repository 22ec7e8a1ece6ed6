"""Command line and YAML/JSON file -> one typed dataclass; every mistake is found before anything heavy is imported.

    config = parse(Config, __doc__)        # recipe.py --config run.yaml --lr 1e-4 --freeze vision

Values come from the dataclass's defaults, then the file, then the flags; `config.sources` says which of the latter two
set a field. An unknown key or flag is an error that suggests the nearest; all problems are shown together.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

from hfcustom.exits import EXIT_CONFIG, ConfigError
from hfcustom.naming import unknown
from hfcustom.train_config import TrainConfig


class Options(Protocol):
    """A dataclass of options, such as TrainConfig: each annotation is a flag's help."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    sources: dict[str, str]  # field -> the flag or file that set it

    def problems(self) -> list[str]:
        """Return what is of a wrong type or out of range, in words; empty when the options are usable."""


Config = TypeVar("Config", bound=Options)


def parse(config_class: type[Config], description: str | None, argv: Sequence[str] | None = None) -> Config:
    """Return the config of this command line; on a mistake print every problem and exit with code 3."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return read(config_class, description, argv)
    except ConfigError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(EXIT_CONFIG) from error


def read(config_class: type[Config], description: str | None, argv: Sequence[str]) -> Config:
    """As `parse`, but raise ConfigError."""
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    hints = typing.get_type_hints(config_class, include_extras=True)
    parser = _parser(fields, hints, description)
    flags, extra = parser.parse_known_args(argv)
    problems = [_unknown_flag(word, parser) for word in extra if word.startswith("-")]
    problems += [f"{word!r} belongs to no flag." for word in extra if not word.startswith("-")][: 0 if problems else 1]
    given = vars(flags)
    file = given.pop("config", None)
    values, sources = {}, {}
    if file is not None:
        for key, value in read_file(Path(file)).items():
            if key not in fields:
                problems.append(f"{file}: {unknown('key', key, fields)}")
            else:
                values[key], sources[key] = value, str(file)
    for key, value in given.items():
        values[key], sources[key] = value, "--" + key.replace("_", "-")
    config = config_class(**_typed(values, sources, hints, problems))
    config.sources = sources
    problems += config.problems()
    if problems:
        raise ConfigError(
            "; ".join(problems) if len(problems) == 1 else "\n  ".join(["these options are wrong:", *problems])
        )
    return config


def with_values(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """Return a config like this one with other values for some fields, and say that they are from `source`.

    ConfigError names every unknown key and wrong type; what the values mean together is left to problems().
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    known = [field.name for field in dataclasses.fields(config) if field.init]
    problems = [f"{source}: {unknown('key', key, known)}" for key in values if key not in known]
    named = {key: value for key, value in values.items() if key in known}
    typed = _typed(named, dict.fromkeys(named, source), hints, problems)
    if problems:
        raise ConfigError("; ".join(problems))
    changed = copy.copy(config)
    for key, value in typed.items():
        setattr(changed, key, value)
    changed.sources = {**config.sources, **dict.fromkeys(typed, source)}
    return changed


def _parser(fields: dict[str, dataclasses.Field[Any]], hints: dict[str, Any], description: str | None) -> _Parser:
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of the options below")
    for name, spec in fields.items():
        kind, text = hints[name], ""
        if typing.get_origin(kind) is typing.Annotated:
            kind, text = typing.get_args(kind)[:2]
        default = spec.default_factory() if callable(spec.default_factory) else spec.default
        shown = "" if default in (None, [], "", dataclasses.MISSING) else f" (default: {default})"
        options: dict[str, Any] = {"help": (text + shown).replace("%", "%%")}
        if kind in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            options |= {"nargs": "+", "metavar": "VALUE"}
        elif choices := _choices(kind):
            options["metavar"] = "|".join(choices)
        else:
            options["metavar"] = "VALUE"
        parser.add_argument("--" + name.replace("_", "-"), **options)
    return parser


def _choices(kind: Any) -> list[str]:
    """Return the values of a Literal, also inside `Literal[...] | None`."""
    if typing.get_origin(kind) is typing.Literal:
        return [str(value) for value in typing.get_args(kind)]
    return [choice for part in typing.get_args(kind) for choice in _choices(part)]


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _unknown_flag(word: str, parser: argparse.ArgumentParser) -> str:
    flag = word.partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"Unknown flag {flag}.{hint} See --help."


def _typed(
    values: dict[str, Any], sources: dict[str, str], hints: dict[str, Any], problems: list[str]
) -> dict[str, Any]:
    """Convert each value to its field's type with pydantic, noting every failure."""
    from pydantic import TypeAdapter, ValidationError

    typed = {}
    for key, value in values.items():
        kind = hints[key]
        try:
            if isinstance(value, str) and _allows(kind, dict):
                value = json_if_it_looks_so(value)
            elif isinstance(value, list) and _allows_inside(kind, dict):
                value = [json_if_it_looks_so(item) if isinstance(item, str) else item for item in value]
            if isinstance(value, bool) and not _allows(kind, bool):  # pydantic would read true as 1
                raise ConfigError("input should not be true or false")
            typed[key] = TypeAdapter(kind).validate_python(value)
        except ConfigError as error:
            problems.append(f"{sources[key]}: {key}={value!r}: {error}.")
        except ValidationError as error:
            reasons = ", or ".join(dict.fromkeys(item["msg"][:1].lower() + item["msg"][1:] for item in error.errors()))
            problems.append(f"{sources[key]}: {key}={value!r}: {reasons}.")
    return typed


def wrong_types(config: TrainConfig) -> list[str]:
    """Return what is wrong with the types of a config's fields, which Python does not check, in words."""
    names = [field.name for field in dataclasses.fields(config) if field.init]
    problems: list[str] = []
    hints = typing.get_type_hints(type(config), include_extras=True)
    values, owner = {name: getattr(config, name) for name in names}, type(config).__name__
    typed = _typed(values, dict.fromkeys(names, owner), hints, problems)
    for name, value in typed.items():  # what a flag spells is converted when it is read, what Python passes is not
        if isinstance(values[name], str) and not isinstance(value, str):
            problems.append(f"{owner}: {name}={values[name]!r} is text; pass {value!r}, without quotation marks.")
    return problems


def _allows(kind: Any, wanted: type) -> bool:
    """Whether an annotation is, or has among its alternatives, a type."""
    if typing.get_origin(kind) in (typing.Annotated, typing.Union, types.UnionType):
        return any(_allows(part, wanted) for part in typing.get_args(kind))
    return wanted in (kind, typing.get_origin(kind))


def _allows_inside(kind: Any, wanted: type) -> bool:
    """Whether an annotation is a list of a type."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return typing.get_origin(kind) is list and any(_allows(item, wanted) for item in typing.get_args(kind))


def json_if_it_looks_so(value: str) -> Any:
    """Return the mapping that a word of the command line spells in JSON, any other word as it is; ConfigError for bad JSON."""
    if not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"no JSON mapping: {error}") from error


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML (1.2, safe) or JSON mapping; ConfigError for anything else, a duplicate key included."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 at byte {error.start}; save the file as UTF-8.") from error
    if path.suffix == ".json":
        try:
            content = json.loads(text, object_pairs_hook=_no_duplicates)
        except ValueError as error:  # no JSON, or a key given twice
            raise ConfigError(f"{path}: {error}") from error
    elif path.suffix in (".yaml", ".yml"):
        content = _read_yaml(path, text)
    else:
        raise ConfigError(f"--config {path}: the file must end in .yaml, .yml or .json.")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the top level is {type(content).__name__}, not a mapping of options.")
    return content


def _read_yaml(path: Path, text: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{where}: {str(problem).splitlines()[0]}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"key {key!r} is given twice")
    return dict(pairs)
