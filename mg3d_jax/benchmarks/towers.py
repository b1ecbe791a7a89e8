"""`mg3d bench model`: how fast a volume encoder trains here, next to MONAI's ViT in PyTorch on the same machine.

A step is the forward and backward pass of the encoder alone (no optimizer, no data). Each contestant runs in its own
process, so that neither's threads nor memory disturb the other's numbers.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from mg3d_jax.benchmarks.own_process import in_own_process
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.models.towers.vit import PRESETS

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "minimal", "full", "offload")


@dataclass(frozen=True)
class Case:
    """One encoder to time. `framework` is a key of `WORKERS`; `batch` volumes per step."""

    framework: str
    preset: str
    volume_size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    batch: int
    steps: int
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    @property
    def tokens(self) -> int:
        return prod(side // patch for side, patch in zip(self.volume_size, self.patch_size, strict=True))


def parser() -> argparse.ArgumentParser:
    """Options of `mg3d bench model`."""
    model = argparse.ArgumentParser(
        prog="mg3d bench model",
        description="Forward and backward pass of the volume encoder, next to MONAI's ViT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model.add_argument("--preset", nargs="+", default=["b", "l"], choices=list(PRESETS), help="encoder sizes")
    model.add_argument("--volume-size", type=int, nargs=3, default=[128, 128, 96], metavar=("X", "Y", "Z"))
    model.add_argument("--patch-size", type=int, nargs=3, default=[16, 16, 16], metavar=("X", "Y", "Z"))
    model.add_argument("--batch", type=int, default=2, help="volumes per step")
    model.add_argument("--steps", type=int, default=5, help="timed steps after the first; the median counts")
    model.add_argument("--dtype", choices=DTYPES, default="float32", help="compute dtype of both")
    model.add_argument("--remat", choices=REMATS, default="none", help="what our backward pass keeps")
    model.add_argument("--attention", default="auto", help="our attention backend: auto, xla, cudnn or splash")
    model.add_argument("--no-monai", action="store_true", help="time our encoder only")
    model.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    return model


def main(argv: list[str]) -> int:
    """Times every case, prints one line each."""
    args = parser().parse_args(argv)
    if min(args.batch, args.steps) < 1:
        raise UserError(f"--batch {args.batch} and --steps {args.steps} must be at least 1.")
    if any(side % patch for side, patch in zip(args.volume_size, args.patch_size, strict=True)):
        raise UserError(f"--volume-size {args.volume_size} is not divisible by --patch-size {args.patch_size}.")
    base = Case(
        "jax",
        args.preset[0],
        tuple(args.volume_size),
        tuple(args.patch_size),
        args.batch,
        args.steps,
        args.dtype,
        args.remat,
        args.attention,
    )
    frameworks = ("jax",) if args.no_monai else ("jax", "monai")
    results = []
    peak = in_own_process(replace(base, framework="peak"))
    print(_HEADER, flush=True)
    for preset in args.preset:
        work = in_own_process(replace(base, preset=preset, framework="flops"))["flops"]
        for framework in frameworks:
            case = replace(base, preset=preset, framework=framework)
            results.append(with_rates(case, in_own_process(case), work, peak))
            print(_line(results[-1]), flush=True)
    print(*_remarks(results), sep="\n")
    if args.json:
        write_json(args.json, results)
    return 0


_HEADER = (
    f"{'encoder':<10} {'by':<6} {'tokens':>6} {'batch':>5} {'ms/step':>9} {'samples/s':>10} {'TFLOP/s':>8} {'MFU':>7} "
    f"{'memory MiB':>10} {'first step s':>12}"
)


def _line(result: dict[str, Any]) -> str:
    mfu = "-" if result["mfu"] is None else f"{result['mfu']:.1%}"
    return (
        f"{result['preset']:<10} {result['framework']:<6} {result['tokens']:>6} {result['batch']:>5} "
        f"{1000 * result['seconds']:>9.1f} {result['samples_per_second']:>10.2f} "
        f"{result['flops_per_second'] / 1e12:>8.3f} "
        f"{mfu:>7} {result['memory_bytes'] / 2**20:>10.0f} {result['first_step_seconds']:>12.1f}"
    )


def _remarks(results: list[dict[str, Any]]) -> list[str]:
    first = results[0]
    lines = [f"device: {first['device']}; MFU is against {first['peak_source']}; memory: {first['memory_source']}"]
    lines.append(f"attention: {first['attention_used']}; dtype {first['dtype']}; remat {first['remat']}")
    times = {(r["preset"], r["framework"]): r["seconds"] for r in results}
    for preset in dict.fromkeys(r["preset"] for r in results):
        if (preset, "monai") in times:
            ratio = times[preset, "monai"] / times[preset, "jax"]
            lines.append(f"{preset}: {ratio:.2f} times the speed of MONAI's ViT in PyTorch")
    return lines


def with_rates(case: Case, measured: dict[str, Any], work: float, peak: dict[str, Any]) -> dict[str, Any]:
    """One row of the results: the case, what was measured, and samples/s, FLOP/s and MFU. `work` is FLOPs per volume."""
    rate = case.batch / measured["seconds"]
    flops = rate * work
    rates = {
        "samples_per_second": rate,
        "flops_per_second": flops,
        "mfu": flops / peak["peak"] if peak["peak"] else None,
    }
    return asdict(case) | {"tokens": case.tokens} | measured | rates | peak


def time_steps(step: Callable[[], Any], steps: int) -> dict[str, float]:
    """Seconds of the first step (with compilation) and the median of the others."""
    durations = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        durations.append(time.perf_counter() - start)
    return {"first_step_seconds": durations[0], "seconds": sorted(durations[1:])[steps // 2]}


def _process_memory() -> tuple[int, str]:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "peak of the whole process"


def _encoder_and_loss(case: Case, backend: str) -> tuple[Any, Callable]:
    """Our encoder, and the scalar `(parameters, volume [B, X, Y, Z, 1]) -> loss` whose gradient is timed."""
    import jax.numpy as jnp

    from mg3d_jax.models.towers.vit.encoder import VolumeEncoder

    preset = PRESETS[case.preset]
    encoder = VolumeEncoder(
        preset.width,
        preset.depth,
        preset.num_heads,
        case.patch_size,
        case.volume_size,
        mlp_ratio=preset.mlp_ratio,
        pooling="mean",
        dtype=case.dtype,
        remat=case.remat,
        attention_backend=backend,
    )

    def loss(p: Any, v: Any) -> Any:
        return jnp.sum(encoder.apply({"params": p}, v, train=True)["tokens"].astype(jnp.float32) ** 2)

    return encoder, loss


def count_flops(case: Case) -> dict[str, float]:
    """FLOPs of the matrix products of one volume's forward and backward pass (2 per multiply-add, nothing recomputed)."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from mg3d_jax import flops

    encoder, loss = _encoder_and_loss(replace(case, remat="none"), "xla")
    volume = jax.ShapeDtypeStruct((1, *case.volume_size, 1), jnp.float32)
    params = nn.unbox(jax.eval_shape(encoder.init, jax.random.key(1), volume)["params"])
    return {"flops": flops.count(jax.value_and_grad(loss), params, volume).products}


