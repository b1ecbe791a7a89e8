"""`mg3d bench model`: its FLOPs against a closed form, its table and JSON, and its errors."""

from __future__ import annotations

import json

import pytest

from mg3d_jax import devices
from mg3d_jax.benchmarks import towers as bench
from mg3d_jax.errors import UserError
from mg3d_jax.models.towers.vit import PRESETS

SMALL = ["--preset", "nano", "--volume-size", "16", "16", "16", "--patch-size", "8", "8", "8", "--steps", "1"]


def test_flops_are_those_of_the_closed_form():
    """The backward pass costs twice the forward, except in the patch embedding, whose input needs no gradient."""
    case = bench.Case("flops", "nano", (64, 64, 64), (8, 8, 8), batch=2, steps=1, remat="full")
    preset, tokens = PRESETS["nano"], 512
    embedding = 2 * tokens * 8**3 * preset.width
    dense = 2 * tokens * (4 * preset.width**2 + 2 * preset.width * preset.mlp_dim)
    attention = 4 * tokens**2 * preset.width
    assert bench.count_flops(case)["flops"] == 2 * embedding + 3 * preset.depth * (dense + attention)


@pytest.mark.slow
def test_table_and_json(tmp_path, capsys):
    pytest.importorskip("einops")  # MONAI's ViT needs it
    path = tmp_path / "bench.json"
    assert bench.main([*SMALL, "--batch", "2", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "times the speed of MONAI's ViT" in printed
    ours, monai = json.loads(path.read_text())
    assert (ours["framework"], monai["framework"], ours["tokens"]) == ("jax", "monai", 8)
    for result in (ours, monai):
        assert result["samples_per_second"] == pytest.approx(2 / result["seconds"])
        assert 0 < result["mfu"] < 1.5
        assert result["memory_bytes"] > 2**20


def test_impossible_requests_are_errors():
    with pytest.raises(UserError, match="not divisible"):
        bench.main([*SMALL, "--volume-size", "20", "16", "16"])
    with pytest.raises(UserError, match="at least 1"):
        bench.main([*SMALL, "--batch", "0"])
    with pytest.raises(UserError, match="needs a tpu"):
        bench.time_jax(bench.Case("jax", "nano", (8, 8, 8), (8, 8, 8), 1, 1, attention="splash"))


def test_known_peaks():
    assert devices.known_peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert devices.known_peak("TPU v5 lite", "bfloat16") == 197e12
    assert devices.known_peak("TPU v5", "bfloat16") == 459e12
    assert devices.known_peak("NVIDIA H100 80GB HBM3", "float32") is None
    assert devices.known_peak("cpu", "bfloat16") is None


def test_measured_peak(monkeypatch):
    monkeypatch.setattr(devices, "MEASURED_SIZES", (256,))
    monkeypatch.setattr(devices, "SECONDS_PER_SIZE", 0.05)
    peak, source = devices.peak_flops("float32")
    assert 1e8 < peak < 1e14
    assert "measured" in source
