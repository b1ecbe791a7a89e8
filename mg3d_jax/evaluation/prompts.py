"""Prompts for zero-shot classification, by name: what says that a finding is present, and what says that it is absent.

Every set has a general pattern. The published sets and "reports" have wordings of their own for CT-RATE's findings; any
other label gets the pattern. Several phrasings are embedded as their mean direction. Sources: the public evaluation code of
CT-CLIP, HLIP and fVLM (wordings are facts of their protocols; no code is taken).
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mg3d_jax.data.abnormalities import ABNORMALITIES, prompt_pair
from mg3d_jax.errors import UserError

Phrasings = tuple[tuple[str, ...], tuple[str, ...]]  # present, absent
SIDES = ("present", "absent")


@dataclass(frozen=True)
class PromptSet:
    """One way to ask.

    Args:
        meaning: one line for a reader of results.
        pattern: for a label that has no wording of its own.
        own: those that have.
    """

    meaning: str
    pattern: Callable[[str], Phrasings]
    own: Mapping[str, Phrasings]

    def __call__(self, label: str) -> Phrasings:
        return self.own.get(label) or self.pattern(label)


def sentence_case(label: str) -> str:
    """ "Lung nodule" -> "lung nodule"; "CT finding" stays."""
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]


def _pair(present: str, absent: str) -> Phrasings:
    return (present,), (absent,)


def _ct_clip(label: str) -> Phrasings:
    return _pair(*prompt_pair(label))


def _ct_clip_training(label: str) -> Phrasings:
    return _pair(f"There is {label}.", f"There is no {label}.")


def _bare(label: str) -> Phrasings:
    return _pair(f"{label}.", f"No {sentence_case(label)}.")


def _not(label: str) -> Phrasings:
    return _pair(f"{label}.", f"Not {label}.")


HLIP = "The {place} shows: {finding}."
_ORGANS = {
    "heart": ("Cardiomegaly", "Pericardial effusion", "Coronary artery wall calcification"),
    "esophagus": ("Hiatal hernia",),
    "aorta": ("Arterial wall calcification",),
    "lung": (
        "Emphysema", "Atelectasis", "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion",
        "Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis",
        "Interlobular septal thickening",
    ),
}  # fmt: skip
_ORGAN = {label: organ for organ, labels in _ORGANS.items() for label in labels}


def _hlip(label: str, place: str = "volume", finding: str = "") -> Phrasings:
    absent = "Not atelectatic" if label == "Atelectasis" else f"Not {sentence_case(finding or label)}"
    return _pair(*(HLIP.format(place=place, finding=words) for words in (finding or label, absent)))


_SHORT = {"Lung nodule": "Nodule", "Lung opacity": "Opacity"}
_FVLM = {**_SHORT, "Atelectasis": "Atelectatic", "Pulmonary fibrotic sequela": "Pulmonary fibrotic"}


# Findings as reports word them: what is seen, where; and absence as its usual statements, of which few name the finding.
_SEEN = ("{} is observed.", "There is {}.", "{} was detected.")
_UNSEEN = ("No {} was detected.", "{} was not observed.", "There is no {}.")
_CLEAR_LUNG = "Aeration of both lungs is normal and no infiltrative lesion is detected."
_CALM_VESSELS = "Calibration of the mediastinal vascular structures is natural."
_REPORTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # label: (what is seen, further statements of presence, further statements of absence)
    "Medical material": (
        ("a catheter", "suture material", "a stent"),
        ("A port catheter extends to the superior vena cava.", "Sternotomy sutures are observed in the sternum."),
        ("No catheter or suture material was observed.",),
    ),
    "Arterial wall calcification": (
        ("wall calcification in the aorta", "calcific atheroma plaques in the aorta"),
        ("There are atherosclerotic wall calcifications in the thoracic aorta.",),
        (_CALM_VESSELS, "The diameter of the aorta is normal."),
    ),
    "Cardiomegaly": (
        ("cardiomegaly",),
        ("Heart size increased.", "The cardiothoracic ratio increased in favor of the heart."),
        ("Heart size and contours are normal.", "Heart dimensions and compartments appear natural."),
    ),
    "Pericardial effusion": (
        ("pericardial effusion",),
        ("There is minimal pericardial effusion.",),
        ("Pericardial effusion or thickening was not observed.",),
    ),
    "Coronary artery wall calcification": (
        ("wall calcification in the coronary arteries", "calcific atheroma plaques in the coronary arteries"),
        ("There are atherosclerotic changes in the coronary arteries.",),
        ("The heart and the coronary arteries are normal.", "Heart contour and size are normal."),
    ),
    "Hiatal hernia": (
        ("hiatal hernia", "sliding type hiatal hernia"),
        ("There is a sliding type hiatal hernia at the lower end of the esophagus.",),
        ("Calibration of the thoracic esophagus is normal and no significant wall thickening was detected.",),
    ),
    "Lymphadenopathy": (
        ("lymphadenopathy in the mediastinum", "enlarged lymph nodes"),
        ("Lymph nodes of pathological size are observed in the mediastinum.",),
        ("No lymph node of pathological size and appearance was detected in the mediastinum and at the hilar levels.",),
    ),
    "Emphysema": (
        ("emphysema", "emphysematous changes in both lungs"),
        ("Emphysematous changes are present in both lungs.",),
        ("Aeration of both lung parenchyma is normal.", _CLEAR_LUNG),
    ),
    "Atelectasis": (
        ("atelectasis", "subsegmental atelectasis in the lower lobes", "linear atelectasis in both lungs"),
        (),
        ("Both lungs are fully aerated.", _CLEAR_LUNG),
    ),
    "Lung nodule": (
        ("a nodule in the lung", "millimetric nonspecific nodules in both lungs"),
        ("A few millimetric nodules are seen in both lungs.",),
        ("No nodule or mass was detected in either lung.", "No nodular lesion is detected in the lung parenchyma."),
    ),
    "Lung opacity": (
        ("ground glass opacity", "ground glass density areas in both lungs"),
        ("Areas of increased density are observed in the lung.",),
        ("No infiltration was detected in the lung parenchyma.", _CLEAR_LUNG),
    ),
    "Pulmonary fibrotic sequela": (
        ("pleuroparenchymal sequelae in both lungs", "fibrotic density increases in the apex of the lung"),
        ("Sequelae changes are observed at the apical level of both lungs.",),
        ("No sequelae change was detected in the lung.", _CLEAR_LUNG),
    ),
    "Pleural effusion": (
        ("pleural effusion", "bilateral pleural effusion"),
        ("There is effusion between the leaves of the pleura.",),
        ("Pleural effusion or thickening was not detected in both hemithoraces.",),
    ),
    "Mosaic attenuation pattern": (
        ("mosaic attenuation pattern in both lungs",),
        ("There is mosaic attenuation due to small airway disease.",),
        (_CLEAR_LUNG,),
    ),
    "Peribronchial thickening": (
        ("peribronchial thickening", "bronchial wall thickening"),
        (),
        ("The trachea and both main bronchi are open and of normal calibration.",),
    ),
    "Consolidation": (
        ("consolidation", "an area of consolidation in the lower lobe"),
        ("Focal consolidations are observed in both lungs.",),
        ("No pneumonic infiltration or consolidation was detected in the lung parenchyma.", _CLEAR_LUNG),
    ),
    "Bronchiectasis": (
        ("bronchiectasis", "bronchiectatic changes in both lungs"),
        (),
        ("Calibration of the trachea and main bronchi is normal and their lumens are clear.",),
    ),
    "Interlobular septal thickening": (
        ("interlobular septal thickening", "thickening of the interlobular septa in both lungs"),
        (),
        ("No interstitial thickening was detected.", _CLEAR_LUNG),
    ),
}  # fmt: skip


def _worded(patterns: Sequence[str], finding: str) -> tuple[str, ...]:
    return tuple((words := pattern.format(finding))[:1].upper() + words[1:] for pattern in patterns)


def _reports(label: str) -> Phrasings:
    return _worded(_SEEN, sentence_case(label)), _worded(_UNSEEN, sentence_case(label))


def _own_reports(label: str) -> Phrasings:
    seen, present, absent = _REPORTS[label]
    found = [phrase for finding in seen for phrase in _worded(("{}.", "Findings consistent with {}."), finding)]
    return (*found, *present), (*_worded(_UNSEEN, sentence_case(label)), *absent)


PROMPT_SETS: dict[str, PromptSet] = {
    "ct_clip": PromptSet("'X is present.' / 'X is not present.', as CT-CLIP evaluates", _ct_clip, {}),
    "ct_clip_training": PromptSet(
        "'There is X.' / 'There is no X.', as CT-CLIP probes while it trains", _ct_clip_training, {}
    ),
    "hlip": PromptSet("'The volume shows: X.' / 'The volume shows: Not x.', as HLIP evaluates", _hlip, {}),
    "hlip_organ": PromptSet(
        "'The lung shows: X.' / 'The lung shows: Not x.' with the organ of the finding, as HLIP evaluates",
        _hlip,
        {label: _hlip(label, organ, _SHORT.get(label, "")) for label, organ in _ORGAN.items()},
    ),
    "fvlm": PromptSet(
        "'X.' / 'Not X.', as fVLM evaluates; of the whole volume, not of an organ's crop",
        _not,
        {label: _not(words) for label, words in _FVLM.items()},
    ),
    "bare": PromptSet("'X.' / 'No x.'", _bare, {}),
    "reports": PromptSet(
        "several phrasings as CT-RATE's reports have them: findings as they are described, absence in its usual statements",
        _reports,
        {label: _own_reports(label) for label in _REPORTS},
    ),
}  # fmt: skip
# Labels for which a published protocol has no wording of its own.
_UNWORDED = {
    "hlip": ("Medical material", "Lymphadenopathy"),
    "hlip_organ": ("Medical material", "Lymphadenopathy"),
    "fvlm": ("Medical material", "Lymphadenopathy"),
}


def by_general_pattern(name: str, labels: Sequence[str]) -> list[str]:
    """The labels that the published protocol of this name does not word: they get its general pattern."""
    unworded = _UNWORDED.get(name, ())
    return [label for label in labels if name in PROMPT_SETS and (label in unworded or label not in ABNORMALITIES)]


def is_file(name: str) -> bool:
    """Whether `name` is meant as a file and not as one of `PROMPT_SETS`."""
    return name not in PROMPT_SETS and name.endswith((".json", ".csv"))


def prompts_of(name: str, labels: Sequence[str]) -> dict[str, Phrasings]:
    """`{label: (present, absent)}` of a set by name, or from a file. `UserError` where it has none for a label."""
    if name in PROMPT_SETS:
        return {label: PROMPT_SETS[name](label) for label in labels}
    if is_file(name):
        return read_prompts(Path(name), labels)
    close = difflib.get_close_matches(name, PROMPT_SETS, 1, 0.4)
    raise UserError(
        f"prompts = {name!r}: there is no such set. Choose one of {', '.join(PROMPT_SETS)}, or a file that ends in .json or "
        ".csv." + (f" Did you mean {close[0]!r}?" if close else "")
    )


def read_prompts(path: Path, labels: Sequence[str]) -> dict[str, Phrasings]:
    """Prompts from a file, for exactly these labels.

    JSON: `{"Emphysema": {"present": [phrase, ...], "absent": [phrase, ...]}, ...}`, a single phrase may stand without its
    list. CSV: columns `class`, `present`, `absent`; several rows of a class are several phrasings, an empty field is none.
    Prompts for CT-RATE's findings that are not among the labels are left aside.

    Raises:
        UserError: the file cannot be read, has no prompts for a label on one side, or has prompts for a class that is
            neither a label nor one of CT-RATE's findings.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the prompts cannot be read ({error})") from error
    found = _from_json(path, text) if path.suffix == ".json" else _from_csv(path, text)
    if unknown := [label for label in found if label not in labels and label not in ABNORMALITIES]:
        raise UserError(
            f"{path}: has prompts for {', '.join(map(repr, unknown))}, which is no label of the data: "
            f"{', '.join(labels)}. Take them out, or name them as the label table does"
        )
    for label in labels:
        for side, phrases in zip(SIDES, found.get(label, ((), ())), strict=True):
            if not phrases:
                raise UserError(
                    f"{path}: has no prompt that says that {label!r} is {side}: give at least one for every scored class, "
                    "or choose fewer classes"
                )
    return {label: found[label] for label in labels}


