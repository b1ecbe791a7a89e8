"""The 18 abnormalities of CT-RATE's labels, and the prompts that CT-CLIP evaluates them with."""

from __future__ import annotations

# The column order of `{train,valid}_predicted_labels.csv`; label vectors everywhere in the project follow it.
ABNORMALITIES: tuple[str, ...] = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)

# CT-CLIP's zero-shot evaluation: softmax over these two, in this order; P(present) is the first entry.
PROMPT_PRESENT = "{pathology} is present."
PROMPT_ABSENT = "{pathology} is not present."


def prompt_pair(pathology: str) -> tuple[str, str]:
    """`"Emphysema"` -> `("Emphysema is present.", "Emphysema is not present.")`."""
    return PROMPT_PRESENT.format(pathology=pathology), PROMPT_ABSENT.format(pathology=pathology)
