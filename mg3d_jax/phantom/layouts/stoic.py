"""STOIC 2021: `data/mha/PATIENT.mha` and `metadata/reference.csv`."""

from __future__ import annotations

from mg3d_jax.phantom.layouts.base import Files, Layout, csv_bytes
from mg3d_jax.phantom.miniature import chest, meta_image, stream

_COVID, _SEVERE = 0.6, 0.4  # shares: of all, and of those who have COVID-19


def files(patients: int, seed: int) -> Files:
    """COVID-19 is four hazy opacities, severe COVID-19 twelve larger ones."""
    rows = []
    for number in range(1, patients + 1):
        rng = stream("stoic", seed, number)
        covid = bool(rng.random() < _COVID)
        severe = covid and bool(rng.random() < _SEVERE)
        scan = chest(rng)
        for _ in range(12 if severe else 4 * covid):
            scan.lesion(rng, (28.0, 40.0) if severe else (24.0, 32.0), -300.0)
        yield f"data/mha/{number}.mha", meta_image(scan.hounsfield(rng), scan.affine)
        rows.append({"PatientID": str(number), "probCOVID": str(int(covid)), "probSevere": str(int(severe))})
    yield "metadata/reference.csv", csv_bytes(rows)


STOIC = Layout("STOIC 2021: COVID-19 and its severity, MetaImage", files, patients=100)
