"""Classification metrics of all draws at once against scikit-learn on the drawn volumes themselves."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from mg3d_jax.evaluation import bootstrap
from mg3d_jax.evaluation import classification_metrics as ours
from mg3d_jax.evaluation.bootstrap import PatientDraws

DRAWS = 40


@pytest.fixture(params=["many ties", "no ties"])
def case(request, monkeypatch):
    """Labels with unknown ones, probabilities, and weights of draws; the work is split into several blocks."""
    monkeypatch.setattr(bootstrap, "BLOCK", 1000)
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(70), rng.integers(1, 4, 70))
    labels = rng.integers(-1, 2, len(patients)).astype(np.int8)
    scores = np.clip(0.5 + 0.15 * labels + rng.normal(0, 0.25, len(patients)), 0, 1)
    if request.param == "many ties":
        scores = np.round(scores * 10) / 10
    return labels, scores, PatientDraws(patients, DRAWS).weights(patients)


def drawn(case):
    """Known labels and scores of each draw, as copies."""
    labels, scores, weights = case
    for row in weights:
        rows = np.repeat(np.arange(len(labels)), np.where(labels >= 0, row, 0))
        yield labels[rows], scores[rows]


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        (ours.auroc, sklearn_metrics.roc_auc_score),
        (ours.average_precision, sklearn_metrics.average_precision_score),
        (ours.brier, sklearn_metrics.brier_score_loss),
    ],
)
def test_areas_and_brier_score(case, metric, reference):
    expected = [reference(*one) for one in drawn(case)]
    np.testing.assert_allclose(metric(*case), expected, rtol=0, atol=1e-12)
    assert metric(*case[:2]) == pytest.approx(expected[0])


def test_what_a_threshold_decides(case):
    labels, scores, weights = case
    found = ours.counts(labels, scores, 0.6, weights)
    for i, (truth, score) in enumerate(drawn(case)):
        called = score >= 0.6
        assert found.f1[i] == pytest.approx(sklearn_metrics.f1_score(truth, called))
        weighted = sklearn_metrics.f1_score(truth, called, average="weighted")
        assert found.f1_both_outcomes[i] == pytest.approx(weighted)
        assert found.balanced_accuracy[i] == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, called))
        assert found.sensitivity[i] == pytest.approx(sklearn_metrics.recall_score(truth, called))
        assert found.specificity[i] == pytest.approx(sklearn_metrics.recall_score(1 - truth, ~called))


def test_roc_curve(case):
    found = ours.roc_curve(*case)
    assert found.shape == (1 + DRAWS, ours.ROC_POINTS)
    for curve, (truth, score) in zip(found, drawn(case), strict=True):
        false, true, _ = sklearn_metrics.roc_curve(truth, score, drop_intermediate=False)
        np.testing.assert_allclose(curve, np.interp(np.linspace(0, 1, 101), false, true), atol=1e-12)
    np.testing.assert_allclose(ours.roc_curve(*case[:2]), found[0])


def test_calibration(case):
    found, errors = ours.reliability(*case), ours.calibration_error(*case)
    for i, (truth, score) in enumerate(drawn(case)):
        rows = [np.minimum((score * 10).astype(int), 9) == b for b in range(10)]
        slow = sum(row.mean() * abs(score[row].mean() - truth[row].mean()) for row in rows if row.any())
        assert errors[i] == pytest.approx(slow)
        assert found["count"][i].sum() == len(truth)
    if len(np.unique(case[1])) > 50:  # scikit-learn puts a score on an edge into the bin below
        truth, score = next(drawn(case))
        observed, probability = calibration_curve(truth, score, n_bins=10)
        filled = found["count"][0] > 0
        np.testing.assert_allclose(found["observed"][0][filled], observed)
        np.testing.assert_allclose(found["probability"][0][filled], probability)


def test_a_class_without_both_outcomes_is_undefined_and_out_of_the_mean():
    scores, weights = np.array([0.1, 0.7, 0.9]), np.array([[1, 1, 1], [2, 0, 1]], np.uint8)
    for labels in (np.array([1, 1, -1]), np.array([0, -1, 0]), np.array([-1, -1, -1])):
        for metric in (ours.auroc, ours.average_precision, ours.brier, ours.calibration_error):
            assert np.isnan(metric(labels, scores)), metric
            assert np.isnan(metric(labels, scores, weights)).all()
        one = ours.counts(labels, scores, 0.5, weights)
        for rate in (one.f1, one.f1_both_outcomes, one.balanced_accuracy, one.sensitivity, one.specificity):
            assert np.isnan(rate).all()
        assert np.isnan(ours.roc_curve(labels, scores, weights)).all()
    only_in_the_first = ours.auroc(np.array([0, 1, -1]), scores, weights)
    assert only_in_the_first[0] == 1 and np.isnan(only_in_the_first[1])
    values = np.array([[0.5, np.nan, np.nan], [0.7, 0.9, np.nan]])
    np.testing.assert_allclose(ours.macro(values), [0.6, 0.9, np.nan])


def test_scores_that_are_no_numbers_count_as_wrong():
    nan, labels = np.nan, np.array([0, 0, 1, 1])
    assert ours.auroc(labels, np.array([0.1, 0.2, 0.8, nan])) == pytest.approx(0.5)
    assert ours.auroc(labels, np.array([nan, 0.2, 0.8, 0.9])) == pytest.approx(0.5)
    assert ours.average_precision(labels, np.array([nan, 0.2, 0.8, 0.9])) == pytest.approx((1 / 2 + 2 / 3) / 2)
    found = ours.counts(labels, np.array([nan, 0.2, nan, 0.9]), 0.5)
    assert (found.false_present[0], found.false_absent[0]) == (1, 1)
    assert ours.brier(labels, np.array([nan, 0.0, 1.0, nan])) == 0.5


def test_a_thousand_draws_of_eighteen_classes_at_once():
    """3,039 volumes of 1,304 patients, as CT-RATE's validation set has."""
    rng = np.random.default_rng(1)
    patients = np.r_[np.arange(1304), rng.integers(0, 1304, 3039 - 1304)]
    labels, scores = rng.random((18, 3039)) < 0.2, rng.random((18, 3039))
    weights = PatientDraws(patients, 1000).weights(patients)
    areas = np.stack([ours.auroc(labels[c].astype(int), scores[c], weights) for c in range(18)])
    assert ours.macro(areas).shape == (1001,)
