"""CC-CCII: `CLASS/PATIENT/SCAN/0000.png`, ... and `unzip_filenames.csv`."""

from __future__ import annotations

import numpy as np

from mg3d_jax.phantom.anatomy import LOBES
from mg3d_jax.phantom.layouts.base import Files, Layout, csv_bytes
from mg3d_jax.phantom.miniature import chest, png, stream

WINDOW = (-1350.0, 150.0)  # HU of grey 0 and 255
_SPACING = (7.0, 7.0, 12.0)
KINDS = ("Normal", "CP", "NCP")


def files(patients: int, seed: int) -> Files:
    """The classes in turn; common pneumonia is dense and in one lobe, the other one hazy and in all."""
    rows = []
    for number in range(patients):
        rng = stream("cc-ccii", seed, number)
        kind = KINDS[number % len(KINDS)]
        scan = chest(rng, spacing=_SPACING)
        if kind == "CP":
            scan.lesion(rng, (34.0, 44.0), 40.0)
        for lobe in LOBES if kind == "NCP" else ():
            scan.lesion(rng, (24.0, 34.0), -420.0, lobe=lobe)
        hu = scan.hounsfield(rng)
        grey = np.rint((np.clip(hu, *WINDOW) - WINDOW[0]) / (WINDOW[1] - WINDOW[0]) * 255).astype(np.uint8)
        patient, name = str(100 + number), str(1000 + number)
        count = grey.shape[2]
        for place in range(count):  # from the apex down, as radiologists look at it
            yield f"{kind}/{patient}/{name}/{place:04d}.png", png(grey[::-1, ::-1, count - 1 - place].T)
        rows.append(
            {"zip_file": f"{kind}-1.zip", "label": kind, "patient_id": patient, "scan_id": name, "n_slice": str(count)}
        )
    yield "unzip_filenames.csv", csv_bytes(rows)


CC_CCII = Layout("CC-CCII: normal, common and COVID-19 pneumonia, folders of 8-bit slices", files, patients=90)
