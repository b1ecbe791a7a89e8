"""Draws of patients as weights: what they say is what copying the drawn volumes says; intervals cover at their level."""

import numpy as np
import pytest

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import bootstrap, classification_metrics
from mg3d_jax.evaluation.bootstrap import PatientDraws, interval


def copies(weights):
    """The row numbers of a draw, each as often as it counts."""
    return np.repeat(np.arange(len(weights)), weights)


@pytest.fixture
def patients():
    return np.random.default_rng(0).permutation(np.repeat([f"p{i}" for i in range(40)], np.arange(40) % 3 + 1))


def test_a_draw_is_patients_with_all_their_volumes(patients):
    weights = PatientDraws(patients, 30).weights(patients)
    assert weights.shape == (31, len(patients)) and (weights[0] == 1).all()
    for row in weights:
        by_patient = {p: set(row[patients == p].tolist()) for p in set(patients)}
        assert all(len(times) == 1 for times in by_patient.values())
        assert sum(times.pop() for times in by_patient.values()) == 40
    assert len({row.tobytes() for row in weights}) == 31


def test_the_order_of_volumes_changes_no_draw(patients):
    order = np.random.default_rng(1).permutation(len(patients))
    weights = PatientDraws(patients, 5).weights(patients)
    np.testing.assert_array_equal(PatientDraws(patients[order], 5).weights(patients[order]), weights[:, order])
    np.testing.assert_array_equal(PatientDraws(patients, 5).weights(patients[:7]), weights[:, :7])
    with pytest.raises(KeyError, match="stranger"):
        PatientDraws(patients, 5).weights(np.array(["p1", "stranger"]))
    with pytest.raises(UserError, match="no patient"):
        PatientDraws(np.zeros(0, str))


def test_mean_and_median_are_those_of_copies(patients, monkeypatch):
    monkeypatch.setattr(bootstrap, "BLOCK", 200)  # several blocks
    values = np.random.default_rng(2).integers(0, 9, (len(patients), 2)).astype(float)
    weights = PatientDraws(patients, 25).weights(patients)
    weights[3], weights[4, 1:] = 0, 0
    weights[4, 0] = 2
    means, medians = bootstrap.weighted_mean(values, weights), bootstrap.weighted_median(values[:, 0], weights)
    assert np.isnan(means[3]).all() and np.isnan(medians[3])
    for row in [*range(3), *range(4, 26)]:
        drawn = values[copies(weights[row])]
        assert means[row] == pytest.approx(drawn.mean(axis=0))
        assert medians[row] == np.median(drawn[:, 0])
    assert bootstrap.weighted_mean(values[:, 1], weights)[7] == pytest.approx(means[7, 1])


def test_the_interval_is_of_the_draws_alone():
    values = np.r_[99.0, np.arange(101), np.nan]
    assert interval(values) == pytest.approx([2.5, 97.5])
    assert np.isnan(interval(np.array([1.0, np.nan]))).all()


def test_the_interval_covers_at_its_level_although_volumes_come_in_pairs():
    rng, covered, width = np.random.default_rng(3), 0, []
    for _ in range(100):
        patients, values = np.repeat(np.arange(50), 2), np.repeat(rng.normal(size=50), 2)
        low, high = interval(bootstrap.weighted_mean(values, PatientDraws(patients, 200).weights(patients)))
        covered += low <= 0 <= high
        width.append(high - low)
    assert 88 <= covered <= 99
    assert np.mean(width) == pytest.approx(2 * 1.96 / np.sqrt(50), rel=0.1)  # and not over sqrt(100)


def test_one_patient_has_no_interval():
    """Not one of length 0: it says nothing of other patients."""
    patients = np.array(["p"] * 4)
    weights = PatientDraws(patients, 20).weights(patients)
    for values in (
        bootstrap.weighted_mean(np.arange(4.0), weights),
        bootstrap.weighted_median(np.arange(4.0), weights),
        classification_metrics.auroc(np.array([0, 1, 0, 1]), np.arange(4.0), weights),
    ):
        assert not np.isnan(values[0]) and np.isnan(interval(values)).all()