def time_jax(case: Case) -> dict[str, Any]:
    """Our encoder in this process."""
    import flax.linen as nn
    import jax

    from mg3d_jax.models.attention import choose_backend

    preset = PRESETS[case.preset]
    head_dim = preset.width // preset.num_heads
    backend, reason = choose_backend(case.attention, jax.default_backend(), case.dtype, head_dim)
    encoder, loss = _encoder_and_loss(case, backend)
    volume = jax.random.uniform(jax.random.key(0), (case.batch, *case.volume_size, 1))
    params = nn.unbox(jax.jit(encoder.init)(jax.random.key(1), volume)["params"])
    gradient = jax.jit(jax.grad(loss))
    times = time_steps(lambda: jax.block_until_ready(gradient(params, volume)), case.steps)
    statistics = jax.devices()[0].memory_stats() or {}
    memory = (statistics.get("peak_bytes_in_use"), "peak on the device")
    memory = memory if memory[0] else _process_memory()
    attention = {"attention_used": f"{backend} ({reason})"}
    return times | attention | {"memory_bytes": memory[0], "memory_source": memory[1]}


def time_monai(case: Case) -> dict[str, Any]:
    """MONAI's ViT of the same sizes with PyTorch's fused attention; on a GPU compiled by `torch.compile`."""
    try:
        import torch
        from monai.networks.nets import ViT
    except ImportError as error:
        raise UserError(f"the comparison needs torch, monai and einops ({error}); or say --no-monai.") from error
    preset = PRESETS[case.preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA multiplies float32 there
    sizes = (preset.width, preset.mlp_dim, preset.depth, preset.num_heads)
    model = ViT(1, case.volume_size, case.patch_size, *sizes, qkv_bias=True).to(device)
    for block in model.blocks:
        block.attn.use_flash_attention = True  # MONAI has the option, but its ViT does not pass it on
    volume = torch.rand(case.batch, 1, *case.volume_size, device=device)
    run = torch.compile(model) if device.type == "cuda" else model
    cast = torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with cast:
            tokens = run(volume)[0]
        tokens.float().square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = time_steps(step, case.steps)
    if device.type == "cuda":
        memory = (torch.cuda.max_memory_allocated(), "peak on the device")
    else:
        memory = _process_memory()
    attention = {"attention_used": "scaled_dot_product_attention"}
    return times | attention | {"memory_bytes": memory[0], "memory_source": memory[1]}


def find_peak(case: Case) -> dict[str, Any]:
    """The device, its peak for `case.dtype`, and where that figure comes from."""
    import jax

    from mg3d_jax.devices import peak_flops

    peak, source = peak_flops(case.dtype)
    return {"device": jax.devices()[0].device_kind, "peak": peak, "peak_source": source}


WORKERS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "jax": time_jax, "monai": time_monai, "flops": count_flops, "peak": find_peak,
}  # fmt: skip
