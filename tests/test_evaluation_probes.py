"""Probes of embeddings against scikit-learn, slow loops and closed forms."""

import itertools
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.probes import (
    ProbeHead,
    class_of,
    few_shot,
    head_of,
    linear,
    linear_probe,
    load_head,
    nearest_neighbours,
    save_head,
)
from mg3d_jax.evaluation.probes.few_patients import subset
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


@pytest.mark.parametrize("count", [1, 7, 40])
def test_nearest_neighbours_are_those_of_scikit_learn(count):
    x, y, patients = embeddings(90)
    y[y < 0] = 0
    test_x = embeddings(25, seed=7)[0]
    found = nearest_neighbours(x, y, patients, test_x, counts=(count,), temperature=0.2)
    unit = [a.astype(np.float64) / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True) for a in (x, test_x)]
    # Between unit vectors the cosine is 1 - distance^2 / 2.
    model = KNeighborsClassifier(count, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.2), algorithm="brute")
    expected = np.stack([model.fit(unit[0], y[:, c]).predict_proba(unit[1])[:, 1] for c in range(3)], axis=1)
    np.testing.assert_allclose(found.scores, expected, atol=1e-9)
    assert found.count == count


def slow_neighbours(x, y, query, count, temperature):
    """One query, volume by volume: what is not known does not count."""
    order = sorted(range(len(x)), key=lambda i: (-(x[i] @ query), i))[:count]
    shares = []
    for column in range(y.shape[1]):
        known = [i for i in order if y[i, column] >= 0]
        among = known or [i for i in range(len(x)) if y[i, column] >= 0]
        weights = [np.exp(x[i] @ query / temperature) if known else 1.0 for i in among]
        shares.append(sum(w * y[i, column] for w, i in zip(weights, among, strict=True)) / sum(weights))
    return shares


def test_neighbours_with_unknown_labels_and_ties():
    x, y, patients = embeddings(40, classes=4)
    x[10:20] = x[:10]  # equal volumes: the first count
    y[y[:, 3] < 0, 3] = 1
    y[5:30, 2] = -1
    found = nearest_neighbours(x, y, patients, x[::3], counts=(6,), temperature=0.1).scores
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    expected = [slow_neighbours(unit, y, query, 6, 0.1) for query in unit[::3]]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_number_of_neighbours_is_the_best_of_the_validation_part():
    x, y, patients = embeddings(120, noise=2.0)
    held = linear.validation_part(patients, 2)
    scores = {
        count: nearest_neighbours(x[~held], y[~held], patients[~held], x[held], counts=(count,)).scores
        for count in (1, 5, 20)
    }
    truth = y[held]
    brier = {
        count: np.mean([np.mean((s[truth[:, c] >= 0, c] - truth[truth[:, c] >= 0, c]) ** 2) for c in range(3)])
        for count, s in scores.items()
    }
    assert nearest_neighbours(x, y, patients, x, seed=2, counts=(1, 5, 20)).count == min(brier, key=brier.get)


def test_subsets_of_a_seed_are_nested_and_of_whole_patients():
    patients = np.repeat([f"p{i}" for i in range(40)], 2)
    for seed in (0, 1):
        parts = [subset(patients, percent, seed) for percent in (1, 5, 10, 100)]
        assert [part.sum() // 2 for part in parts] == [1, 2, 4, 40]
        for small, large in itertools.pairwise(parts):
            assert not np.any(small & ~large)
            assert not set(patients[small]) & set(patients[~small])
    assert not np.array_equal(subset(patients, 10, 0), subset(patients, 10, 1))


def test_few_shot_is_a_probe_of_the_subset_alone():
    x, y, patients = embeddings(200)
    shots = list(few_shot(x, y, patients, x, fractions=(10, 100), seeds=(0, 3)))
    assert [(shot.percent, shot.seed, shot.patients, shot.volumes) for shot in shots] == [
        (10, 0, 10, 20), (10, 3, 10, 20), (100, 0, 100, 200), (100, 3, 100, 200),
    ]  # fmt: skip
    rows = subset(patients, 10, 3)
    alone = linear_probe(x[rows], y[rows], patients[rows], x, seed=3)
    np.testing.assert_array_equal(shots[1].result.scores, alone.scores)
    with pytest.raises(UserError, match="percent above 0"):
        list(few_shot(x, y, patients, x, fractions=(0.0,)))
    one_class = np.eye(3, dtype=np.int8)[np.zeros(200, int)]
    assert list(few_shot(x, one_class, patients, x, fractions=(10,), kind="multi_class")) == []


def test_a_head_on_disk_is_a_linear_layer(tmp_path):
    torch = pytest.importorskip("torch")
    x, y, patients = embeddings(100)
    y[:, 1] = 0
    result = linear_probe(x, y, patients, x)
    head = head_of(result, ("a", "b", "c"), "multi_label", {"run": "RUN", "step": 3})
    save_head(head, tmp_path / "probe.safetensors")
    found = load_head(tmp_path / "probe.safetensors")
    assert found.classes == ("a", "c") and found.kind == "multi_label"
    assert (
        found.facts["run"] == "RUN"
        and found.facts["not_learned"] == ["b"]
        and set(found.facts["penalties"]) == {"a", "c"}
    )
    logits = torch.nn.functional.linear(*(torch.from_numpy(a) for a in (x, found.weight, found.bias))).numpy()
    np.testing.assert_allclose(logits, result.scores[:, [0, 2]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.probabilities(3 * x), 1 / (1 + np.exp(-result.scores[:, [0, 2]])), atol=1e-4)
    softmax = ProbeHead(found.weight, found.bias, found.classes, "multi_class").probabilities(x)
    np.testing.assert_allclose(softmax.sum(axis=1), 1, atol=1e-6)


def test_what_is_no_head(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "text").write_text("x")
    save_file({"weight": np.zeros((2, 3), "f")}, tmp_path / "other")
    for name, says in (("missing", "cannot be read"), ("text", "cannot be read"), ("other", "no head of a probe")):
        with pytest.raises(UserError, match=says):
            load_head(tmp_path / name)
