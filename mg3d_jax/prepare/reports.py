"""Report -> sections -> clean text -> sentences, and one id per distinct report.

The rules are for radiology reports as they are: machine-translated (CT-RATE from Turkish, CTRG from Chinese), with
stray quotes that once were bullets, decimals, image references such as "img117", ordinals such as "3. rib", and
numbered lists. `tests/test_prepare_reports.py` has the hard cases.
"""

from __future__ import annotations

import hashlib
import re

from mg3d_jax.prepare.cleaning import clean
from mg3d_jax.prepare.sections import split_sections

__all__ = ["clean", "report_id", "report_sentences", "split_sections", "split_sentences"]

# Words after which a full stop does not end a sentence, in lower case, without the stop: never; before a number only;
# before anything but a capital ("ca. 4 mm", but "operated for breast Ca. Significant effusion").
_NEVER_LAST = frozenset(("assist", "dr", "mr", "mrs", "ms", "prof", "st", "vs", "cf", "e.g", "i.e", "iv", "i.v"))
_BEFORE_NUMBER = frozenset(("no", "nr", "nos", "img", "im", "ima", "se", "ser", "fig", "figs", "vol", "max", "min"))
_ABBREVIATIONS = frozenset(
    re.findall(
        r"\w+",
        "ca approx appr dept resp incl excl diam dia ant post sup inf lat med bilat lt rt art v vv aa al seg segm temp",
    )
)

_BULLET = re.compile(r"(?:^|(?<=[\s.;:!?)\"]))[•●▪■◦·*‣➢✓](?=\s*[^\s\d])")
_QUOTE_BULLET = re.compile(r"(?:^|(?<=\s)|(?<=[.?!:;,]))['\"]+(?=\s+\.?\s*[A-Z0-9])|(?<=[a-z)])\"(?=\s+[A-Z])")
_DASH_BULLET = re.compile(r"(?:^|(?<=[.!?:]\s)|(?<=\n))\s*[-–—]+\s*(?=[A-Z])")
_CAPITAL = "A-Z\u00c0-\u00d6\u00d8-\u00de\u011e\u0130\u015e\u0391-\u03a9\u0410-\u042f"
_LIST_NUMBER = re.compile(
    rf"(?:^|(?<=[.!?:;]\s)|(?<=\n))\s*(?:#\d{{1,2}}\s?[:.)]?|\(?\d{{1,2}}\s?(?:[.]?[)]|[.]?-|[.]))\s*(?=[{_CAPITAL}])"
)
_NEWLINE = re.compile(r"\s*\n\s*")
_STOP = re.compile(r"[.!?]+")
_BREAK = "\x00"  # a boundary that layout has already decided: a bullet, a list number, a blank line


def _mark_layout(text: str) -> str:
    """Bullets, list numbers and line breaks become `_BREAK` or a space."""
    text = _LIST_NUMBER.sub(_BREAK, text)
    text = _DASH_BULLET.sub(_BREAK, text)
    text = _BULLET.sub(_BREAK, text)
    text = _QUOTE_BULLET.sub(_BREAK, text)
    lines = _NEWLINE.split(text)
    joined = lines[0]
    for line in lines[1:]:
        # A wrapped line goes on in lower case or after a comma; anything else starts an item of its own.
        wrapped = line[:1].islower() or joined.rstrip().endswith((",", "-", "("))
        joined += (" " if wrapped else _BREAK) + line
    return joined.replace('"', "")


def _parenthesis_depth(text: str) -> list[bool]:
    """For each character, whether it lies inside a balanced parenthesis. A stray "(" opens nothing."""
    inside = [False] * len(text)
    stack: list[int] = []
    for position, character in enumerate(text):
        if character == "(":
            stack.append(position)
        elif character == ")" and stack:
            start = stack.pop()
            inside[start:position] = [True] * (position - start)
    return inside


def _ends_sentence(before: str, stop: str, after: str) -> bool:
    """Whether `stop` (a run of . ! ?) between `before` and `after` ends a sentence."""
    following = after.lstrip(" )'")
    if not following:
        return True
    spaced = after[:1] in (" ", _BREAK)
    if following[0] == _BREAK:
        return True
    if following[0] in ",;:.":  # "etc., and": the sentence goes on
        return False
    if len(stop) > 1 and set(stop) == {"."}:  # "....": a gap in the text
        return following[0].isupper()
    if stop != ".":  # "Cyst? There are", but "infective? atelectasis"
        return following[0].isupper() or following[0].isdigit()
    word_match = re.search(r"[^\s(\[,;:/]+$", before)
    word = word_match[0].lower() if word_match else ""
    if word in _NEVER_LAST or word.rsplit(".", 1)[-1] in _NEVER_LAST:
        return False
    if word in ("a.m", "p.m"):  # a time of day
        return following[0].isupper()
    if word in _BEFORE_NUMBER:
        return spaced and not following[0].isdigit()
    if word in _ABBREVIATIONS:
        return following[0].isupper()
    if word[-1:].isdigit():
        if following[0].isdigit():  # "0.8", "12.03.2020", "0. 8 cm"; but "image 129. 2 nodules"
            digits = re.search(r"\d+$", word)
            return spaced and digits is not None and len(digits[0]) > 2
        if following[0].islower():  # "3. rib", "5. and 6. ribs": an ordinal; "image 129. there are": an end
            return spaced and (len(word) > 2 or not word.isdigit()) and not re.fullmatch(r"[a-z]{1,2}\d{1,2}", word)
        return True
    if not spaced:  # "normal.No lesion" is an end, "u.s" and "www.x" are not
        return following[0].isupper() and len(word) > 2
    # "S. aureus", "L. lung": an initial.
    return not (len(word) == 1 and word.isalpha() and before[-1].isupper() and following[0].islower())


def split_sentences(text: str) -> tuple[str, ...]:
    """Sentences of one section, in order, each with its own full stop, without bullets, list numbers and stray quotes.

    >>> split_sentences('A nodule of 0.8 x 1.0 cm (img117). " Hiatal hernia " Emphysema')
    ('A nodule of 0.8 x 1.0 cm (img117).', 'Hiatal hernia', 'Emphysema')
    """
    text = _mark_layout(clean(text))
    inside = _parenthesis_depth(text)
    pieces, start = [], 0
    for match in _STOP.finditer(text):
        if inside[match.start()]:
            continue
        if _ends_sentence(text[start : match.start()], match[0], text[match.end() :]):
            rest = text[match.end() :]
            end = match.end() + len(rest) - len(rest.lstrip(")'"))
            pieces.append(text[start:end])
            start = end
    pieces.append(text[start:])
    sentences = []
    for piece in pieces:
        for part in piece.split(_BREAK):
            sentence = re.sub(r"\s+", " ", part).strip(" \t-–—*'").lstrip(".,;:!?) ")
            if re.search(r"[^\W_]", sentence):
                sentences.append(sentence)
    return tuple(sentences)


def report_sentences(findings: str, impression: str) -> tuple[str, ...]:
    """Sentences of the findings, then of the impression. Sentences are never merged over the section border."""
    return split_sentences(findings) + split_sentences(impression)


def report_id(findings: str, impression: str) -> str:
    """Hex digest of the report: equal for reports that differ in nothing but case, spaces, quotes and bullets."""
    words = re.findall(r"[^\W_]+|[.,%+-]", (clean(findings) + "\n" + clean(impression)).lower())
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:32]
