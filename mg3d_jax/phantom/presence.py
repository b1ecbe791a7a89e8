"""Which of the 18 abnormalities a phantom has: as often and as much together as in CT-RATE, or evenly and independently."""

from __future__ import annotations

import statistics

import numpy as np

from mg3d_jax.data.abnormalities import ABNORMALITIES

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
YOUNGEST, OLDEST = 24, 88  # years; every age between them is as frequent

# Share of scans, and loadings on three factors: age, fluid and acute disease, chronic disease of lungs and airways.
# Source: the labels of 800 reports of CT-RATE (640 train, 160 valid; CC BY-NC-SA 4.0) that the MG-3D repository
# redistributes. A Gaussian copula: for each pair of labels the tetrachoric correlation (the latent correlation that gives
# the pair's joint share), then the loadings whose products are nearest to them by weighted least squares (weight: the
# square of how much the labels' own correlation changes with the latent one; shared variance at most 0.95), turned by
# varimax. The labels' correlations come out 0.04 off the counted ones (root mean square over the pairs),
# as much as the counted ones are uncertain by (bootstrap over the 800).
CT_RATE: dict[str, tuple[float, tuple[float, float, float]]] = {
    "Medical material": (0.150, (0.12, 0.56, 0.00)),
    "Arterial wall calcification": (0.276, (0.93, 0.10, 0.18)),
    "Cardiomegaly": (0.113, (0.62, 0.44, -0.25)),
    "Pericardial effusion": (0.080, (0.38, 0.54, 0.09)),
    "Coronary artery wall calcification": (0.223, (0.90, 0.12, 0.17)),
    "Hiatal hernia": (0.160, (0.42, -0.02, 0.18)),
    "Lymphadenopathy": (0.340, (0.36, 0.35, 0.26)),
    "Emphysema": (0.230, (0.37, -0.06, 0.27)),
    "Atelectasis": (0.280, (0.42, 0.44, 0.00)),
    "Lung nodule": (0.463, (0.21, -0.23, 0.17)),
    "Lung opacity": (0.300, (0.04, 0.53, 0.17)),
    "Pulmonary fibrotic sequela": (0.266, (0.18, -0.03, 0.40)),
    "Pleural effusion": (0.146, (0.20, 0.87, -0.03)),
    "Mosaic attenuation pattern": (0.084, (0.56, 0.09, -0.20)),
    "Peribronchial thickening": (0.089, (0.34, 0.26, 0.60)),
    "Consolidation": (0.156, (0.01, 0.64, 0.20)),
    "Bronchiectasis": (0.096, (0.11, 0.00, 0.91)),
    "Interlobular septal thickening": (0.084, (0.13, 0.63, 0.09)),
}
_LOADINGS = np.array([CT_RATE[name][1] for name in ABNORMALITIES])  # [18, 3]
_OWN = np.sqrt(1 - np.square(_LOADINGS).sum(1))  # [18]: what no other label shares
_LIMITS = np.array([statistics.NormalDist().inv_cdf(1 - CT_RATE[name][0]) for name in ABNORMALITIES])

EVEN: dict[str, float] = {
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
HEALTHY_SHARE = 0.04
_AGE_DEPENDENT = ("Arterial wall calcification", "Coronary artery wall calcification")

Presence = dict[str, bool]


def sample_like_ct_rate(rng: np.random.Generator, age: int, keep: Presence | None = None) -> Presence:
    """Which abnormalities a scan has, by the copula of `CT_RATE`; `keep` are those of the patient's earlier scan.

    The first factor is the patient's age in standard scores, among ages that are all as frequent.
    """
    older = statistics.NormalDist().inv_cdf((age - YOUNGEST + 0.5) / (OLDEST - YOUNGEST + 1))
    latent = _LOADINGS @ np.array([older, *rng.standard_normal(2)]) + _OWN * rng.standard_normal(len(ABNORMALITIES))
    return _with_chronic(dict(zip(ABNORMALITIES, (latent > _LIMITS).tolist(), strict=True)), keep)


def sample_evenly(rng: np.random.Generator, age: int, keep: Presence | None = None) -> Presence:
    """Which abnormalities a scan has, each drawn by itself and all of them frequent: labels for few patients."""
    healthy = rng.random() < HEALTHY_SHARE
    draws = rng.random(len(ABNORMALITIES))
    presence = {}
    for name, draw in zip(ABNORMALITIES, draws, strict=True):
        probability = EVEN[name]
        if name in _AGE_DEPENDENT:
            probability *= 0.7 + 0.6 * np.clip((age - 35) / 50, 0, 1)
        presence[name] = bool(draw < probability) and not healthy
    return _with_chronic(presence, keep)


def _with_chronic(presence: Presence, keep: Presence | None) -> Presence:
    return presence if keep is None else presence | {name: keep[name] for name in CHRONIC}
