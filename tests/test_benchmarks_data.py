"""`mg3d bench data`: that it measures what it says, on a small scale. The numbers themselves are the machine's."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest

from mg3d_jax.benchmarks import loading as bench_loading
from mg3d_jax.benchmarks import preparation as bench
from mg3d_jax.data.records import RecordReader
from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.prepare.hounsfield import decide
from mg3d_jax.prepare.volumes import prepare_volume


def test_the_made_volume_looks_like_a_chest():
    volume = bench_loading.chest_like((64, 64, 40))
    assert decide(volume.ravel(), None, None).intercept == 0
    assert decide(volume.ravel(), None, (1.0, -1024.0)).intercept == 0


def test_both_ways_of_preparing_make_the_same_volume(tmp_path):
    """The comparison is fair: same grid, and where nothing is averaged away, the same values."""
    import nibabel as nib
    import torch

    smooth = bench_loading.chest_like((40, 40, 24)).astype(np.float64)
    path = tmp_path / "v.nii.gz"
    nib.save(nib.Nifti1Image(np.rint(smooth).astype(np.int16), np.diag([3.0, 3.0, 3.0, 1.0])), path)
    size = (50, 50, 30)  # finer: both are linear interpolation
    ours = prepare_volume(path, Grid(size, (2.4, 2.4, 2.4))).volume
    tensor = torch.tensor(nib.load(path).get_fdata())[None, None]
    usual = torch.nn.functional.interpolate(tensor, size=size, mode="trilinear", align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(ours, usual, atol=0.51)


@pytest.mark.processes
def test_a_measurement_runs_alone_and_reports():
    assert bench.alone(sum, [1, 2, 3]) == 6
    with pytest.raises(RuntimeError, match="exit code"):
        bench.alone(int, "no number")
    row = {"seconds": 2.0, "cpu_seconds": 1.5, "peak_mb": 100.0}
    preparation = {"usual": row, "ours": row, "read": row, "speedup": 3.0, "memory_share": 0.3}
    assert "3.0 x the speed, 0.30 of the memory" in bench.report({"preparation": preparation})


@pytest.mark.processes
def test_contestants_take_turns_and_failures_are_named(tmp_path):
    bench_loading.write_records(tmp_path / "zstd", 9, 3, (16, 16, 12))
    contestants = {
        "limit": (bench_loading.limits, 9, (16, 16, 12)),
        "zstd": (bench_loading.ours, str(tmp_path / "zstd")),
    }
    rates = bench_loading.in_turns(contestants, 2)
    limits = {"limit: memory copy", "limit: bare zstd of int16", "limit: bare zstd of our records"}
    assert rates.keys() == limits | {"zstd: decoded into a batch", "zstd: whole pipeline"}
    assert min(rates.values()) > 0
    with pytest.raises(RuntimeError, match="'wrong' failed"):
        bench_loading.in_turns({"wrong": (bench_loading.ours, str(tmp_path))}, 1)


def test_a_step_waits_for_slow_data_only():
    def waits(seconds: float) -> float:
        answers = []
        pipe = SimpleNamespace(send=answers.append)
        bench_loading.waited(lambda: (time.sleep(seconds) for _ in itertools.count()), (), 5, 0.001, pipe)
        return answers[0]

    assert min(waits(0.0) for _ in range(3)) < 0.05 < 5 * 0.02 <= waits(0.02)
    rates = {"limit: memory copy": 8000.0, "limit: bare zstd of int16": 300.0, "limit: bare zstd of our records": 700.0}
    rates |= {"raw: whole pipeline": 2000.0, "zstd: whole pipeline": 500.0}
    rates |= {"MONAI: items": 1000.0, "MONAI: whole batches": 200.0}
    loading = {"rates": rates, "bytes": {"raw": 3e6, "zstd": 1.5e6, "MONAI": 6e6}, "volumes": 8}
    waiting = {"share": {"raw": 0.05, "MONAI": 0.5}, "milliseconds": 100.0, "batch": 8, "workers": 2}
    text = bench.report({"loading": loading, "waiting": waiting})
    assert "raw is 2.0 x MONAI's items" in text and "1.40 x the time of its bare decoding" in text
    assert "0.25 of MONAI's bytes" in text and "waits for data: raw 5.0%, MONAI 50.0%" in text


def test_ours_and_monai_load_the_same_volumes(tmp_path):
    shape = (16, 16, 12)
    bench_loading.write_records(tmp_path / "zstd", 9, 3, shape)
    (tmp_path / "monai").mkdir()
    dataset = bench_loading._monai_dataset(str(tmp_path / "monai"), 9, shape)
    reader = RecordReader(tmp_path / "zstd")
    for index in range(9):
        np.testing.assert_array_equal(np.asarray(dataset[index]["volume"])[0], reader[index].volume)
