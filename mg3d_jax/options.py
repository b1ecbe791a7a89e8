"""How options are declared: frozen dataclasses whose fields carry what they mean and how an older run behaved.

The parts of the configuration, every objective, task and tower declare theirs in this form. From it come the defaults of
config files, the checks of types, the table of all keys in the documentation, and the values that a run of an older
version gets for keys that it did not have.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mg3d_jax.errors import UserError

T = TypeVar("T")
_UNSTATED = object()


def key(default: Any, meaning: str, *, neutral: Any = _UNSTATED, resume_free: bool = False, factory: Any = None) -> Any:
    """One option of a frozen dataclass.

    Args:
        default: what a new configuration has; its type is the option's.
        meaning: one line for the table of all keys: unit, range, what 0 or "" stands for.
        neutral: to be given for every key that is added to a published version: the value with which the code does what
            it did before the key existed. A run that lacks the key gets it, and with it the key does not count in
            `config_hash`, so that hashes of older runs stay.
        resume_free: may differ between a run and its resume: changes neither model nor batches nor optimisation.
        factory: makes the default, for groups of options.
    """
    metadata = {"meaning": meaning, "resume_free": resume_free, "newer": neutral is not _UNSTATED}
    metadata["neutral"] = default if neutral is _UNSTATED else neutral
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Group(Mapping[str, Any]):
    """Options by name, immutable and hashable: `config.objectives["alignment"].weight`."""

    def __init__(self, items: Mapping[str, Any]):
        self._items = dict(items)

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return f"Group({self._items!r})"


@functools.cache
def types_of(kind: type) -> dict[str, Any]:
    """Annotated type of every field of a dataclass."""
    return typing.get_type_hints(kind)


def to_dict(options: Any) -> dict[str, Any]:
    """A tree of dataclasses and groups as nested dicts; values as they are."""
    if isinstance(options, Group):
        return {name: to_dict(value) for name, value in options.items()}
    if custom := getattr(options, "to_dict", None):
        return custom()
    found = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: to_dict(value) if _nested(value) else value for name, value in found.items()}


def _nested(value: Any) -> bool:
    return isinstance(value, Group) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data.batch_size": 64, ...}` of nested mappings, sorted by key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return dict(sorted(flat.items()))


Custom = Mapping[str, Callable[[Any, str, list[str]], Any]]


def build(
    kind: type[T], values: Mapping[str, Any], prefix: str, problems: list[str], custom: Custom | None = None
) -> T:
    """The dataclass from a mapping with all of its keys: lists become tuples, whole numbers floats where those are meant.

    What is unknown, missing or of another type is appended to `problems`, with its full key; the default then stands.

    Args:
        prefix: of the keys, e.g. "data.".
        custom: `(value, full key, problems) -> field` for fields that are built in another way, by full key.
    """
    types = {field.name: types_of(kind)[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    problems += unknown(values, types, prefix)
    given: dict[str, Any] = {}
    for name, wanted in types.items():
        full = f"{prefix}{name}"
        if name not in values:
            problems.append(f"{full} is missing")
        elif custom and full in custom:
            given[name] = custom[full](values[name], full, problems)
        elif dataclasses.is_dataclass(wanted):
            given[name] = build(typing.cast(type, wanted), values[name], f"{full}.", problems, custom)
        else:
            given |= _converted(name, values[name], wanted, full, problems)
    return kind(**given)


def _converted(name: str, value: Any, wanted: Any, full: str, problems: list[str]) -> dict[str, Any]:
    try:
        return {name: convert(value, wanted)}
    except TypeError as error:
        problems.append(problem(full, value, str(error)))
        return {}


def unknown(values: Iterable[str], known: Mapping[str, Any], prefix: str) -> list[str]:
    """One problem for each key that is not among the known ones, with the nearest that is."""
    found = []
    for name in sorted(set(values) - set(known)):
        close = difflib.get_close_matches(name, known, 1, 0.4)
        found.append(f"there is no key {prefix}{name}" + (f": did you mean {prefix}{close[0]}?" if close else ""))
    return found


def convert(value: Any, wanted: Any) -> Any:
    """`value` as the annotated type `wanted` (bool, int, float, str, or tuples of them). `TypeError` says what is needed."""
    if typing.get_origin(wanted) is tuple:
        inner = typing.get_args(wanted)
        if not isinstance(value, (list, tuple)):
            raise TypeError("a tuple is needed")
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(convert(item, inner[0]) for item in value)
        # Too many or too few are for the checks of the configuration, which can say what is meant.
        return tuple(convert(item, inner[min(place, len(inner) - 1)]) for place, item in enumerate(value))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is Any or (isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))):
        return value
    raise TypeError(f"a {wanted.__name__} is needed, not a {type(value).__name__}")


def split_overrides(argv: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """The words of a command line that override keys below `prefix` ("--config."), and what is left of it. An override may
    be two words: `--config.seed 3`."""
    overrides: list[str] = []
    own: list[str] = []
    for i, word in enumerate(argv):
        value = i and argv[i - 1].startswith(prefix) and "=" not in argv[i - 1] and not word.startswith("--")
        (overrides if word.startswith(prefix) or value else own).append(word)
    return overrides, own


def override_values(words: Sequence[str], prefix: str) -> dict[str, str]:
    """`["--evaluations.a.b=1", "--evaluations.c.d", "2"] -> {"a.b": "1", "c.d": "2"}`. `UserError` for a key without a
    value."""
    found: dict[str, str] = {}
    waiting = ""
    for word in words:
        if waiting:
            found[waiting], waiting = word, ""
        elif "=" in word:
            full, _, value = word.removeprefix(prefix).partition("=")
            found[full] = value
        else:
            waiting = word.removeprefix(prefix)
    if waiting:
        raise UserError(f"{prefix}{waiting} has no value: write {prefix}{waiting}=VALUE")
    return found


def overridden(groups: Mapping[str, Any], values: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """The dataclasses `groups[NAME]` in which the text `values["NAME.KEY"]` replaces a field; the others are not in the
    result. `UserError` for a name, key or value that cannot be.

    Args:
        prefix: of the keys, for messages, e.g. "--evaluations.".
    """
    found: dict[str, Any] = {}
    problems: list[str] = []
    for full, text in values.items():
        name, _, field = full.partition(".")
        if name not in groups:
            problems += unknown([name], groups, prefix)
            continue
        options = found.get(name, groups[name])
        known = types_of(typing.cast(Any, type(options)))
        if field not in known:
            problems += unknown([field], known, f"{prefix}{name}.")
            continue
        try:
            found[name] = dataclasses.replace(options, **{field: from_text(text, known[field])})
        except (TypeError, ValueError) as error:
            problems.append(problem(f"{prefix}{full}", text, str(error)))
    if problems:
        raise UserError("; ".join(problems))
    return found


def from_text(text: str, wanted: Any) -> Any:
    """The value of a command line as the annotated type: `true`, `0.5`, `a,b` for a tuple. `TypeError` or `ValueError` where
    it is none."""
    if typing.get_origin(wanted) is tuple:
        inner = typing.get_args(wanted)[0]
        parts = [part.strip(" \"'") for part in text.strip("()[] ").split(",")]
        return tuple(from_text(part, inner) for part in parts if part)
    if wanted is bool:
        if text.lower() not in ("true", "false"):
            raise TypeError("true or false is needed")
        return text.lower() == "true"
    return wanted(text)


def tuples(value: Any) -> Any:
    """A value of a JSON file as options have it: lists become tuples."""
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def neutral(kind: type) -> dict[str, Any]:
    """What a run that is older than these options did: their neutral values, as a nested dict."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        wanted = types_of(kind)[field.name]
        if dataclasses.is_dataclass(wanted):
            found[field.name] = neutral(typing.cast(type, wanted))
        elif field.metadata and wanted is not Group:
            found[field.name] = field.metadata["neutral"]
    return found


def walk(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """`(full key, type, field)` of every plain option below a dataclass, in the order of declaration."""
    for field in dataclasses.fields(kind):
        wanted = types_of(kind)[field.name]
        if dataclasses.is_dataclass(wanted):
            yield from walk(typing.cast(type, wanted), f"{prefix}{field.name}.")
        elif field.metadata and wanted is not Group:
            yield f"{prefix}{field.name}", wanted, field


def problem(key: str, value: Any, remedy: str) -> str:
    """One line of the list that a wrong configuration gets."""
    return f"{key} = {value!r}: {remedy}"


def choice(key: str, value: Any, choices: Any) -> list[str]:
    """A problem where `value` is none of `choices`."""
    return [] if value in choices else [problem(key, value, f"choose one of {', '.join(map(str, choices))}")]


def checked_options(kind: Any) -> type:
    """The options of a declared thing: `UserError` where a plug-in gave something else than a frozen dataclass."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise UserError(f"options {kind!r}: declare them as a frozen dataclass whose fields are `options.key(...)`")
    return kind
