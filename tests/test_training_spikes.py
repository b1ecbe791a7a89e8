"""Losses that jump are named with the records of their batch."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from mg3d_jax.training import spikes
from mg3d_jax.training.spikes import LossSpikes


def _spikes(workdir: Path, first: int = 0) -> LossSpikes:
    found = LossSpikes()
    found.resume(workdir, first, lambda step: [f"train: v{step}a", f"train: v{step}b", f"train: v{step}c"])
    return found


def test_a_spike_is_named_with_its_records_and_noise_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("mg3d_jax"), "propagate", True)
    rng, seen = np.random.default_rng(0), _spikes(tmp_path)
    falling = 4 * np.exp(-np.arange(2000) / 500) + 1 + 0.05 * rng.normal(size=2000)
    falling[[900, 901, 1500]] += 2
    found = [step for step, loss in enumerate(falling, start=1) if seen.see(step, float(loss))]
    assert found == [901, 902, 1501] and seen.total == 3
    lines = [json.loads(line) for line in (tmp_path / spikes.SPIKES_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == found and lines[0]["records"][2] == "train: v901c"
    assert len(set(caplog.messages)) == 2 and "train: v1501a; train: v1501b; ..." in caplog.text


def test_what_came_after_a_checkpoint_is_dropped_and_the_file_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spikes, "MOST", 3)
    first = _spikes(tmp_path)
    for step in range(1, 200):
        first.see(step, 1.0 + 9 * (step % 20 == 0))
    lines = (tmp_path / spikes.SPIKES_FILE).read_text().splitlines()
    assert first.total == 8 and len(lines) == 3
    resumed = _spikes(tmp_path, first=70)
    assert resumed.total == 2 and len((tmp_path / spikes.SPIKES_FILE).read_text().splitlines()) == 2


def test_a_new_level_is_no_row_of_spikes_for_ever(tmp_path: Path) -> None:
    seen = _spikes(tmp_path)
    found = [seen.see(step, 1.0 if step < 100 else 3.0) for step in range(300)]
    assert 1 <= sum(found) <= spikes.WINDOW
