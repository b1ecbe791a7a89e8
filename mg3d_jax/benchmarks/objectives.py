"""`mg3d bench objectives`: memory of the sentence-wise matching loss, streamed in blocks against all pairs at once.

Everything is compiled, nothing is run: the numbers are the compiler's own (`memory_analysis`), for one device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mg3d_jax.errors import UserError
from mg3d_jax.objectives.matching import sentence_matching
from mg3d_jax.objectives.pairwise import l2_normalize

GIB = 2**30


def dense_matching(z: jax.Array, s: jax.Array, mask: jax.Array, high: float = 0.9, low: float = 0.6) -> jax.Array:
    """The loss of `sentence_matching` with the whole [B S, B S] matrix of pairs in memory, for comparison."""
    batch_size, sentences = mask.shape
    z, s, mask = l2_normalize(z).reshape(-1, z.shape[-1]), l2_normalize(s).reshape(-1, s.shape[-1]), mask.reshape(-1)
    similarity, target = z @ z.T, jax.lax.stop_gradient(s @ s.T)
    patient = jnp.repeat(jnp.arange(batch_size), sentences)
    pair = mask[:, None] & mask & (patient[:, None] != patient)
    attract, repel = pair & (target >= high), pair & (target <= low)
    error = jnp.where(attract, jnp.abs(similarity - target), jnp.where(repel, jnp.abs(similarity), 0.0))
    return jnp.sum(error) / jnp.maximum(jnp.sum(attract | repel), 1)


def blocked_matching(block_size: int | None) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    return lambda z, s, mask: sentence_matching(z, s, mask, block_size=block_size)[0]


def bytes_per_device(loss: Callable, batch_size: int, sentences: int, width: int, devices: int) -> int:
    """Arguments, outputs and temporaries of the value and gradient on one of `devices` that share the batch."""
    mesh = jax.make_mesh(
        (devices, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices]
    )
    rows = NamedSharding(mesh, PartitionSpec("data"))
    features = jax.ShapeDtypeStruct((batch_size, sentences, width), jnp.float32)
    mask = jax.ShapeDtypeStruct((batch_size, sentences), jnp.bool_)
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(loss), in_shardings=rows, out_shardings=(NamedSharding(mesh, PartitionSpec()), rows)
        )
        memory = step.lower(features, features, mask).compile().memory_analysis()
    assert memory is not None  # CPU, GPU and TPU compilers all say it
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mg3d bench objectives", description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 1024, 4096], metavar="B", help="patients")
    parser.add_argument("--sentences", type=int, default=32, help="sentences per report (default 32)")
    parser.add_argument("--width", type=int, default=128, help="width of both kinds of features (default 128)")
    parser.add_argument("--block-size", type=int, default=0, help="patients per block; 0 (default) chooses by size")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8], metavar="N", help="devices sharing the batch")
    args = parser.parse_args(argv)
    most = max(args.devices)
    if jax.config.jax_num_cpu_devices < most:  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", most)
    if jax.device_count() < most:
        raise UserError(f"--devices {most}: there are {jax.device_count()} here. On a CPU any number can be simulated.")
    print(f"sentence matching, value and gradient, S = {args.sentences}, width {args.width}, float32")
    print("GiB per device, from the compiler\n")
    print(f"{'patients':>8} {'devices':>8} {'blocked':>10} {'all pairs':>10}")
    for devices in args.devices:
        for batch_size in args.batch_sizes:
            shape = (batch_size, args.sentences, args.width, devices)
            blocked = bytes_per_device(blocked_matching(args.block_size or None), *shape) / GIB
            dense = bytes_per_device(dense_matching, *shape) / GIB
            print(f"{batch_size:>8} {devices:>8} {blocked:>10.3f} {dense:>10.3f}", flush=True)
    return 0
