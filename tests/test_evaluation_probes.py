"""Probes of embeddings against scikit-learn, slow loops and closed forms."""

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.probes import class_of, linear, linear_probe
from mg3d_jax.evaluation.probes.logistic import fit_binary, fit_multinomial


def embeddings(n, classes=3, width=12, seed=0, noise=1.0):
    """Unit vectors that know of their labels, two volumes a patient, and a few unknown labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, classes)).astype(np.int8)
    directions = np.random.default_rng(99).normal(size=(classes, width))
    x = (labels - 0.5) @ directions + noise * rng.normal(size=(n, width))
    labels[rng.random(labels.shape) < 0.1] = -1
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32), labels, np.array([f"p{i // 2}" for i in range(n)])


def sklearn_fit(x, y, penalty):
    model = LogisticRegression(C=penalty, tol=1e-10, max_iter=10_000)
    return model.fit(x, y)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0, 100.0])
def test_binary_problems_are_those_of_scikit_learn(penalty):
    x, labels, _ = embeddings(150)
    x = StandardScaler().fit_transform(x).astype(np.float64)
    found = fit_binary(x, labels, np.full(3, penalty), tolerance=1e-9)
    for column in range(3):
        known = labels[:, column] >= 0
        theirs = sklearn_fit(x[known], labels[known, column], penalty)
        np.testing.assert_allclose(found[:-1, column], theirs.coef_[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[-1, column], theirs.intercept_[0], rtol=1e-4, atol=1e-6)


def test_separable_classes_and_more_features_than_rows():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(20, 40))
    labels = (x[:, :2] > 0).astype(np.int8)
    found = fit_binary(x, labels, np.array([10.0, 1e-3]), tolerance=1e-9)
    for column, penalty in enumerate((10.0, 1e-3)):
        theirs = sklearn_fit(x, labels[:, column], penalty)
        np.testing.assert_allclose(found[:-1, column], theirs.coef_[0], rtol=1e-3, atol=1e-5)


def test_the_softmax_is_that_of_scikit_learn():
    x, _, _ = embeddings(200)
    x = StandardScaler().fit_transform(x).astype(np.float64)
    classes = np.random.default_rng(5).integers(0, 3, 200)
    found, theirs = fit_multinomial(x, classes, 3, 0.5), sklearn_fit(x, classes, 0.5)
    logits = x @ found[:-1] + found[-1]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(x), atol=1e-4)


def slow_probe(x, y, patients, test_x, seed):
    """The probe class by class, with scikit-learn."""
    held = linear.validation_part(patients, seed)
    scaler = StandardScaler().fit(x.astype(np.float64))
    z, scores, chosen = scaler.transform(x.astype(np.float64)), [], []
    for column in range(y.shape[1]):
        known, losses = y[:, column] >= 0, []
        for penalty in linear.PENALTIES:
            model = sklearn_fit(z[known & ~held], y[known & ~held, column], penalty)
            losses.append(log_loss(y[known & held, column], model.predict_proba(z[known & held])[:, 1], labels=[0, 1]))
        chosen.append(linear.PENALTIES[int(np.argmin(losses))])
        model = sklearn_fit(z[known], y[known, column], chosen[-1])
        scores.append(model.decision_function(scaler.transform(test_x.astype(np.float64))))
    return np.stack(scores, axis=1), chosen


def test_linear_probe_is_scikit_learn_with_the_same_split():
    x, y, patients = embeddings(240, noise=2.0)
    test_x = embeddings(40, seed=1, noise=2.0)[0]
    result = linear_probe(x, y, patients, test_x, seed=4)
    expected, chosen = slow_probe(x, y, patients, test_x, seed=4)
    assert result.penalties.tolist() == chosen and len(set(chosen)) >= 1
    np.testing.assert_allclose(result.scores, expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(test_x @ result.weight + result.bias, result.scores, atol=1e-6)


def test_the_validation_part_is_a_fifth_of_the_patients_and_whole_patients():
    patients = np.repeat([f"p{i}" for i in range(50)], 3)
    held = linear.validation_part(patients, 0)
    assert held.sum() == 30 and not set(patients[held]) & set(patients[~held])
    assert not np.array_equal(held, linear.validation_part(patients, 1))
    assert not linear.validation_part(np.array(["a", "a"]), 0).any()


def test_a_class_of_one_outcome_is_not_learned_and_scores_all_alike():
    x, y, patients = embeddings(100)
    y[:, 1] = np.where(y[:, 1] < 0, -1, 0)
    result = linear_probe(x, y, patients, x)
    assert result.not_learned == (1,) and len(np.unique(result.scores[:, 1].round(9))) == 1
    assert np.isfinite(result.scores).all() and result.scores[0, 1] < 0


def test_a_class_that_the_validation_part_cannot_decide_follows_the_others():
    x, y, patients = embeddings(100)
    held = linear.validation_part(patients, 0)
    y[held, 0] = -1
    result = linear_probe(x, y, patients, x)
    assert result.penalties[0] in result.penalties[1:]
    one_patient = linear_probe(x, y, np.zeros(100, str), x)
    assert set(one_patient.penalties) == {linear.UNDECIDED}


def test_multi_class_probe():
    x, _, patients = embeddings(300, width=8)
    classes = np.argmax(x[:, :3], axis=1)
    y = np.eye(4, dtype=np.int8)[classes]
    y[0], y[1] = 1, -1  # several present, none known: no class
    assert class_of(y)[:2].tolist() == [-1, -1]
    result = linear_probe(x, y, patients, x, kind="multi_class")
    assert result.not_learned == (3,) and np.all(result.scores[:, 3] == -np.inf)
    assert np.mean(result.scores.argmax(axis=1)[2:] == classes[2:]) > 0.9
    assert len(set(result.penalties)) == 1
    with pytest.raises(UserError, match="at least two classes"):
        linear_probe(x, np.eye(4, dtype=np.int8)[np.zeros(300, int)], patients, x, kind="multi_class")


def test_wrong_inputs_are_named():
    x, y, patients = embeddings(20)
    bad = x.copy()
    bad[3, 0] = np.nan
    for arguments, says in (
        ((x[:0], y[:0], patients[:0], x), "there are none"),
        ((x, y[:5], patients, x), "do not fit"),
        ((x, y, patients, x[:, :4]), "do not fit"),
        ((bad, y, patients, x), "1 of the 20 training embeddings"),
        ((x, y, patients, bad), "1 of the 20 evaluated embeddings"),
    ):
        with pytest.raises(UserError, match=says):
            linear_probe(*arguments)
    with pytest.raises(UserError, match="choose one of multi_label, multi_class"):
        linear_probe(x, y, patients, x, kind="regression")


def test_no_warning_of_numbers():
    x, y, patients = embeddings(60, noise=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe(x, y, patients, x)
