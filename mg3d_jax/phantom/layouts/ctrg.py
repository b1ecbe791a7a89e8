"""CTRG-Chest: one json with the reports of every split, a volume per id."""

from __future__ import annotations

import json

from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.phantom.layouts.base import Files, Layout
from mg3d_jax.phantom.miniature import Chest, stream

_HELD_OUT = {8: "val", 9: "test"}  # of every ten


def files(patients: int, seed: int) -> Files:
    """Phantoms as `mg3d phantom` makes them, one scan each, with their reports."""
    content: dict[str, list[dict[str, str]]] = {"train": [], "val": [], "test": []}
    for number in range(patients):
        rng = stream("ctrg", seed, number)
        made = phantoms.make_patient(seed, number, "train", "plain").scans[0]
        scan = Chest(rng, made.anatomy, made.findings)
        name = f"{10000 + number}"
        yield f"volumes/{name}.nii.gz", nifti_bytes(scan.hounsfield(rng), scan.affine)
        row = {"id": name, "report": made.report.findings, "result": made.report.impression}
        content[_HELD_OUT.get(number % 10, "train")].append(row)
    yield "ctrg.json", json.dumps(content, indent=1).encode()


CTRG = Layout("CTRG-Chest: chests and reports, one json", files, patients=60)
