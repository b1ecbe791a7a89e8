"""What the hardware can do at best: the denominator of model-FLOPs utilisation (MFU).

Published dense matrix-product peaks where a device is known; on a CPU, a peak measured on the spot.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

# bfloat16 FLOP/s per chip without sparsity, by a part of `device_kind`; the first match counts. Vendors' data sheets.
PEAK_BFLOAT16: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 2307e12),
)
MEASURED_SIZES = (512, 1024, 2048)
SECONDS_PER_SIZE = 0.5


def known_peak(device_kind: str, dtype: str) -> float | None:
    """Published peak of one device in FLOP/s, or None where the table has none (any dtype but bfloat16 included)."""
    if dtype != "bfloat16":
        return None
    return next((peak for part, peak in PEAK_BFLOAT16 if part in device_kind), None)


def measured_peak(dtype: str) -> float:
    """The best FLOP/s of a square matrix product that this process reaches now, over three sizes."""
    best = 0.0
    multiply = jax.jit(jnp.matmul)
    for size in MEASURED_SIZES:
        matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
        multiply(matrix, matrix).block_until_ready()
        end = time.perf_counter() + SECONDS_PER_SIZE
        while time.perf_counter() < end:
            start = time.perf_counter()
            multiply(matrix, matrix).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def peak_flops(dtype: str) -> tuple[float | None, str]:
    """Peak of this process's first device in FLOP/s and where the figure comes from; None where it is not known."""
    device = jax.devices()[0]
    if peak := known_peak(device.device_kind, dtype):
        return peak, f"data sheet of {device.device_kind}"
    if device.platform == "cpu":
        return measured_peak(dtype), f"measured {dtype} matrix product"
    return None, f"no {dtype} peak is known for {device.device_kind}"


def leave_accelerators_alone() -> None:
    """Traces on the CPU from now on: what a sweep counts needs no accelerator, and those belong to its trainers, which are
    other processes."""
    jax.config.update("jax_platforms", "cpu")
