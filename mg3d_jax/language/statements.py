"""Sentences of a report -> statements that something is present or absent -> the same in other words, or the opposite.

Reports state absence in most sentences, and in many wordings ("X was not observed", "No X was detected"); presence often
without a verb ("Hiatal hernia"). The rules look for those, and leave a sentence alone that they do not understand: advice,
comparisons with an earlier examination, doubt, several statements in one. The words are in one file per language
(`en.toml` beside this file); another language, or other words, is a file of the same form.
"""

from __future__ import annotations

import functools
import random
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError

LONGEST_SUBJECT = 16  # words; what is longer is rarely one statement
LONGEST_PLACE = 10  # words after the verb that are kept: mostly where it is
LONGEST_STATE = 14  # words of a sentence that says how something is
_KEYS = (
    "be", "seen", "lead_ins", "skip", "absent", "present", "not_a_subject", "articles", "states", "wordings",
)  # fmt: skip


@dataclass(frozen=True)
class Statement:
    """What a sentence says, and how to say it and its opposite.

    Attributes:
        present: does it say that a finding is there? None for a sentence that says how something is ("Heart size is
            normal.").
        said: wordings of the same; the sentence itself where there are no others.
        opposite: wordings of the contrary.
    """

    present: bool | None
    said: tuple[str, ...]
    opposite: tuple[str, ...]


class Statements:
    """The rules of one language.

    Args:
        source: name of a language that comes with the package ("en"), or path of a TOML file.

    Raises:
        UserError: there is no such language or file, or it lacks something.
    """

    def __init__(self, source: str = "en"):
        path = Path(source) if source.endswith(".toml") else Path(__file__).parent / f"{source}.toml"
        rules = _read(path, source)
        words = {"be": rules["be"], "seen": rules["seen"]}

        def compiled(pattern: str, end: str = "") -> re.Pattern[str]:
            for name, value in words.items():
                pattern = pattern.replace(f"{{{name}}}", value)
            try:
                return re.compile(f"(?:{pattern}){end}" if end else pattern, re.IGNORECASE)
            except re.error as error:
                raise UserError(f"{path}: {pattern!r} is no regular expression ({error})") from error

        self._lead_ins = [compiled(pattern, r"\s*") for pattern in rules["lead_ins"]]
        self._skip = [compiled(pattern) for pattern in rules["skip"]]
        self._absent = [compiled(pattern, "$") for pattern in rules["absent"]]
        self._present = [compiled(pattern, "$") for pattern in rules["present"]]
        self._no_subject = compiled(rules["not_a_subject"])
        self._articles = compiled(rules["articles"], r"\s+")
        self._states = [(compiled(state["from"]), state["to"]) for state in rules["states"]]
        self._wordings = {
            present: tuple(rules["wordings"][key]) for key, present in (("present", True), ("absent", False))
        }

    def parse(self, sentence: str) -> Statement | None:
        """The statement of a sentence; None where the rules find none."""
        text = sentence.strip()
        for lead_in in self._lead_ins:
            if found := lead_in.match(text):
                text = text[found.end() :]
        text = re.sub(r"\s*\([^)]*\)", "", text).rstrip(" .;,:")
        if not text or any(pattern.search(text) for pattern in self._skip):
            return None
        for present, patterns in ((False, self._absent), (True, self._present)):
            for pattern in patterns:
                if subject := self._subject(pattern.match(text), present):
                    return self._statement(subject, present)
        return self._state(text)

    def wordings(self, subject: str, *, present: bool) -> tuple[str, ...]:
        """All ways to say that `subject` is there, or that it is not."""
        return tuple(_worded(wording, subject) for wording in self._wordings[present])

    def _subject(self, found: re.Match[str] | None, present: bool) -> str:
        """What is there or not, and where; "" where this is no plain statement."""
        if found is None:
            return ""
        subject, rest = found["subject"].strip(" ,;"), found["rest"].strip(" ,;")
        # A comma before a further clause: what comes after it is another statement, or belongs to this one loosely.
        rest = rest.split(",")[0].strip()
        if self._no_subject.search(subject) or not 0 < len(subject.split()) <= LONGEST_SUBJECT:
            return ""
        if rest and (len(rest.split()) > LONGEST_PLACE or self._no_subject.search(rest)):
            if not present:  # "no mass was seen in ..." does not say that there is none elsewhere
                return ""
            rest = ""
        return f"{subject} {rest}".strip()

    def _statement(self, subject: str, present: bool) -> Statement:
        bare = self._articles.sub("", subject, count=1) if self._articles.match(subject) else subject
        wordings = {True: self.wordings(subject, present=True), False: self.wordings(bare, present=False)}
        return Statement(present, wordings[present], wordings[not present])

    def _state(self, text: str) -> Statement | None:
        if len(text.split()) > LONGEST_STATE:
            return None
        for pattern, replacement in self._states:
            turned, count = pattern.subn(replacement, text)
            if count:
                return Statement(None, (_sentence(text),), (_sentence(turned),))
        return None


@functools.cache
def statements(source: str = "en") -> Statements:
    """The rules of a language, read once."""
    return Statements(source)


def chosen(wordings: Sequence[str], seed: str) -> str:
    """One of the wordings, always the same for the same `seed`."""
    return random.Random(seed).choice(wordings)


def _worded(wording: str, subject: str) -> str:
    """The wording with its subject, in sentence case; an abbreviation stays as it is ("CT", "LAP")."""
    head = subject.split(maxsplit=1)[0]
    if not any(letter.isupper() for letter in head[1:]):
        subject = subject[:1].lower() + subject[1:]
    return _sentence(wording.format(subject))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _read(path: Path, source: str) -> dict[str, Any]:
    try:
        rules = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in Path(__file__).parent.glob("*.toml")))
        raise UserError(
            f"there are no rules for the language {source!r} ({error}): give one of {known}, or a .toml file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no TOML ({error})") from error
    if missing := [key for key in _KEYS if key not in rules]:
        raise UserError(f"{path}: lacks {', '.join(missing)}; `mg3d_jax/language/en.toml` shows the form")
    for side in ("present", "absent"):
        wordings = rules["wordings"].get(side)
        if not wordings or not all(isinstance(one, str) and one.count("{}") == 1 for one in wordings):
            raise UserError(f"{path}: wordings.{side} = {wordings!r}: give a list of texts, each with one {{}}")
    return rules
