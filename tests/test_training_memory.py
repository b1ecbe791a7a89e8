"""What does not fit into the memory of a device is said before the first step, with changes that make it fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from support import SPECIAL, random_batch, tiny_builder, with_plain_towers

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.config import Config
from mg3d_jax.errors import UserError
from mg3d_jax.training import memory
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib
from mg3d_jax.training.loop import Trainer
from mg3d_jax.training.memory import GIB, StepMemory


def _setup(**options: Any) -> state_lib.Setup:
    config = config_lib.typed(with_plain_towers(tiny_builder(**options)))
    return state_lib.build(config, 400, sharding.make_mesh(config.mesh), steps=10, records=24)


def _needs(setup: state_lib.Setup, config: Config) -> StepMemory:
    found = memory.step_memory(step_lib.train_step(setup, SPECIAL).compile(setup.abstract, random_batch(config, 400)))
    assert found is not None
    return found


def test_advice_that_is_followed_makes_it_fit() -> None:
    """By the compiler, for a volume of some size: its activations are what grows with the batch."""
    options = {"data__batch_size": 64, "model__volume_size": (32, 32, 32)}
    setup = _setup(**options)
    needs = _needs(setup, setup.config)
    limit = needs.arguments + int(0.6 * needs.temporaries)
    text = memory.advice(setup, needs, limit)
    pieces, batch = (int(re.findall(rf"{key}=(\d+)", text)[0]) for key in ("optimizer.accumulation", "data.batch_size"))
    assert pieces > 1 and batch < 64
    smaller = _setup(**options | {"data__batch_size": batch})
    assert _needs(smaller, smaller.config).total <= limit
    memory.check_fits(setup, needs, needs.total)
    with pytest.raises(UserError, match=r"does not fit into the memory of a device: it needs .* GiB"):
        memory.check_fits(setup, needs, limit)


def test_a_state_that_is_too_large_is_split_and_a_patient_that_is_too_large_made_smaller() -> None:
    setup = _setup()
    text = memory.advice(setup, StepMemory(100 * GIB, 8 * GIB), 80 * GIB)
    assert "there are 80.00 GiB" in text and "mesh.fsdp=2," in text
    text = memory.advice(setup, StepMemory(1 * GIB, 100 * GIB), 80 * GIB)
    assert "One patient at once, 100.00 GiB" in text and "fsdp" not in text and "model.volume_size" in text


def test_what_runs_out_at_run_time_is_explained() -> None:
    setup = _setup()
    with (
        pytest.raises(UserError, match=r"memory of a device is used up .*optimizer\.accumulation"),
        memory.explained(setup),
    ):
        jnp.zeros(2**45, jnp.float32).block_until_ready()
    with pytest.raises(ValueError, match="other"), memory.explained(setup):
        raise ValueError("other")


def test_a_run_that_does_not_fit_ends_before_its_first_step(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "device_limit", lambda: 250_000)
    config = config_lib.typed(with_plain_towers(tiny_builder(tiny_data["train"])))
    with pytest.raises(UserError, match=r"does not fit .* data\.batch_size|does not fit"):
        Trainer(config, tmp_path).run()
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").read_text()
