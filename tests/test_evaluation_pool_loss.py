"""The contrastive loss over fixed pools: against loops, whatever the order, and what chance and perfect models have."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from support import embedded

from mg3d_jax.evaluation import pool_loss
from mg3d_jax.evaluation.pool_loss import PoolLoss, PoolLossOptions


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def found(patients=48, noise=1.0, seed=0, width=8):
    """Volumes that are their reports with noise."""
    rng = np.random.default_rng(seed)
    reports = unit(rng.normal(size=(patients, width)))
    volumes = unit(reports + noise * unit(rng.normal(size=(patients, width))))
    return dataclasses.replace(embedded(volumes), reports=reports)


def slow(similarity, scale):
    """Mean over a pool, by loops."""
    total, n = 0.0, len(similarity)
    for i in range(n):
        rows = math.log(sum(math.exp(scale * similarity[i, j]) for j in range(n)))
        columns = math.log(sum(math.exp(scale * similarity[j, i]) for j in range(n)))
        total += (rows + columns) / 2 - scale * similarity[i, i]
    return total / n


def test_it_is_infonce_at_the_best_temperature_of_the_other_half():
    data = found()
    pools = pool_loss._pools(data, 12)
    assert pools.size == 12 and len(pools.half) == 4 and sorted(pools.volumes.ravel()) == list(range(48))
    similarity = [
        data.volumes[v].astype(float) @ data.reports[r].T for v, r in zip(pools.volumes, pools.reports, strict=True)
    ]
    halves = [[similarity[k] for k in range(4) if pools.half[k] == half] for half in (0, 1)]
    best = [
        minimize_scalar(
            lambda log, of=of: np.mean([slow(one, math.exp(log)) for one in of]), bounds=(0, 9), method="bounded"
        )
        for of in halves
    ]
    expected = np.mean([slow(one, math.exp(best[1 - half].x)) for half in (0, 1) for one in halves[half]])
    result = PoolLoss(PoolLossOptions(pool=12)).full(data)
    assert result["loss"] == pytest.approx(expected, abs=1e-5)
    assert result["loss"] == pytest.approx(np.mean([result[way] for way in pool_loss.WAYS]))
    assert result["chance"] == math.log(12) and result["patients"] == 48


def test_order_and_further_volumes_do_not_matter():
    data, measure = found(), PoolLoss(PoolLossOptions(pool=12)).metrics
    order = np.random.default_rng(1).permutation(48)
    turned = dataclasses.replace(data.rows(order), reports=data.reports[::-1], report_ids=data.report_ids[::-1])
    assert measure(turned) == pytest.approx(measure(data))
    twice = data.rows(np.concatenate([np.arange(48), np.arange(48)]))  # second reconstructions, later by name
    names = np.concatenate([data.volume_ids, np.char.add(data.volume_ids, "_2")])
    noisy = np.concatenate([data.volumes, data.volumes[::-1]])
    assert measure(dataclasses.replace(twice, volume_ids=names, volumes=noisy)) == pytest.approx(measure(data))


def test_chance_noise_and_size():
    measure = PoolLoss(PoolLossOptions(pool=16)).metrics
    blind = measure(found(patients=256, noise=1e6))
    assert blind["pool_loss"] == pytest.approx(math.log(16), abs=3 * blind["pool_loss/error"] + 0.02)
    assert measure(found(patients=256, noise=0.1))["pool_loss"] < 0.2
    # The standard error is that of other patients drawn again.
    again = [measure(found(patients=64, seed=seed)) for seed in range(40)]
    spread = np.std([one["pool_loss"] for one in again])
    assert 0.6 < np.mean([one["pool_loss/error"] for one in again]) / spread < 1.6
    assert measure(found(patients=20))["pool_loss/pool"] == 10  # fewer than were asked for, and said
    section = PoolLoss().section(PoolLoss().full(found(patients=64, noise=1e6)))
    assert "not below chance" in section.warnings[0]


def test_patients_without_a_report_and_shared_reports_are_left_out():
    data = found(patients=8)
    reports = data.volume_reports.copy()
    reports[0], reports[1] = "", reports[2]
    rows = pool_loss._pairs(dataclasses.replace(data, volume_reports=reports))[0]
    assert sorted(rows) == [1, 3, 4, 5, 6, 7]
    few = dataclasses.replace(data, volume_reports=np.array([""] * 5 + [f"r{k}" for k in range(5, 8)]))
    assert PoolLoss().metrics(few) == {} and "at least 4 patients" in PoolLoss().lacks(few)
