"""Text of a report section as it comes -> unified characters, without what exports left in it."""

from __future__ import annotations

import html
import re
import unicodedata

# A section that only says that there is none.
_EMPTY = re.compile(
    r"[\W_]*(not\s+(given|available|provided|specified|entered|applicable)|none|nan|null|nil|n\.?\s*/?\s*a|unknown"
    r"|no\s+(report|text|impression|conclusion)|(name|ref|value|num|div/0)[?!])?[\W_]*",
    re.IGNORECASE,
)
_CHARACTERS = str.maketrans(
    {
        "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "＂": '"',
        "‘": "'", "’": "'", "‚": "'", "`": "'", "´": "'",
        "\u00a0": " ", "\u200b": "", "\ufeff": "", "\u00ad": "",
        "\u2028": "\n", "\u2029": "\n",
        "．": ".", "｡": ". ", "।": ". ", "॥": ". ", "۔": ". ", "։": ". ", "።": ". ", "។": ". ", "။": ". ",
        "？": "? ", "؟": "? ", "！": "! ", "、": ", ", "،": ", ", "؛": "; ",
        "×": "x", "✕": "x", "＊": "*", "，": ", ", "。": ". ", "；": "; ", "：": ": ", "（": "(", "）": ")",
    }
)  # fmt: skip

_SPREADSHEET = re.compile(r"_x([0-9A-Fa-f]{4})_")  # how spreadsheets write what XML cannot hold: _x000D_
_ESCAPED = re.compile(
    r"(?<![A-Za-z]:)(?:\\r\\n|\\[nr])|\\t(?![a-z])|\\u([0-9A-Fa-f]{4})"
)  # a backslash and an n instead of a line break
_HTML_BREAK = re.compile(
    r"<\s*(?:br|hr)\s*/?>|<\s*/?\s*(?:p|div|li|ul|ol|tr|table|h[1-6])(?:\s[^<>]*)?/?>", re.IGNORECASE
)
_HTML_TAG = re.compile(
    r"<\s*/?\s*(?:a|b|i|u|em|strong|span|font|sup|sub|small|big|td|th|tbody|thead|html|body|head|pre|code|s)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_HTML_ENTITY = re.compile(r"&(?:#\d{1,6}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,9});", re.IGNORECASE)
# What a tokenizer's decoder leaves apart: "0. 9", "ground - glass", "( a cyst )".
_APART = (
    (r"(?<=\d) ?([.,]) ?(?=\d)", r"\1"),
    (r"(?<=\w) ?([-/]) ?(?=\w)", r"\1"),
    (r"\( ", "("),
    (r" \)", ")"),
    (r" ([;:%])", r"\1"),
)


def clean(text: object) -> str:
    """Text of one report section: unified quotes and spaces, "" for `None`, NaN, "Not given." and the like.
    Line breaks are kept (they separate list items); `split_sentences` removes them."""
    if not isinstance(text, str):
        return ""
    text = (
        unicodedata.normalize("NFC", _without_artefacts(text))
        .translate(_CHARACTERS)
        .replace("\r\n", "\n")
        .replace("\r", "\n")
    )
    text = re.sub(r"[ \t\f\v]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text).strip()
    if _EMPTY.fullmatch(text):
        return ""
    return text


def artefacts(text: object) -> list[str]:
    """What exports left in a text and `clean` takes out, by name."""
    if not isinstance(text, str):
        return []
    kinds = {
        "codes of spreadsheets": _SPREADSHEET,
        "escaped line breaks": _ESCAPED,
        "HTML": re.compile(
            "|".join(f"(?:{one.pattern})" for one in (_HTML_BREAK, _HTML_TAG, _HTML_ENTITY)), re.IGNORECASE
        ),
    }
    return [name for name, pattern in kinds.items() if pattern.search(text)]


def _without_artefacts(text: str) -> str:
    text = _SPREADSHEET.sub(lambda found: chr(int(found[1], 16)), text)
    text = _ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else " " if found[0] == "\\t" else "\n", text)
    text = _HTML_TAG.sub("", _HTML_BREAK.sub("\n", text))
    return _HTML_ENTITY.sub(lambda found: html.unescape(found[0]), text)


def readable(text: str) -> str:
    """A decoded text as one writes it: numbers and words with a hyphen together."""
    for pattern, together in _APART:
        text = re.sub(pattern, together, text)
    return text.strip()
