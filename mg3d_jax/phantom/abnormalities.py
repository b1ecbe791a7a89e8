"""The 18 abnormalities of CT-RATE in phantoms: what they do to the chest, and the table of who draws what.

Each abnormality is a pair of functions: `sample_*` decides side, lobes, sizes and geometry (once per scan), `draw_*`
paints that geometry (once per reconstruction). They look different from one another by place, density and texture, and
are large enough to survive averaging to 7 mm voxels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mg3d_jax.phantom import lungs, mediastinum
from mg3d_jax.phantom.anatomy import Anatomy
from mg3d_jax.phantom.canvas import Canvas
from mg3d_jax.phantom.finding import Finding


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
