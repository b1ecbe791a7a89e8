"""The 18 abnormalities of CT-RATE in phantoms: how often, what they do to the chest, and the table of who draws what.

Each abnormality is a pair of functions: `sample_*` decides side, lobes, sizes and geometry (once per scan), `draw_*`
paints that geometry (once per reconstruction). They look different from one another by place, density and texture, and
are large enough to survive averaging to 7 mm voxels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.phantom import lungs, mediastinum
from mg3d_jax.phantom.anatomy import Anatomy
from mg3d_jax.phantom.canvas import Canvas
from mg3d_jax.phantom.finding import Finding

PREVALENCE: dict[str, float] = {
    "Medical material": 0.25,
    "Arterial wall calcification": 0.3,
    "Cardiomegaly": 0.28,
    "Pericardial effusion": 0.22,
    "Coronary artery wall calcification": 0.3,
    "Hiatal hernia": 0.24,
    "Lymphadenopathy": 0.28,
    "Emphysema": 0.25,
    "Atelectasis": 0.25,
    "Lung nodule": 0.32,
    "Lung opacity": 0.28,
    "Pulmonary fibrotic sequela": 0.25,
    "Pleural effusion": 0.25,
    "Mosaic attenuation pattern": 0.22,
    "Peribronchial thickening": 0.24,
    "Consolidation": 0.25,
    "Bronchiectasis": 0.24,
    "Interlobular septal thickening": 0.22,
}
# What a patient keeps from one scan to the next.
CHRONIC = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Emphysema",
    "Pulmonary fibrotic sequela",
    "Bronchiectasis",
)
HEALTHY_SHARE = 0.04
_AGE_DEPENDENT = ("Arterial wall calcification", "Coronary artery wall calcification")


def sample_presence(rng: np.random.Generator, age: int, keep: dict[str, bool] | None = None) -> dict[str, bool]:
    """Which abnormalities a scan has, drawn independently; `keep` are those of the patient's earlier scan."""
    healthy = rng.random() < HEALTHY_SHARE
    draws = rng.random(len(ABNORMALITIES))
    presence = {}
    for name, draw in zip(ABNORMALITIES, draws, strict=True):
        probability = PREVALENCE[name]
        if name in _AGE_DEPENDENT:
            probability *= 0.7 + 0.6 * np.clip((age - 35) / 50, 0, 1)
        presence[name] = bool(draw < probability) and not healthy
    if keep is not None:
        presence |= {name: keep[name] for name in CHRONIC}
    return presence


def adapt_anatomy(rng: np.random.Generator, a: Anatomy, presence: dict[str, bool]) -> Anatomy:
    """The chest whose shape shows the findings that change it: heart size, pericardium, diaphragm."""
    changes: dict[str, Any] = {}
    if presence["Cardiomegaly"]:
        factor = rng.uniform(1.28, 1.45)
        x, y, z = a.heart_centre
        changes["heart_radii"] = tuple(float(radius * factor) for radius in a.heart_radii)
        changes["heart_centre"] = (x - 7.0, y + 2.0, z + 6.0)
    if presence["Pericardial effusion"]:
        changes["pericardial_fluid"] = float(rng.uniform(12, 20))
    if presence["Emphysema"]:  # hyperinflation flattens the diaphragm
        changes |= {"dome_right": a.dome_right - 12, "dome_left": a.dome_left - 12, "lung_hu": a.lung_hu - 75}
    if presence["Atelectasis"]:  # the lower lobe loses volume
        dome = "dome_right" if rng.random() < 0.5 else "dome_left"
        changes[dome] = float(changes.get(dome, getattr(a, dome)) + rng.uniform(24, 34))
    return dataclasses.replace(a, **changes)


Sampler = Callable[[np.random.Generator, Anatomy], Finding]
Drawer = Callable[[Canvas, Anatomy, Finding], None]

# In the order of drawing: what changes the whole lung first, what lies on top of everything last.
FINDINGS: dict[str, tuple[Sampler, Drawer]] = {
    "Emphysema": (lungs.sample_emphysema, lungs.draw_emphysema),
    "Mosaic attenuation pattern": (lungs.sample_mosaic, lungs.draw_mosaic),
    "Interlobular septal thickening": (lungs.sample_septal, lungs.draw_septal),
    "Lung opacity": (lungs.sample_opacity, lungs.draw_opacity),
    "Pulmonary fibrotic sequela": (lungs.sample_fibrosis, lungs.draw_fibrosis),
    "Consolidation": (lungs.sample_consolidation, lungs.draw_consolidation),
    "Peribronchial thickening": (lungs.sample_peribronchial, lungs.draw_peribronchial),
    "Bronchiectasis": (lungs.sample_bronchiectasis, lungs.draw_bronchiectasis),
    "Atelectasis": (lungs.sample_atelectasis, lungs.draw_atelectasis),
    "Lung nodule": (lungs.sample_nodule, lungs.draw_nodule),
    "Pleural effusion": (lungs.sample_pleural, lungs.draw_pleural),
    "Cardiomegaly": (mediastinum.sample_cardiomegaly, mediastinum.draw_nothing),
    "Pericardial effusion": (mediastinum.sample_pericardial, mediastinum.draw_nothing),
    "Hiatal hernia": (mediastinum.sample_hernia, mediastinum.draw_hernia),
    "Lymphadenopathy": (mediastinum.sample_nodes, mediastinum.draw_nodes),
    "Arterial wall calcification": (mediastinum.sample_arterial, mediastinum.draw_calcification),
    "Coronary artery wall calcification": (mediastinum.sample_coronary, mediastinum.draw_calcification),
    "Medical material": (mediastinum.sample_material, mediastinum.draw_material),
}
