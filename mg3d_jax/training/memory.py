"""Will the step fit into the memory of a device, and what to change by how much where it does not.

What the step needs is known when it is compiled, before it runs; what there is, the device says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from mg3d_jax import sharding
from mg3d_jax.errors import UserError
from mg3d_jax.training.clock import GIB
from mg3d_jax.training.state import Setup

SPARE = 0.08  # of a device's memory: what the driver, the libraries and fragmentation take


@dataclass(frozen=True)
class StepMemory:
    """Bytes per device of the compiled step. `arguments`: state and batch; `temporaries` grow with the rows of a batch."""

    arguments: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def step_memory(compiled: jax.stages.Compiled) -> StepMemory | None:
    """As the compiler plans it; None where it does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return StepMemory(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes)


def device_limit() -> int | None:
    """Bytes that JAX may use of the smallest device of this process; None where devices do not say (CPU)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return min((int(limit) for limit in limits if limit), default=None)


def check_fits(setup: Setup, needs: StepMemory | None, limit: int | None) -> None:
    """`UserError` with advice where the step needs more than there is."""
    if needs is not None and limit is not None and needs.total > limit:
        raise UserError(f"the step does not fit into the memory of a device: {advice(setup, needs, limit)}")


@contextmanager
def explained(setup: Setup, needs: StepMemory | None = None) -> Iterator[None]:
    """What XLA raises when memory runs out, in compiling or running, becomes a `UserError` with advice."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
            raise
        limit = device_limit()
        more = (
            advice(setup, needs, limit)
            if needs and limit
            else "use a smaller data.batch_size or a larger optimizer.accumulation"
        )
        raise UserError(f"the memory of a device is used up ({text.strip().splitlines()[0][:200]}): {more}") from error


def advice(setup: Setup, needs: StepMemory, limit: int) -> str:
    """What the step needs, what there is, and each change that would make it fit by itself, with its number.

    Temporaries are taken to grow with the rows that a device computes at once: nearly so, as those are activations.
    """
    config, usable = setup.config, limit * (1 - SPARE)
    text = (
        f"it needs {needs.total / GIB:.2f} GiB (state and batch {needs.arguments / GIB:.2f}, temporaries "
        f"{needs.temporaries / GIB:.2f}), there are {limit / GIB:.2f} GiB, of which {SPARE:.0%} should stay free. "
    )
    shards, pieces = sharding.batch_shards(setup.mesh), config.optimizer.accumulation
    rows = config.data.batch_size // (shards * pieces)  # of a device at once
    fitting = math.floor(rows * (usable - needs.arguments) / max(needs.temporaries, 1))
    if fitting >= 1:
        return text + "Any one of these: " + "; ".join(_for_activations(setup, rows, min(fitting, rows)))
    one, changes = needs.temporaries / rows, []
    if needs.arguments + one > usable > one:
        parts = math.ceil(needs.arguments / (usable - one))
        changes.append(f"mesh.fsdp={setup.mesh.shape['fsdp'] * parts}, on as many devices, which splits the state")
    if config.model.remat != "full":
        changes.append(f"model.remat=full (now {config.model.remat})")
    changes.append("a smaller model.volume_size or larger patches")
    return text + f"One patient at once, {one / GIB:.2f} GiB, does not fit either. What helps: " + "; ".join(changes)


def _for_activations(setup: Setup, rows: int, fitting: int) -> list[str]:
    """Changes after which a device computes `fitting` rows at once instead of `rows`."""
    config, shards = setup.config, sharding.batch_shards(setup.mesh)
    pieces, changes = config.optimizer.accumulation, []
    per_device = rows * pieces
    if possible := [n for n in range(pieces + 1, per_device + 1) if per_device % n == 0 and per_device // n <= fitting]:
        same = "" if config.optimizer.gradient_cache else ", with optimizer.gradient_cache=true for the same negatives"
        changes.append(f"optimizer.accumulation={possible[0]} (now {pieces}){same}")
    changes.append(f"data.batch_size={fitting * shards * pieces} (now {config.data.batch_size})")
    if config.model.remat != "full":
        changes.append(f"model.remat=full (now {config.model.remat}), which computes activations twice")
    times = math.ceil(rows / fitting)
    changes.append(f"{times} times as many devices ({times * setup.mesh.devices.size} in mesh.data)")
    return changes
