"""Rad-ChestCT's abnormalities as CT-RATE's 18 findings. Which stand for which is not agreed: mappings in use, by name."""

from __future__ import annotations

from collections.abc import Mapping

_DEVICES = (
    "catheter_or_port", "tracheal_tube", "chest_tube", "breast_implant", "pacemaker_or_defib", "stent", "clip", "staple",
    "gi_tube", "hardware", "suture",
)  # fmt: skip
_ALIKE = {
    "Cardiomegaly": ("cardiomegaly",),
    "Pericardial effusion": ("pericardial_effusion",),
    "Hiatal hernia": ("hernia",),
    "Emphysema": ("emphysema",),
    "Atelectasis": ("atelectasis",),
    "Pleural effusion": ("pleural_effusion",),
    "Peribronchial thickening": ("bronchial_wall_thickening",),
    "Consolidation": ("consolidation",),
    "Interlobular septal thickening": ("septal_thickening",),
}
_CALCIFICATION = {
    "Arterial wall calcification": ("calcification",),
    "Coronary artery wall calcification": ("calcification",),
}
# Finding of CT-RATE -> abnormalities of Rad-ChestCT, of which one at any place is enough.
MAPPINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "hlip": _ALIKE | _CALCIFICATION | {
        "Lung nodule": ("nodule",),
        "Lung opacity": ("opacity",),
        "Pulmonary fibrotic sequela": ("fibrosis",),
        "Bronchiectasis": ("bronchiectasis",),
    },
    "radfinder_standard": _ALIKE | _CALCIFICATION | {
        "Medical material": _DEVICES,
        "Lymphadenopathy": ("lymphadenopathy",),
        "Lung nodule": ("nodule", "nodulegr1cm"),
        "Lung opacity": ("opacity",),
        "Pulmonary fibrotic sequela": ("scarring",),
        "Bronchiectasis": ("bronchiectasis",),
    },
    "radfinder_extended": _ALIKE | {
        "Medical material": (*_DEVICES, "heart_valve_replacement", "cabg", "sternotomy"),
        "Arterial wall calcification": ("atherosclerosis",),
        "Coronary artery wall calcification": ("coronary_artery_disease",),
        "Lymphadenopathy": ("lymphadenopathy",),
        "Lung nodule": ("nodule", "nodulegr1cm"),
        "Lung opacity": ("opacity", "groundglass", "infiltrate", "airspace_disease"),
        "Pulmonary fibrotic sequela": (
            "fibrosis", "reticulation", "honeycombing", "scarring", "interstitial_lung_disease",
        ),
        "Mosaic attenuation pattern": ("air_trapping",),
        "Bronchiectasis": ("bronchiectasis", "bronchiolectasis"),
    },
}  # fmt: skip