def _from_json(path: Path, text: str) -> dict[str, Phrasings]:
    remedy = 'write {"Emphysema": {"present": ["..."], "absent": ["..."]}, ...}'
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}): {remedy}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}: {remedy}")
    found: dict[str, Phrasings] = {}
    for label, sides in document.items():
        if not isinstance(sides, dict) or set(sides) != set(SIDES):
            raise UserError(f"{path}: {label!r} has {sides!r}: {remedy}")
        lists = [[sides[side]] if isinstance(sides[side], str) else sides[side] for side in SIDES]
        for phrases in lists:
            if not isinstance(phrases, list) or not all(isinstance(one, str) and one.strip() for one in phrases):
                raise UserError(f"{path}: {label!r} has {phrases!r}, which is no list of texts: {remedy}")
        found[label] = (tuple(lists[0]), tuple(lists[1]))
    return found


def _from_csv(path: Path, text: str) -> dict[str, Phrasings]:
    reader = csv.DictReader(text.splitlines())
    if missing := [name for name in ("class", *SIDES) if name not in (reader.fieldnames or ())]:
        raise UserError(
            f"{path}: lacks the column {', '.join(missing)}: the first line must be class,present,absent; it is "
            f"{','.join(reader.fieldnames or ())!r}"
        )
    found: dict[str, tuple[list[str], list[str]]] = {}
    for row in reader:
        sides = found.setdefault((row["class"] or "").strip(), ([], []))
        for side, phrases in zip(SIDES, sides, strict=True):
            if (phrase := (row[side] or "").strip()) and phrase not in phrases:
                phrases.append(phrase)
    return {label: (tuple(present), tuple(absent)) for label, (present, absent) in found.items()}
