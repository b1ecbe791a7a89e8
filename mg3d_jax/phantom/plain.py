"""Plain reports of phantom scans: findings, negations, distractors, impression, in short sentences.

Every sentence is chosen among several phrasings, the plain ones of CT-CLIP's prompts
("Emphysema is present.") among them. For reports like real ones: `clinical.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.phantom.finding import Finding
from mg3d_jax.phantom.wording import CLINICAL, TECHNIQUE, Report, fill, join_words, lower_first, upper_first, words_of

NEGATION_SHARE = (0.6, 0.8)  # of the absent abnormalities, how many a report denies: drawn per report
JOINED_SHARE = 0.25  # of the denials, how many share a sentence with another
NO_IMPRESSION_SHARE = 0.08


# {where}: "in the right upper lobe"; {Where} starts a sentence; {size}, {sizes}: mm; {side}; {degree}; {kind}; {count}.
_POSITIVE: dict[str, tuple[str, ...]] = {
    "Medical material": (
        "Medical material is seen {where}, consistent with {a_kind}.",
        "Medical material is observed: {a_kind} {where}.",
        "There is medical material ({kind}) {where}.",
        "Appearance of {a_kind} {where} as medical material.",
        "The patient carries {a_kind} as medical material.",
    ),
    "Arterial wall calcification": (
        "{Degree} calcified atheromatous plaques are observed in the walls of the aorta.",
        "There is {degree} arterial wall calcification in the aortic arch and the descending aorta.",
        "Arterial wall calcification of {degree} degree is noted along the thoracic aorta.",
        "Atherosclerotic wall calcifications are seen in the thoracic aorta.",
        "The walls of the aortic arch show {degree} calcification.",
    ),
    "Cardiomegaly": (
        "The heart is enlarged, in keeping with {degree} cardiomegaly.",
        "The cardiothoracic ratio is increased in favor of the heart.",
        "{Degree} cardiomegaly is noted.",
        "Heart size has increased; cardiomegaly is observed.",
        "There is cardiomegaly of {degree} degree.",
    ),
    "Pericardial effusion": (
        "A pericardial effusion measuring {size} mm in its thickest part is observed.",
        "There is fluid in the pericardial space with a thickness of {size} mm.",
        "{Degree} pericardial effusion is noted, {size} mm thick.",
        "Pericardial effusion reaching {size} mm surrounds the heart.",
    ),
    "Coronary artery wall calcification": (
        "Calcified coronary plaques are observed in the {kind}.",
        "There is {degree} coronary artery wall calcification, affecting the {kind}.",
        "{Degree} coronary artery calcification is noted in the {kind}.",
        "Calcific atheroma plaques are seen in the walls of the coronary arteries.",
        "The coronary arteries show {degree} wall calcification.",
    ),
    "Hiatal hernia": (
        "A hiatal hernia of {size} mm with an air-fluid level is observed behind the heart.",
        "There is a sliding type hiatal hernia at the lower end of the esophagus, {size} mm in size.",
        "Hiatal hernia is noted, about {size} mm across.",
        "Part of the stomach is herniated through the esophageal hiatus (hiatal hernia).",
    ),
    "Lymphadenopathy": (
        "Enlarged lymph nodes are observed in the {kind} stations, the largest measuring {size} mm.",
        "There is mediastinal lymphadenopathy; the largest lymph node measures {size} mm.",
        "Lymphadenopathy is noted in the {kind} areas, up to {size} mm.",
        "Multiple pathologically enlarged mediastinal and hilar lymph nodes are seen, the largest {size} mm.",
    ),
    "Emphysema": (
        "{Degree} {kind} emphysema is observed in both lungs.",
        "There are {degree} emphysematous changes, predominantly in the upper lobes.",
        "Diffuse emphysema with bullae is seen in both upper lobes.",
        "Areas of {kind} emphysema are noted in both lungs.",
        "Both lungs show hyperinflation with emphysema and air cysts.",
    ),
    "Atelectasis": (
        "{Kind} atelectasis is observed {where}.",
        "There are {kind} atelectatic changes {where} with elevation of the {side} hemidiaphragm.",
        "Bands of atelectasis and volume loss are seen {where}.",
        "{Where}, areas of {kind} atelectasis are noted.",
    ),
    "Lung nodule": (
        "{Count} are observed {where}, the largest measuring {size} mm.",
        "There are solid nodules {where}; the largest is {size} mm in diameter.",
        "Partly calcified lung nodules are noted {where}, up to {size} mm.",
        "A {size} mm lung nodule is seen {largest_where}.",
        "{Where}, lung nodules with diameters of {sizes} mm are observed.",
    ),
    "Lung opacity": (
        "Ground-glass opacities are observed {where}.",
        "There are patchy lung opacities of ground-glass density {where}.",
        "{Where}, ground glass opacity is noted.",
        "Hazy lung opacity is seen {where}.",
        "Areas of ground-glass opacity are present {where}.",
    ),
    "Pulmonary fibrotic sequela": (
        "Fibrotic sequela changes are observed {where}.",
        "There are pleuroparenchymal sequela fibrotic bands {where}.",
        "Pulmonary fibrotic sequelae with apical scarring are noted {where}.",
        "{Where}, sequelae of fibrosis with apical thickening are seen.",
    ),
    "Pleural effusion": (
        "{Side} pleural effusion measuring {size} mm at its thickest is observed.",
        "There is a {side} pleural effusion with a thickness of {size} mm.",
        "{Degree} pleural effusion is noted {hemi}, reaching {size} mm.",
        "Fluid is seen in the pleural space {hemi}, {size} mm thick, consistent with pleural effusion.",
    ),
    "Mosaic attenuation pattern": (
        "A mosaic attenuation pattern is observed in both lungs.",
        "Both lungs show geographic areas of mosaic attenuation.",
        "There is a patchy mosaic attenuation pattern, which may indicate small airway disease.",
        "The lung parenchyma has a mosaic pattern of attenuation.",
    ),
    "Peribronchial thickening": (
        "{Degree} peribronchial thickening is observed {where}.",
        "There is thickening of the bronchial walls {where}.",
        "Peribronchial wall thickening is noted {where}.",
        "{Where}, the bronchial walls are markedly thickened (peribronchial thickening).",
    ),
    "Consolidation": (
        "A consolidation area of {size} mm with air bronchograms is observed {where}.",
        "There is a consolidation {where}, measuring {size} mm.",
        "Consolidation is noted {where}, in which air bronchograms are seen.",
        "{Where}, dense consolidation with a diameter of {size} mm is seen.",
    ),
    "Bronchiectasis": (
        "{Kind} bronchiectasis is observed {where}.",
        "There are bronchiectatic changes of {kind} type {where}.",
        "Dilated bronchi consistent with {kind} bronchiectasis are seen {where}.",
        "{Where}, bronchiectasis is noted.",
    ),
    "Interlobular septal thickening": (
        "{Kind} interlobular septal thickening is observed in both lungs.",
        "There is diffuse thickening of the interlobular septa.",
        "The interlobular septa are thickened in a {kind} pattern in both lungs.",
        "Bilateral interlobular septal thickening is noted.",
    ),
}
# {name} and {Name} are the abnormality's own name.
_PLAIN_POSITIVE = (
    "{Name} is present.",
    "{Name} is present.",
    "{Name} is present {where}.",
    "There is {name} {where}.",
    "{Name} is observed {where}.",
)
_PLAIN_NEGATIVE = (
    "{Name} is not present.",
    "{Name} is not present.",
    "There is no {name}.",
    "No {name} is observed.",
    "{Name} was not detected.",
    "{Name} was not observed.",
)
_NEGATIVE: dict[str, tuple[str, ...]] = {
    "Medical material": ("No medical device or foreign body is seen.", "There is no catheter or implanted device."),
    "Arterial wall calcification": (
        "The walls of the thoracic aorta are free of calcification.",
        "No calcified plaque is seen in the aorta.",
    ),
    "Cardiomegaly": ("Heart contour and size are normal.", "The heart is not enlarged."),
    "Pericardial effusion": (
        "Pericardial effusion or thickening was not observed.",
        "The pericardium contains no fluid.",
    ),
    "Coronary artery wall calcification": (
        "No calcification is seen in the coronary arteries.",
        "The coronary artery walls are not calcified.",
    ),
    "Hiatal hernia": ("No hiatal hernia is seen at the esophageal hiatus.", "The esophageal hiatus is normal."),
    "Lymphadenopathy": (
        "No enlarged lymph nodes in pathological dimensions were detected.",
        "Mediastinal and hilar lymph nodes are not enlarged.",
    ),
    "Emphysema": ("No emphysematous change is seen.", "The lungs show no emphysema or bulla."),
    "Atelectasis": ("No atelectatic change is seen.", "Both lungs are fully expanded without atelectasis."),
    "Lung nodule": ("No nodule or mass was detected in either lung.", "Nodular lesions are not seen in the lungs."),
    "Lung opacity": ("No ground-glass opacity is seen.", "There is no ground-glass density in the lungs."),
    "Pulmonary fibrotic sequela": (
        "No sequela of fibrosis is seen.",
        "There is no fibrotic band or scar in the lungs.",
    ),
    "Pleural effusion": ("Pleural effusion or thickening was not detected.", "Both pleural spaces are free of fluid."),
    "Mosaic attenuation pattern": ("Lung attenuation is homogeneous.", "No mosaic pattern is seen in the lungs."),
    "Peribronchial thickening": ("Bronchial walls are of normal thickness.", "The bronchial walls are not thickened."),
    "Consolidation": ("No infiltration or consolidation is seen.", "No area of consolidation was found in the lungs."),
    "Bronchiectasis": ("The bronchi are not dilated.", "Bronchial calibers are normal, without bronchiectasis."),
    "Interlobular septal thickening": (
        "The interlobular septa are not thickened.",
        "No thickening of the interlobular septa is seen.",
    ),
}
_JOINED_NEGATIVE = (
    "{A} and {b} are not observed.",
    "No {a} or {b} was detected.",
    "There is no {a} or {b}.",
    "Neither {a} nor {b} is seen.",
)
_DISTRACTORS = (
    "Trachea and both main bronchi are open.",
    "The thyroid gland is natural.",
    "Thoracic vertebral body heights are preserved.",
    "Degenerative changes are observed in the bone structures.",
    "No lytic or destructive lesion was detected in the bones.",
    "Upper abdominal organs included in the sections are normal.",
    "The liver, spleen and adrenal glands are unremarkable.",
    "Gallbladder and pancreas are evaluated as normal.",
    "Millimetric osteophytes are seen at the vertebral corners.",
    "The calibration of the main vascular structures is natural.",
    "The skin and subcutaneous tissues are unremarkable.",
    "Chest wall and axillae are normal.",
    "The esophagus has normal wall thickness.",
)
_NORMAL_IMPRESSIONS = ("Findings within normal limits.", "No pathology was detected.", "Normal thorax CT.")


def positive_sentence(finding: Finding, rng: np.random.Generator, plain: float = 0.45) -> str:
    """States one finding; with probability `plain` in the words of its name."""
    templates = _PLAIN_POSITIVE if rng.random() < plain else _POSITIVE[finding.name]
    return fill(templates[int(rng.integers(len(templates)))], words_of(finding, rng))


def negative_sentence(name: str, rng: np.random.Generator, plain: float = 0.6) -> str:
    """Denies one abnormality; with probability `plain` in the words of its name."""
    templates = _PLAIN_NEGATIVE if rng.random() < plain else _NEGATIVE[name]
    return fill(templates[int(rng.integers(len(templates)))], {"name": lower_first(name), "Name": name})


def _denials(names: list[str], rng: np.random.Generator) -> list[str]:
    sentences = []
    while names:
        first = names.pop()
        if names and rng.random() < JOINED_SHARE:
            second = names.pop()
            template = _JOINED_NEGATIVE[int(rng.integers(len(_JOINED_NEGATIVE)))]
            words = {"a": lower_first(first), "A": first, "b": lower_first(second)}
            sentences.append(fill(template, words))
        else:
            sentences.append(negative_sentence(first, rng))
    return sentences


def write_report(rng: np.random.Generator, findings: Mapping[str, Finding], *, contrast: bool) -> Report:
    """All findings stated, most absent ones denied, some distractors, in random order; and an impression.

    `contrast` is whether the scan shows contrast medium.
    """
    sentences = [positive_sentence(finding, rng) for finding in findings.values()]
    share = rng.uniform(*NEGATION_SHARE)
    absent = [name for name in ABNORMALITIES if name not in findings and rng.random() < share]
    rng.shuffle(absent)
    sentences += _denials(absent, rng)
    chosen = rng.choice(len(_DISTRACTORS), int(rng.integers(2, 6)), replace=False)
    sentences += [_DISTRACTORS[index] for index in chosen]
    rng.shuffle(sentences)
    return Report(
        clinical=CLINICAL[int(rng.integers(len(CLINICAL)))],
        technique=TECHNIQUE[int(rng.integers(len(TECHNIQUE)))].format(
            contrast="Contrast-enhanced" if contrast else "Non-contrast"
        ),
        findings=" ".join(sentences),
        impression=_impression(findings, rng),
    )


def _impression(findings: Mapping[str, Finding], rng: np.random.Generator) -> str:
    if rng.random() < NO_IMPRESSION_SHARE:
        return "Not given."
    if not findings:
        return _NORMAL_IMPRESSIONS[int(rng.integers(len(_NORMAL_IMPRESSIONS)))]
    stated = list(findings.values())
    rng.shuffle(stated)
    if rng.random() < 0.3:
        return f"{upper_first(join_words([lower_first(finding.name) for finding in stated]))}."
    return " ".join(positive_sentence(finding, rng, plain=0.8) for finding in stated)
