"""Licences of the data sets that `mg3d prepare` reads, and what they mean for weights that were trained on them.

Only what the publishers of a data set say counts; where that was not found, the table says so and where to look. Terms change:
a card names the page that holds. A layout says nothing about whose data lay in it, which each text leaves open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NON_COMMERCIAL, ATTRIBUTION, SHARE_ALIKE, AGREEMENT = (
    "non-commercial use",
    "attribution",
    "the same licence",
    "agreement",
)
_CONDITIONS = {  # in the order in which a reader wants to know them
    NON_COMMERCIAL: "only non-commercial use, because of {}",
    AGREEMENT: "what the agreement of each user says about derived work, because of {}",
    SHARE_ALIKE: "to be passed on under the same licence, because of {}",
    ATTRIBUTION: "with attribution, to {}",
}


@dataclass(frozen=True)
class Licence:
    """Of a data set.

    Args:
        title: of the data set.
        name: identifier of the licence, as Hugging Face's `license_name` has it; "not-known", "not-stated".
        link: where it stands.
        conditions: of `_CONDITIONS`, those that it sets; () where none is known.
        dataset: its name on the Hugging Face hub, "" where it is not there.
        gated: access is granted to persons.
    """

    title: str
    name: str
    link: str
    conditions: tuple[str, ...] = ()
    dataset: str = ""
    gated: bool = False

    @property
    def known(self) -> bool:
        """Does the table know what may be done?"""
        return bool(self.conditions)

    @property
    def note(self) -> str:
        """One paragraph for the card."""
        if not self.title:
            return (
                "Nothing is known about the licence of the training data: ask whoever trained it before you pass it on."
            )
        layout = f"The training data lay in {self.title}'s layout."
        if self.name == "not-stated":
            return f"{layout} That data set states no licence: ask its authors before you pass these weights on."
        if not self.known:
            return (
                f"{layout} Its licence is not known here: look it up ({self.link}) before you use these weights for more than "
                "to try them, and before you pass them on."
            )
        gated = "gated and " if self.gated else ""
        terms = "an agreement that each user accepts" if AGREEMENT in self.conditions else self.name.upper()
        parts = []
        if NON_COMMERCIAL in self.conditions:
            parts.append("only be used for non-commercial purposes")
        if AGREEMENT in self.conditions:
            parts.append("be passed on only as that agreement says")
        if ATTRIBUTION in self.conditions:
            parts.append("be used with attribution")
        if SHARE_ALIKE in self.conditions:
            parts.append("be passed on under the same licence")
        return (
            f"{layout} If it was {self.title}: that data set is {gated}under {terms} ({self.link}), so these weights may "
            f"{_and(parts)}. If it was phantoms (`mg3d phantom`), there is no such condition."
        )


def _creative(name: str) -> str:
    """Page of a Creative Commons licence: "cc-by-nc-4.0"."""
    kind, _, version = name.removeprefix("cc-").rpartition("-")
    return f"https://creativecommons.org/licenses/{kind}/{version}/"


_DECATHLON = Licence(  # https://registry.opendata.aws/msd/
    "the Medical Segmentation Decathlon", "cc-by-sa-4.0", _creative("cc-by-sa-4.0"), (SHARE_ALIKE, ATTRIBUTION)
)
UNKNOWN = Licence("", "not-known", "LICENSE")
LICENCES = {
    "ctrate": Licence(
        "CT-RATE", "cc-by-nc-sa-4.0", _creative("cc-by-nc-sa-4.0"), (NON_COMMERCIAL, SHARE_ALIKE, ATTRIBUTION),
        "ibrahimhamamci/CT-RATE", gated=True,
    ),
    "ctrg": Licence("CTRG-Chest", "not-stated", "LICENSE"),
    "luna16": Licence("LUNA16", "cc-by-4.0", "https://luna16.grand-challenge.org/Data/", (ATTRIBUTION,)),
    "stoic": Licence(
        "STOIC2021", "cc-by-nc-4.0", "https://registry.opendata.aws/stoic2021-training/", (NON_COMMERCIAL, ATTRIBUTION)
    ),
    "decathlon": _DECATHLON, "msd-lung": _DECATHLON, "msd-colon": _DECATHLON,
    "merlin": Licence(
        "the Merlin Abdominal CT Dataset", "merlin-data-use-agreement",
        "https://stanfordaimi.azurewebsites.net/datasets/60b9c7ff-877b-48ce-96c3-0194c8205c40", (NON_COMMERCIAL, AGREEMENT),
        gated=True,
    ),
    "inspect": Licence(
        "INSPECT", "inspect-data-use-agreement", "https://inspect.stanford.edu", (NON_COMMERCIAL, AGREEMENT), gated=True
    ),
    "cc-ccii": Licence("CC-CCII", "not-known", "http://ncov-ai.big.ac.cn/download"),
    "covid-19-20": Licence("COVID-19-20", "not-known", "https://covid-segmentation.grand-challenge.org"),
    "acdc": Licence("ACDC", "not-known", "https://www.creatis.insa-lyon.fr/Challenge/acdc/"),
    "rad-chestct": Licence("RAD-ChestCT", "not-known", "https://zenodo.org/records/6406114"),
}  # fmt: skip


def licences(sources: Sequence[str]) -> list[Licence]:
    """Of the layouts that a model was trained on, each once."""
    return list(dict.fromkeys(LICENCES.get(source, UNKNOWN) for source in sources or ("",)))


def note(sources: Sequence[str], started_from: str = "") -> str:
    """What the origin of the data means for weights: a paragraph for each data set, and what holds for all of them together.

    Args:
        started_from: what training began with, "" where it began with random weights.
    """
    found = licences(sources)
    lines = [one.note for one in found]
    if len(found) > 1:
        lines.append(_together(found))
    if started_from:
        lines.append(
            f"Training began with the weights of {started_from}: whatever holds for those holds for these as well."
        )
    return "\n".join(lines)


def _together(found: Sequence[Licence]) -> str:
    """The conditions of all: a model of mixed data has every one of them."""
    parts = []
    for condition, text in _CONDITIONS.items():
        if whose := [one.title for one in found if condition in one.conditions]:
            parts.append(text.format(_and(whose)))
    unknown = [one.title or "data of an unknown layout" for one in found if not one.known]
    text = f"Trained on all of these, the weights have every condition: {'; '.join(parts)}." if parts else ""
    if len({one.name for one in found if SHARE_ALIKE in one.conditions}) > 1:
        text += (
            " Two of the licences each want to be the one that they are passed on under: ask before you pass them on."
        )
    if unknown:
        text += f" Until the terms of {_and(unknown)} are known, do not pass them on."
    return text.strip()


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
