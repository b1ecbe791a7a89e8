"""Which findings a report says are there: rules over its statements, for labels by their names.

For each label there are patterns of words that name it (`labels_en.toml` for those of CT-RATE; any other label is named by
its own words). Sentences are cut where another statement begins, and the statement around a mention says whether the finding
is there (`statements`): where its rules find none, a word of negation does.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.language.statements import Statements, statements


@dataclass(frozen=True)
class _Words:
    mentions: re.Pattern[str]
    other: re.Pattern[str] | None


class RuleLabeller:
    """`sentences of a report -> {label: True, False or None}`: stated as present, as absent, or not spoken of.

    Args:
        label_names: labels to look for.
        source: a language of the package ("en"), or path of a TOML file of the form of `labels_en.toml`.

    Raises:
        UserError: there is no such file, or a pattern is no regular expression.
    """

    def __init__(self, label_names: Sequence[str], source: str = "en"):
        path = Path(source) if source.endswith(".toml") else Path(__file__).parent / f"labels_{source}.toml"
        rules = _read(path)
        self._statements: Statements = statements("en" if source.endswith(".toml") else source)
        self._negation, self._breaks = (_compiled(path, [rules[name]]) for name in ("negation", "breaks"))
        self._words = {name: _words_of(path, name, rules.get(name)) for name in label_names}
        self._known: dict[str, tuple[tuple[str, bool], ...]] = {}

    def __call__(self, sentences: Sequence[str]) -> dict[str, bool | None]:
        """A finding that is stated as present anywhere is there, whatever else is said."""
        found: dict[str, bool | None] = dict.fromkeys(self._words)
        for sentence in sentences:
            for name, present in self._of_sentence(sentence):
                found[name] = bool(found[name]) or present
        return found

    def _of_sentence(self, sentence: str) -> tuple[tuple[str, bool], ...]:
        if sentence not in self._known:  # many return in report after report
            self._known[sentence] = tuple(
                (name, self._says_present(text))
                for segment in self._segments(sentence)
                for name, words in self._words.items()
                if words.mentions.search(text := words.other.sub(" ", segment) if words.other else segment)
            )
        return self._known[sentence]

    def _segments(self, sentence: str) -> list[str]:
        """Cut where another statement begins: at ";" and ":", before "but" and the like, and after a verb of finding."""
        marked = self._breaks.sub(";", _AFTER_A_VERB.sub(r"\1;", _DOUBT.sub("", sentence)))
        return [segment.strip() for segment in re.split(r"[;:]", marked) if segment.strip()]

    def _says_present(self, segment: str) -> bool:
        statement = self._statements.parse(segment)
        if statement is not None and statement.present is not None:
            return statement.present
        return not self._negation.search(segment)


_DOUBT = re.compile(r"\([^()]*\?\)")  # "(sequela?)"
_AFTER_A_VERB = re.compile(
    r"\b(observed|detected|seen|present|noted|found|identified|visible|selected|watched|encountered)\s*(?:,|\band\b)",
    re.IGNORECASE,
)


def _words_of(path: Path, name: str, rules: dict[str, Any] | None) -> _Words:
    if rules is None:  # "Lung nodule": these words, the last one in singular or plural
        plain = r"\s+".join(re.escape(word) for word in name.split())
        return _Words(_compiled(path, [rf"\b{plain}(s|es)?\b"]), None)
    other = rules.get("other")
    return _Words(_compiled(path, rules["mentions"]), _compiled(path, other) if other else None)


def _compiled(path: Path, patterns: Sequence[str]) -> re.Pattern[str]:
    try:
        return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE)
    except re.error as error:
        raise UserError(f"{path}: {list(patterns)} are no regular expressions ({error})") from error


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    try:
        rules = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"there are no words of labels at {path} ({error}): give a language, or a .toml file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no TOML ({error})") from error
    if missing := [name for name in ("negation", "breaks") if not isinstance(rules.get(name), str)]:
        raise UserError(f"{path}: lacks {', '.join(missing)}; `mg3d_jax/language/labels_en.toml` shows the form")
    return rules
