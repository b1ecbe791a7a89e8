"""`mg3d bench data`: that it measures what it says, on a small scale. The numbers themselves are the machine's."""

from __future__ import annotations

import numpy as np
import pytest

from mg3d_jax.data import bench
from mg3d_jax.data.geometry import Grid
from mg3d_jax.data.hounsfield import decide, evidence
from mg3d_jax.data.volumes import prepare_volume


def test_the_made_volume_looks_like_a_chest():
    volume = bench.chest_like((64, 64, 40))
    assert evidence(volume.ravel()).plausible
    assert decide(volume.ravel(), None, (1.0, -1024.0)).intercept == 0


def test_both_ways_of_preparing_make_the_same_volume(tmp_path):
    """The comparison is fair: same grid, and where nothing is averaged away, the same values."""
    import nibabel as nib
    import torch

    smooth = bench.chest_like((40, 40, 24)).astype(np.float64)
    path = tmp_path / "v.nii.gz"
    nib.save(nib.Nifti1Image(np.rint(smooth).astype(np.int16), np.diag([3.0, 3.0, 3.0, 1.0])), path)
    size = (50, 50, 30)  # finer: both are linear interpolation
    ours = prepare_volume(path, Grid(size, (2.4, 2.4, 2.4))).volume
    tensor = torch.tensor(nib.load(path).get_fdata())[None, None]
    usual = torch.nn.functional.interpolate(tensor, size=size, mode="trilinear", align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(ours, usual, atol=0.51)


@pytest.mark.processes
def test_a_measurement_runs_alone_and_reports(monkeypatch):
    assert bench.alone(sum, [1, 2, 3]) == 6
    with pytest.raises(RuntimeError, match="exit code"):
        bench.alone(int, "no number")
    row = {"seconds": 2.0, "cpu_seconds": 1.5, "peak_mb": 100.0}
    rates = {"bytes": 900.0, "rows": 800.0, "batches": 700.0, "disk_bytes": 1e6}
    found = {
        "preparation": {"usual": row, "ours": row, "read": row, "speedup": 3.0, "memory_share": 0.3},
        "loading": {
            "limits": {"memcpy": 5000.0, "zstd": 300.0, "zstd_bytes": 1.5e6},
            "raw": rates,
            "zstd": rates,
            "monai": {"items": 350.0, "batches": 200.0, "bytes": 4e6},
        },
    }
    text = bench.report(found)
    assert "3.0 x the speed, 0.30 of the memory" in text and "raw is 2.0 x MONAI's items" in text


def test_loading_is_measured_on_real_records(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_GRID", (16, 16, 12))
    for name, level in (("raw", 0), ("zstd", 3)):
        bench._write_records(tmp_path / name, 9, level)
        rates = bench._load_ours(str(tmp_path / name), 1)
        assert set(rates) == {"bytes", "rows", "batches"} and min(rates.values()) > 0
    limits = bench._limits(4, 1)
    assert limits["memcpy"] > 0
