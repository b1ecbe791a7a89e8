"""A report that is held in one text -> its findings and its impression, by its headings."""

from __future__ import annotations

import re

from mg3d_jax.prepare.cleaning import clean

_NAMES = {
    "findings": r"(?:report|ct|chest|radiological)?[ \t]*findings?(?:\(s\))?|results?|reports?|comments?|"
    r"observations?|description",
    "impression": r"(?:final[ \t]+)?(?:impressions?(?:\(s\))?|conclusions?|opinions?|diagnos[ie]s|summary|assessment)",
    "other": r"exam(?:ination)?(?:[ \t]+(?:type|date))?|study|procedure|protocol|technique|methods?|comparisons?|contrast|"
    r"history|(?:clinical|patient)[ \t]+(?:history|information|indications?|data|details)|indications?|"
    r"reason(?:[ \t]+for[ \t]+(?:the[ \t]+)?(?:exam(?:ination)?|study))?",
}
_ANY = "|".join(f"(?P<{kind}>{names})" for kind, names in _NAMES.items())
# With a colon, at the beginning of a line or a sentence; or alone on its line; or in capitals before a dash or a capital.
_HEADING = re.compile(
    rf"(?:^|(?<=[\n.;]))[ \t]*[*#_]*(?:(?:{_ANY})[*_]*[ \t]*[:：][*_]*[ \t]*"
    rf"|(?:{_ANY.replace('?P<', '?P<line_')})[*_]*[ \t]*(?:\n|$))",
    re.IGNORECASE,
)
_CAPITALS = re.compile(
    r"(?:^|(?<=[\n.;]))[ \t]*(?:(?P<findings>FINDINGS?)|(?P<impression>IMPRESSIONS?|CONCLUSIONS?))"
    r"[ \t]*(?:[-–—][ \t]*|[ \t](?=[A-Z0-9]))"
)


def _headings(text: str) -> list[tuple[int, int, str]]:
    """(start, end, kind) of every heading, in order. One that must stand alone on its line does."""
    found = []
    for match in _HEADING.finditer(text):
        kind = next(name for name, value in match.groupdict().items() if value is not None)
        before = text[: match.start()].rstrip(" \t")
        if kind.startswith("line_") and before and not before.endswith("\n"):
            continue
        found.append((match.start(), match.end(), kind.removeprefix("line_")))
    taken = [range(start, end) for start, end, _ in found]
    for match in _CAPITALS.finditer(text):
        if not any(match.start() in one or match.end() - 1 in one for one in taken):
            found.append((match.start(), match.end(), "findings" if match["findings"] else "impression"))
    return sorted(found)


def split_sections(text: str) -> tuple[str, str]:
    """(findings, impression) of a report held in one text, by its headings ("FINDINGS:", "Conclusion:", or alone on a line).

    All of it is findings where no heading of these two is there. Where one is, what stands under other headings (history,
    technique, comparison) is no finding; without a heading of findings only the line of such a heading is left out."""
    text = clean(text)
    headings = _headings(text)
    kinds = {kind for _, _, kind in headings}
    if not kinds & {"findings", "impression"}:
        return text, ""
    parts: dict[str, list[str]] = {"findings": [], "impression": [], "other": []}
    target, start = "findings", 0
    for begin, end, kind in [*headings, (len(text), len(text), "")]:
        piece = text[start:begin]
        if target == "other" and "findings" not in kinds:
            first, _, rest = piece.partition("\n")
            parts["other"].append(first)
            piece, target = rest, "findings"
        parts[target].append(piece)
        target, start = kind, end
    findings, impression = (
        " ".join(part.strip() for part in parts[name] if part.strip()) for name in ("findings", "impression")
    )
    return clean(findings), clean(impression)
