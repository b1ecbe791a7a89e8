"""Zero-shot and retrieval metrics against closed forms and slow counts, and the field's known evaluation bugs."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mg3d_jax.evaluation import retrieval, zero_shot


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def test_probability_is_the_softmax_over_the_two_prompts():
    rng = np.random.default_rng(0)
    volumes, prompts = unit(rng.normal(size=(5, 8))), unit(rng.normal(size=(6, 8)))
    ours = zero_shot.probabilities(volumes, prompts, logit_scale=7.0)
    for v in range(5):
        for c in range(3):
            logits = 7.0 * np.array([volumes[v] @ prompts[c], volumes[v] @ prompts[3 + c]])
            expected = np.exp(logits)[0] / np.exp(logits).sum()
            assert ours[v, c] == pytest.approx(expected)


def test_prompts_are_those_of_ct_clip():
    assert zero_shot.prompts(["Emphysema"]) == [["Emphysema is present."], ["Emphysema is not present."]]


def test_auroc_skips_unknown_labels_and_missing_classes():
    rng = np.random.default_rng(1)
    labels = rng.integers(-1, 2, (60, 3)).astype(np.int8)
    labels[:, 2] = 1
    scores = rng.random((60, 3))
    result = zero_shot.evaluate(labels, scores, ["a", "b", "c"], np.arange(60), draws=50)
    expected = [roc_auc_score(labels[labels[:, i] >= 0, i], scores[labels[:, i] >= 0, i]) for i in range(2)]
    assert [result["auroc/a"], result["auroc/b"]] == pytest.approx(expected)
    assert result["auroc_macro"] == pytest.approx(np.mean(expected))
    assert result["classes_without_both_outcomes"] == ["c"]


def test_interval_covers_the_truth_at_its_level_and_knows_about_patients():
    """Scores with a known AUROC; two identical scans per patient must not narrow the interval."""
    rng, truth, covered, trials = np.random.default_rng(2), 0.7602, 0, 40  # P(N(1,1) > N(0,1)) = Phi(1/sqrt 2)
    for _ in range(trials):
        labels = np.repeat(rng.integers(0, 2, 50), 2)[:, None].astype(np.int8)
        scores = np.repeat(rng.normal(size=50), 2)[:, None] + labels
        low, high = zero_shot.evaluate(labels, scores, ["x"], np.repeat(np.arange(50), 2), draws=100)["auroc_macro_95"]
        covered += low <= truth <= high
    assert 0.85 <= covered / trials <= 1.0


def slow_recall(similarity, correct, k):
    """Order candidates by similarity, wrong ones first among equals, and look at the first k."""
    hits = 0
    for row, good in zip(similarity, correct, strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i], good[i]))
        hits += any(good[i] for i in order[:k])
    return hits / len(similarity)


def test_recall_equals_a_slow_count_in_both_directions():
    rng = np.random.default_rng(3)
    report_ids = np.arange(20) * 7
    of_volume = np.concatenate([report_ids, rng.choice(report_ids, 11)])  # 11 second reconstructions
    reports = unit(rng.normal(size=(20, 6)))
    volumes = unit(reports[of_volume // 7] + 0.7 * rng.normal(size=(31, 6)))
    result = retrieval.recall(volumes, of_volume, reports, report_ids, ks=(1, 3, 10))
    correct = report_ids[:, None] == of_volume[None, :]
    for k in (1, 3, 10):
        assert result[f"report_to_volume/recall@{k}"] == pytest.approx(slow_recall(reports @ volumes.T, correct, k))
        assert result[f"volume_to_report/recall@{k}"] == pytest.approx(slow_recall(volumes @ reports.T, correct.T, k))


def test_a_duplicate_report_is_not_a_miss():
    """Two reconstructions share a report: retrieving the other one is correct (public code counts it as wrong)."""
    report = unit(np.array([[1.0, 0.0], [0.0, 1.0]]))
    volumes = unit(np.array([[0.9, 0.1], [1.0, 0.0], [0.0, 1.0]]))
    result = retrieval.recall(volumes, np.array([5, 5, 6]), report, np.array([5, 6]), ks=(1,))
    assert result["report_to_volume/recall@1"] == 1.0 and result["volume_to_report/recall@1"] == 1.0


def test_ties_count_against_a_constant_model():
    constant = np.ones((10, 1))
    result = retrieval.recall(constant, np.arange(10), constant, np.arange(10), ks=(1, 5))
    assert result["report_to_volume/recall@5"] == 0.0


def test_values_at_one_k_do_not_depend_on_the_other_ks():
    """CT-CLIP's running list is never reset between the values of k."""
    rng = np.random.default_rng(4)
    volumes, reports = unit(rng.normal(size=(30, 4))), unit(rng.normal(size=(30, 4)))
    ids = np.arange(30)
    alone = retrieval.recall(volumes, ids, reports, ids, ks=(10,))["report_to_volume/recall@10"]
    assert retrieval.recall(volumes, ids, reports, ids, ks=(1, 5, 10))["report_to_volume/recall@10"] == alone


def test_chance_level_is_what_random_embeddings_reach():
    rng, ids = np.random.default_rng(5), np.repeat(np.arange(15), 2)
    found = []
    for _ in range(300):
        volumes, reports = unit(rng.normal(size=(30, 5))), unit(rng.normal(size=(15, 5)))
        found.append(retrieval.recall(volumes, ids, reports, np.arange(15), ks=(5,)))
    for direction in ("report_to_volume", "volume_to_report"):
        mean = np.mean([f[f"{direction}/recall@5"] for f in found])
        assert mean == pytest.approx(found[0][f"{direction}/chance@5"], abs=0.02)
