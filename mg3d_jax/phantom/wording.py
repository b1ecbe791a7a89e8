"""What reports of phantoms share: the report itself, and what the placeholders of a wording stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mg3d_jax.phantom.anatomy import lobe_of
from mg3d_jax.phantom.finding import Finding


@dataclass(frozen=True)
class Report:
    """The four text columns of CT-RATE's csv."""

    clinical: str
    technique: str
    findings: str
    impression: str


# Of the two columns beside findings and impression.
CLINICAL = (
    "Cough.",
    "Shortness of breath.",
    "Chest pain.",
    "Control.",
    "Fever, cough.",
    "Follow-up.",
    "Not given.",
    "Weight loss.",
)
TECHNIQUE = (
    "{contrast} sections were taken in the axial plane.",
    "{contrast} images of the thorax were taken with the patient supine.",
    "Thorax CT was obtained in deep inspiration.",
    "Multiplanar reconstructions were made from axial sections.",
    "Not given.",
)


def lower_first(text: str) -> str:
    """The text beginning in lower case."""
    return text[:1].lower() + text[1:]


def lower_first_word(text: str) -> str:
    """The text within a sentence: beginning in lower case, but for an abbreviation ("CT", "LAP")."""
    return text if text[1:2].isupper() else lower_first(text)


def upper_first(text: str) -> str:
    """The text beginning with a capital."""
    return text[:1].upper() + text[1:]


def join_words(items: Sequence[str]) -> str:
    """`["a", "b", "c"]` -> `"a, b and c"`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


_BOTH = (
    (("right upper lobe", "left upper lobe"), "both upper lobes"),
    (("right lower lobe", "left lower lobe"), "both lower lobes"),
)


def place(finding: Finding, rng: np.random.Generator) -> str:
    """Where the finding is ("in the right upper lobe"), "" where that goes without saying."""
    if finding.kind in ("pacemaker", "port catheter"):
        return f"in the {finding.side} anterior chest wall"
    if finding.kind == "sternal wires":
        return "along the sternum"
    if not finding.lobes:
        return {"bilateral": "on both sides", "": ""}.get(finding.side, f"on the {finding.side}")
    if len(finding.lobes) == 5 or (len(finding.lobes) > 2 and finding.side == "bilateral" and rng.random() < 0.4):
        return "in both lungs"
    for lobes, words in _BOTH:
        if finding.lobes == lobes:
            return f"in {words}"
    if len(finding.lobes) > 1 and finding.side != "bilateral" and rng.random() < 0.4:
        return f"in the {finding.side} lung"
    return f"in the {join_words(finding.lobes)}"


def _largest_lobe(finding: Finding) -> str:
    return lobe_of(np.array(max(finding.blobs, key=lambda blob: max(blob.radii)).centre))


def words_of(finding: Finding, rng: np.random.Generator) -> dict[str, str]:
    """What the placeholders of a wording stand for: place, sides, sizes in mm, degree; also with a capital ("Where")."""
    where = place(finding, rng)
    sizes = [str(size) for size in finding.sizes_mm]
    number = len(finding.blobs)
    count = (
        "A nodule"
        if number == 1
        else f"{upper_first(('two', 'three', 'four')[number - 2])} nodules"
        if number < 5
        else "Multiple nodules"
    )
    words = {
        "name": lower_first(finding.name),
        "where": where,
        "largest_where": f"in the {_largest_lobe(finding)}" if finding.lobes and finding.blobs else where,
        "hemi": "on both sides" if finding.side == "bilateral" else f"on the {finding.side}",
        "side": finding.side,
        "degree": finding.severity,
        "kind": finding.kind,
        "a_kind": finding.kind if finding.kind == "sternal wires" else f"a {finding.kind}",
        "size": sizes[0] if sizes else "",
        "sizes": join_words(sizes[:3]) if sizes else "",
        "count": count,
    }
    return words | {upper_first(key): upper_first(value) for key, value in words.items()}


def fill(template: str, words: Mapping[str, str]) -> str:
    """The wording with its placeholders replaced, without the gaps that empty ones leave."""
    return " ".join(template.format(**words).split()).replace(" .", ".").replace(" ,", ",")
