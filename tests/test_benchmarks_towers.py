"""`mg3d bench model`: its FLOPs against XLA's own count, its table and JSON, and its errors."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mg3d_jax import devices
from mg3d_jax.benchmarks import towers as bench
from mg3d_jax.errors import UserError
from mg3d_jax.models.towers.vit import PRESETS
from mg3d_jax.models.volume_encoder import VolumeEncoder

SMALL = ["--preset", "nano", "--volume-size", "16", "16", "16", "--patch-size", "8", "8", "8", "--steps", "1"]


def test_flops_equal_what_xla_compiled():
    """XLA counts the body of a scan once, so one layer is compared; elementwise work is the small remainder."""
    case = bench.Case("jax", "nano", (64, 64, 64), (8, 8, 8), batch=1, steps=1)
    preset = PRESETS["nano"]
    encoder = VolumeEncoder(preset.width, 1, preset.num_heads, case.patch_size, case.volume_size, pooling="mean")
    volume = jnp.zeros((1, 64, 64, 64, 1))
    params = nn.unbox(jax.eval_shape(encoder.init, jax.random.key(0), volume))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(encoder.apply(p, volume)["tokens"] ** 2)))
    counted = gradient.lower(params).compile().cost_analysis()["flops"]
    whole = bench.training_matmul_flops(case)
    embedding = 2 * 2 * 512 * 512 * preset.width
    one_layer = embedding + (whole - embedding) / preset.depth
    assert one_layer == pytest.approx(counted, rel=0.1)
    assert one_layer < counted


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
