"""Zero-shot classification: prompts, scores and thresholds of each protocol by hand, metrics against scikit-learn, and the
sentences that say why a number is low."""

import dataclasses
import json
import re

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.linear_model import LogisticRegression

from mg3d_jax.charts import svg
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import baselines, scoring
from mg3d_jax.evaluation.base import Embedded, Prompts
from mg3d_jax.evaluation.bootstrap import PatientDraws
from mg3d_jax.evaluation.class_sets import CLASS_SETS, classes_of, protocol_name
from mg3d_jax.evaluation.prompts import PROMPT_SETS, by_general_pattern, prompts_of
from mg3d_jax.evaluation.zero_shot import ZeroShot, ZeroShotOptions

NAMES = ("a", "b", "c", "all present")
PREFIX = "zero_shot/classes=labels_4/prompts=ct_clip/score=softmax/"


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def embedded(sign=1.0, signal=1.0, seed=0, patients=150, names=NAMES, **changes):
    """Findings that lie in the volumes by `signal`, and prompts that name them; the pair says so by `sign`."""
    rng, k = np.random.default_rng(seed), 24
    of = np.repeat(np.arange(patients), rng.integers(1, 3, patients))
    labels = rng.integers(0, 2, (patients, len(names))).astype(np.int8)[of]
    labels[rng.random(labels.shape) < 0.1] = -1
    labels[:, -1] = np.where(labels[:, -1] < 0, -1, 1)
    findings, denial = rng.normal(size=(2, len(names), k))
    volumes = signal * (labels == 1) @ findings + rng.normal(size=(len(of), k)) * 2
    pair = np.stack([findings, (1 - 2 * sign) * findings + 0.2 * denial])
    prompts = {name: Prompts(names, unit(pair)) for name in ("ct_clip", "bare")}
    ids = np.array([f"v{i}" for i in range(len(of))])
    nothing = np.zeros((0, k), np.float32)
    found = Embedded(
        unit(volumes), ids, ids, np.array([f"p{i}" for i in of]), ids, labels, names, nothing, ids[:0], (), prompts,
        nothing, 20.0,
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def strangers(**changes):
    """Volumes of other patients than those of `embedded`."""
    found = embedded(**changes)
    return dataclasses.replace(found, patients=np.char.add("other ", found.patients))


def evaluation(**options):
    return ZeroShot(ZeroShotOptions(**options))


def slow_scores(found, scale=20.0):
    """CT-CLIP's formula, one volume and one class at a time."""
    pair, scores = found.prompts["ct_clip"].embeddings.astype(float), np.zeros(found.labels.shape)
    for v, volume in enumerate(found.volumes.astype(float)):
        for c in range(len(found.label_names)):
            logits = scale * np.array([volume @ pair[0, c], volume @ pair[1, c]])
            scores[v, c] = np.exp(logits[0]) / np.exp(logits).sum()
    return scores


def known(found, scores, column):
    rows = found.labels[:, column] >= 0
    return found.labels[rows, column], scores[rows, column]


# Prompts and class sets.


def test_the_wordings_of_published_protocols():
    def pair(name, label):
        (present,), (absent,) = prompts_of(name, [label])[label]
        return present, absent

    assert pair("ct_clip", "Emphysema") == ("Emphysema is present.", "Emphysema is not present.")
    assert pair("ct_clip_training", "Emphysema") == ("There is Emphysema.", "There is no Emphysema.")
    assert pair("hlip", "Lung nodule") == ("The volume shows: Lung nodule.", "The volume shows: Not lung nodule.")
    assert pair("hlip", "Atelectasis") == ("The volume shows: Atelectasis.", "The volume shows: Not atelectatic.")
    assert pair("hlip_organ", "Lung nodule") == ("The lung shows: Nodule.", "The lung shows: Not nodule.")
    assert pair("hlip_organ", "Pleural effusion")[0] == "The lung shows: Pleural effusion."
    assert pair("hlip_organ", "Coronary artery wall calcification")[0].startswith("The heart shows: ")
    assert pair("hlip_organ", "Arterial wall calcification")[0].startswith("The aorta shows: ")
    assert pair("hlip_organ", "Hiatal hernia")[1] == "The esophagus shows: Not hiatal hernia."
    assert pair("hlip_organ", "Medical material")[0] == "The volume shows: Medical material."
    assert pair("fvlm", "Atelectasis") == ("Atelectatic.", "Not Atelectatic.")
    assert pair("fvlm", "Pulmonary fibrotic sequela") == ("Pulmonary fibrotic.", "Not Pulmonary fibrotic.")
    assert pair("fvlm", "Lung opacity") == ("Opacity.", "Not Opacity.")
    assert by_general_pattern("fvlm", ABNORMALITIES) == ["Medical material", "Lymphadenopathy"]
    assert by_general_pattern("ct_clip", [*ABNORMALITIES, "mass"]) == ["mass"]


def test_every_set_has_two_sides_for_every_label():
    labels = [*ABNORMALITIES, "a label of other data"]
    for name in PROMPT_SETS:
        for label, (present, absent) in prompts_of(name, labels).items():
            assert present and absent and not set(present) & set(absent), (name, label)
            assert all(re.fullmatch(r"[A-Z].*\.", phrase) for phrase in (*present, *absent) if name == "reports")
    denials = {len(absent) for _, absent in prompts_of("reports", ABNORMALITIES).values()}
    assert min(denials) >= 4


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_prompts_of_a_file(tmp_path, kind):
    file = tmp_path / f"mine.{kind}"
    pairs = {"a": (["A.", "Much a."], ["No a."]), "Emphysema": (["E."], ["No E."])}
    if kind == "json":
        document = {label: {"present": p, "absent": n} for label, (p, n) in pairs.items()}
        document["a"]["absent"] = "No a."
        file.write_text(json.dumps(document))
    else:
        file.write_text("class,present,absent\na,A.,No a.\na,Much a.,\nEmphysema,E.,No E.\n")
    assert prompts_of(str(file), ["a"]) == {"a": (("A.", "Much a."), ("No a.",))}
    assert set(evaluation(prompts=str(file), compare_prompts=()).prompts(["a"])) == {"mine"}
    with pytest.raises(UserError, match="no prompt that says that 'b' is present"):
        prompts_of(str(file), ["a", "b"])
    with pytest.raises(UserError, match="prompts for 'a', which is no label of the data: Emphysema"):
        prompts_of(str(file), ["Emphysema"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "label,present,absent\n", "lacks the column class"),
        ("p.json", "{", "is no JSON"),
        ("p.json", "[]", "holds a list"),
        ("p.json", '{"a": ["A."]}', "'a' has \\['A.'\\]"),
        ("p.json", '{"a": {"present": [1], "absent": []}}', "no list of texts"),
    ],
)
def test_wrong_files_of_prompts(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        prompts_of(str(tmp_path / name), ["a"])
    with pytest.raises(UserError, match="cannot be read"):
        prompts_of(str(tmp_path / "none.csv"), ["a"])


def test_sets_of_classes():
    assert [len(classes) for classes in CLASS_SETS.values()] == [18, 16, 15]
    assert set(CLASS_SETS["ct_rate_18"]) - set(CLASS_SETS["ct_rate_16"]) == {"Medical material", "Lymphadenopathy"}
    assert set(CLASS_SETS["ct_rate_16"]) - set(CLASS_SETS["rad_chestct_15"]) == {"Mosaic attenuation pattern"}
    shuffled = ABNORMALITIES[::-1]
    assert classes_of("ct_rate_16", shuffled) == tuple(n for n in shuffled if n in CLASS_SETS["ct_rate_16"])
    assert classes_of("all", ("x", "y")) == ("x", "y") and classes_of("y, x", ("x", "y")) == ("x", "y")
    assert protocol_name(shuffled) == "ct_rate_18" and protocol_name(("x", "y")) == "x+y"
    with pytest.raises(UserError, match="ct_rate_18' needs labels that the data does not have: Medical material"):
        classes_of("ct_rate_18", ABNORMALITIES[1:])
    with pytest.raises(UserError, match="is no set of classes"):
        classes_of("ct_rate_17", ABNORMALITIES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "cosine"}, "scoring = 'cosine': choose one of softmax"),
        ({"prompts": "hlap"}, "prompts = 'hlap': choose one of ct_clip"),
        ({"thresholds": "test"}, "thresholds = 'test': choose one of half"),
        ({"compare_prompts": ("x",)}, "compare_prompts = 'x'"),
        ({"scoring": "positive"}, "'half' has no meaning"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        evaluation(**options)


# Scores and thresholds.


def test_the_three_scorings():
    """The softmax has the temperature exponentiated once, in the logit scale: M3D's forgotten exponential fails here."""
    found = embedded()
    similarity = scoring.similarities(found.volumes, found.prompts["ct_clip"].embeddings)
    np.testing.assert_allclose(scoring.score("softmax", similarity, found.logit_scale), slow_scores(found), atol=1e-9)
    present = found.volumes.astype(float) @ found.prompts["ct_clip"].embeddings[0].T
    np.testing.assert_allclose(scoring.score("positive", similarity, 1.0), present, atol=1e-9)
    difference = scoring.score("difference", similarity, 1.0)
    np.testing.assert_allclose(1 / (1 + np.exp(-20.0 * difference)), slow_scores(found), atol=1e-9)


def test_scores_near_certainty_stay_apart():
    """At the largest scale float32 probabilities of clearly positive volumes would all be 1."""
    prompts = np.array([[[1.0, 0.0]], [[-1.0, 0.0]]], np.float32)
    volumes = np.array([[0.12, 0.0], [0.13, 0.0], [0.14, 0.0]], np.float32)
    assert len(set(scoring.probabilities(volumes, prompts, 100.0)[:, 0])) == 3


def test_thresholds_by_rule():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(-1, 2, (200, 2)), rng.random((200, 2))
    scores += 0.3 * labels
    labels[:, 1] = np.abs(labels[:, 1])
    train = (labels[:100], scores[:100])
    truth, score = (array[labels[:100, 0] >= 0, 0] for array in (labels[:100], scores[:100]))
    youden = scoring.thresholds("train_youden", "difference", labels, scores, train)[0]
    false, true, _ = sklearn_metrics.roc_curve(truth, score, drop_intermediate=False)
    called = score >= youden
    assert called[truth == 1].mean() - called[truth == 0].mean() == pytest.approx((true - false).max())
    f1 = scoring.thresholds("train_f1", "difference", labels, scores, train)[0]
    best = max(sklearn_metrics.f1_score(truth, score >= cut) for cut in score)
    assert sklearn_metrics.f1_score(truth, score >= f1) == pytest.approx(best)

    probabilities = 1 / (1 + np.exp(-scores))
    tuned = scoring.thresholds(scoring.TUNED, "softmax", labels, probabilities, None)[0]
    truth, score = labels[labels[:, 0] >= 0, 0], probabilities[labels[:, 0] >= 0, 0]

    def distance(cut):
        return np.hypot(1 - np.mean(score[truth == 1] > cut), np.mean(score[truth == 0] > cut))

    best = min(np.linspace(0, 1, 100)[::-1], key=distance)  # of equals the last one, as in public code
    assert tuned == np.nextafter(best, 1) and np.array_equal(score >= tuned, score > best)
    assert list(scoring.thresholds("half", "softmax", labels, scores, None)) == [0.5, 0.5]
    assert list(scoring.thresholds("half", "difference", labels, scores, None)) == [0.0, 0.0]
    one_sided = scoring.thresholds(scoring.TUNED, "softmax", np.ones((5, 1)), np.ones((5, 1)), None)
    assert np.isnan(one_sided).all()


def test_thresholds_are_of_training_volumes_and_never_of_the_evaluated():
    one, other = embedded(seed=1), strangers(seed=2)
    assert evaluation().needs == ("volumes",) and "train" in evaluation(thresholds="train_f1").needs
    with pytest.raises(UserError, match="--train-data"):
        evaluation(thresholds="train_youden").full(one)
    found = evaluation(thresholds="train_youden").full(dataclasses.replace(one, train=other))
    turned = dataclasses.replace(one, train=other, labels=np.where(one.labels >= 0, 1 - one.labels, -1).astype(np.int8))
    for name in NAMES[:3]:
        assert (
            evaluation(thresholds="train_youden").full(turned)["by_class"][name]["threshold"]
            == (found["by_class"][name]["threshold"])
        )
    assert not any("tuned" in key for key in found["numbers"]) and "tuned" not in found["protocol"]
    tuned = evaluation(thresholds=scoring.TUNED).full(one)
    assert f"{PREFIX}threshold={scoring.TUNED}/f1_macro" in tuned["numbers"]
    assert "tuned on the evaluated labels" in tuned["protocol"]
    assert any("tuned on the evaluated labels" in sentence for sentence in tuned["warnings"])
    fewer = dataclasses.replace(other, label_names=(*NAMES[:3], "another"))
    with pytest.raises(UserError, match="not labelled for all present"):
        evaluation(thresholds="train_f1").full(dataclasses.replace(one, train=fewer))


# The result.


def test_numbers_are_those_of_scikit_learn_and_a_class_without_both_outcomes_is_out_of_the_mean():
    found, scores = embedded(), slow_scores(embedded())
    result = evaluation().full(found)
    expected = [sklearn_metrics.roc_auc_score(*known(found, scores, c)) for c in range(3)]
    assert [result[f"auroc/{name}"] for name in NAMES[:3]] == pytest.approx(expected)
    assert result["auroc_macro"] == pytest.approx(np.mean(expected))
    assert result["classes_without_both_outcomes"] == ["all present"] and "auroc/all present" not in result
    assert result["by_class"]["all present"]["auroc"] is None and result["by_class"]["all present"]["absent"] == 0
    assert any("all present or all absent: all present" in sentence for sentence in result["warnings"])
    precision = [sklearn_metrics.average_precision_score(*known(found, scores, c)) for c in range(3)]
    assert result["auprc_macro"] == pytest.approx(np.mean(precision))
    called = [(truth, score >= 0.5) for truth, score in (known(found, scores, c) for c in range(3))]
    f1, positives = [sklearn_metrics.f1_score(*one) for one in called], [truth.sum() for truth, _ in called]
    assert result["f1_macro"] == pytest.approx(np.mean(f1))
    assert result["f1_weighted"] == pytest.approx(np.average(f1, weights=positives))
    both = [sklearn_metrics.f1_score(*one, average="weighted") for one in called]
    assert result["f1_both_outcomes_macro"] == pytest.approx(np.mean(both))
    balanced = [sklearn_metrics.balanced_accuracy_score(*one) for one in called]
    assert result["balanced_accuracy_macro"] == pytest.approx(np.mean(balanced))
    low, high = result["auroc_macro_95"]
    assert low < result["auroc_macro"] < high
    # Labels without an unknown one: the same as scikit-learn's multi-label means.
    whole = np.where(found.labels < 0, 0, found.labels)[:, :3]
    result = evaluation(classes="a,b,c").full(
        dataclasses.replace(found, labels=np.c_[whole, whole[:, :1]].astype(np.int8))
    )
    for average in ("macro", "weighted"):
        reference = sklearn_metrics.f1_score(whole, scores[:, :3] >= 0.5, average=average)
        assert result[f"f1_{average}"] == pytest.approx(reference)
    assert result["choices"]["class_set"] == "a+b+c"


def test_keys_say_the_whole_protocol():
    one = evaluation()
    flat = one.flat(json.loads(json.dumps(one.full(embedded()))))
    assert flat[f"{PREFIX}auroc_macro"] == one.full(embedded())["auroc_macro"]
    assert len(flat[f"{PREFIX}auroc/a_95"]) == 2 and f"{PREFIX}threshold=half/f1_weighted" in flat
    assert "zero_shot/classes=labels_4/score=severity_baseline/auroc_macro" in flat
    assert "zero_shot/classes=labels_4/prompts=bare/score=positive/auroc_macro" in flat
    other = evaluation(scoring="difference").full(embedded())
    assert "zero_shot/classes=labels_4/prompts=ct_clip/score=difference/auroc_macro" in other["numbers"]
    assert other["auroc_macro"] == pytest.approx(flat[f"{PREFIX}auroc_macro"])  # they rank alike
    assert not any("brier" in key for key in other["numbers"])  # a difference is no probability


def test_a_comparison_reads_the_same_numbers_from_arrays(tmp_path):
    one, found = evaluation(), embedded()
    np.savez(tmp_path / "scores.npz", **one.arrays(found))
    with np.load(tmp_path / "scores.npz") as file:
        arrays = dict(file)
    drawn, result = ZeroShot.resampled(arrays, PatientDraws(found.patients, 20)), one.full(found)
    numbers = {key: value for key, value in one.flat(result).items() if not key.endswith("_95")}
    assert set(numbers) <= set(drawn)
    for key, value in numbers.items():
        assert drawn[key].shape == (21,) and drawn[key][0] == pytest.approx(value, nan_ok=True), key


def test_what_training_logs_is_small_and_the_same():
    found = embedded()
    logged, result = evaluation().metrics(found), evaluation().full(found)
    assert {key for key in logged if not key.startswith("zero_shot/")} == {
        "auroc_macro", *(f"auroc/{name}" for name in NAMES[:3])
    }  # fmt: skip
    for key in ("auroc_macro", "auroc/a"):
        assert logged[key] == pytest.approx(result[key])
    assert logged["zero_shot/f1_macro"] == pytest.approx(result["f1_macro"])
    assert "zero_shot/prompts=bare/score=softmax/auroc_macro" in logged
    assert len(logged) < 25


def test_data_without_labels_and_without_volumes():
    bare = embedded(
        labels=np.zeros((len(embedded().volumes), 0), np.int8),
        label_names=(),
        prompts={"ct_clip": Prompts((), np.zeros((2, 0, 24), np.float32))},
    )
    result = evaluation().full(bare)
    assert np.isnan(result["auroc_macro"]) and "there is no AUROC" in result["warnings"][0]
    assert np.isnan(evaluation().metrics(bare)["auroc_macro"])
    [section.plot for section in evaluation().sections(result)]
    empty = {name: getattr(embedded(), name)[:0] for name in ("volumes", "labels", "patients", "volume_ids")}
    with pytest.raises(UserError, match="no volumes"):
        evaluation().full(dataclasses.replace(embedded(), **empty))


def test_prompts_that_a_file_of_embeddings_has():
    found = embedded()
    pair = found.prompts["ct_clip"].embeddings
    one_set = {"theirs": Prompts(("c", "a"), pair[:, [2, 0]])}
    result = evaluation().full(dataclasses.replace(found, prompts=one_set))
    assert result["auroc/c"] == pytest.approx(evaluation().full(found)["auroc/c"])
    assert result["classes_without_prompts"] == ["b", "all present"] and "auroc/b" not in result
    assert "prompts theirs" in result["protocol"] and any("Not scored" in text for text in result["warnings"])
    with pytest.raises(UserError, match="'theirs' have none for b"):
        evaluation(classes="a, b").full(dataclasses.replace(found, prompts=one_set))
    with pytest.raises(UserError, match="prompts by the name of ct_clip, bare"):
        evaluation(prompts="hlip").full(found)


# Why a number is low.


def test_severity_counts_the_other_findings():
    labels = np.array([[1, 1, 0, -1], [0, 1, 1, 1], [-1, 0, 0, 0]])
    np.testing.assert_array_equal(baselines.severity(labels), [[1, 1, 2, 2], [3, 2, 2, 2], [0, 0, 0, 0]])
    assert baselines.severity(labels[:, :0]).shape == (3, 0)


def test_severity_does_not_know_a_finding_by_its_copy():
    """As Rad-ChestCT's one calcification stands for two findings of CT-RATE."""
    labels = np.random.default_rng(0).integers(0, 2, (400, 5))
    copied = np.concatenate([labels, labels[:, 4:]], axis=1)
    score = baselines.severity(copied)
    np.testing.assert_array_equal(score[:, 4:], np.repeat(labels[:, :4].sum(axis=1, keepdims=True), 2, axis=1))
    np.testing.assert_array_equal(score[:, 0], copied[:, 1:].sum(axis=1))


def test_training_volumes_of_evaluated_patients_teach_nothing():
    """A probe or a threshold of the evaluated volumes themselves would be tuned on them."""
    found = embedded()
    half = np.isin(found.patients, np.unique(found.patients)[:75])
    others, both = strangers(seed=3), found.rows(half)
    mixed = dataclasses.replace(others, **{
        name: np.concatenate([getattr(others, name), getattr(both, name)])
        for name in ("volumes", "volume_ids", "scans", "patients", "volume_reports", "labels")
    })  # fmt: skip
    one = evaluation(thresholds="train_youden")
    alone, together = (one.arrays(dataclasses.replace(found, train=train)) for train in (others, mixed))
    for name in ("threshold", "probe"):
        np.testing.assert_array_equal(alone[name], together[name])
    with pytest.raises(UserError, match="all patients of the training volumes are evaluated, too"):
        evaluation(thresholds="train_f1").arrays(dataclasses.replace(found, train=both))
    assert "folds" in str(evaluation().arrays(dataclasses.replace(found, train=both))["probe_name"])


def test_one_patient_is_no_reason_for_a_warning_about_the_baseline():
    found = embedded(signal=2.0)
    result = evaluation(classes="a,b,c").full(dataclasses.replace(found, patients=np.full(len(found.patients), "p")))
    assert np.isnan(result["auroc_macro_95"]).all() and not any("nan" in text for text in result["warnings"])


def test_a_probe_never_sees_the_patient_it_scores():
    """Noise with two volumes per patient that are copies: a probe that saw the copy would know the label."""
    rng = np.random.default_rng(0)
    volumes, labels = (
        np.repeat(unit(rng.normal(size=(120, 60))), 2, axis=0),
        np.repeat(rng.integers(0, 2, (120, 3)), 2, axis=0),
    )
    scores = baselines.cross_validated_probe(volumes, labels.astype(np.int8), np.repeat(np.arange(120), 2))
    areas = [sklearn_metrics.roc_auc_score(labels[:, c], scores[:, c]) for c in range(3)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.1)
    assert np.isnan(baselines.cross_validated_probe(volumes[:20], labels[:20], np.repeat(np.arange(10), 2))).all()


def test_the_probe_reaches_what_scikit_learn_reaches():
    one, train = embedded(seed=3, signal=0.4), embedded(seed=3, signal=0.4)
    half = np.array([int(p[1:]) < 75 for p in one.patients])
    rows, truth = (train.labels[:, 0] >= 0) & half, (one.labels[:, 0] >= 0) & ~half
    reference = LogisticRegression(C=0.1, max_iter=1000).fit(train.volumes[rows] * np.sqrt(24), train.labels[rows, 0])
    expected = sklearn_metrics.roc_auc_score(
        one.labels[truth, 0], reference.decision_function(one.volumes[truth] * np.sqrt(24))
    )
    scores = baselines.probe(train.volumes[half], train.labels[half], train.patients[half], one.volumes)
    assert sklearn_metrics.roc_auc_score(one.labels[truth, 0], scores[truth, 0]) == pytest.approx(expected, abs=0.04)
    assert np.isnan(scores[:, 3]).all()


def test_a_good_model_gets_no_warning_about_its_score():
    result = evaluation(classes="a,b,c").full(embedded(signal=2.0))
    assert result["auroc_macro"] > 0.9
    assert not any("probe" in text or "severity" in text or "sign" in text for text in result["warnings"])


def test_a_sign_that_is_not_learned_is_said():
    """Both prompts of a pair point at the finding: the positive one alone finds it, the pair does not."""
    result = evaluation(classes="a,b,c").full(embedded(sign=0.0))
    text = " ".join(result["warnings"])
    assert result["auroc_macro"] < 0.65
    assert "the sign of the pair is not learned" in text and "the prompts do not reach them" in text
    assert "is not above the severity baseline of" in text
    row = result["by_class"]["a"]
    assert row["positive_prompt_auroc"] > 0.75 and row["probe_auroc"] > 0.75


def test_an_inverted_prompt_is_said():
    found = embedded()
    pair = found.prompts["ct_clip"].embeddings.copy()
    pair[:, 1] = pair[::-1, 1]
    result = evaluation().full(dataclasses.replace(found, prompts={"ct_clip": Prompts(NAMES, pair)}))
    row = result["by_class"]["b"]
    assert row["inverted"] and row["turned_auroc"] == pytest.approx(1 - row["auroc"]) and row["turned_auroc"] > 0.7
    assert [name for name in NAMES if result["by_class"][name]["inverted"]] == ["b"]
    assert any(text.startswith("Inverted prompt?") and "b 0." in text for text in result["warnings"])


def test_embeddings_without_findings_are_said():
    result = evaluation(classes="a,b,c").full(embedded(signal=0.0, seed=5))
    assert any("other prompts will not help" in text for text in result["warnings"])


def test_collapsed_embeddings_and_numbers_that_are_none_are_survived():
    found = embedded()
    same = unit(np.ones_like(found.volumes) + 1e-3 * found.volumes)
    assert any("collapsed" in t for t in evaluation().full(dataclasses.replace(found, volumes=same))["warnings"])
    broken = found.volumes.copy()
    broken[3] = np.nan
    assert evaluation().full(dataclasses.replace(found, volumes=broken))["auroc_macro"] > 0.5


def test_a_better_wording_is_said_and_that_choosing_it_here_is_tuning():
    found = embedded(sign=0.0)
    good = embedded(sign=1.0).prompts["bare"]
    result = evaluation(classes="a,b,c").full(dataclasses.replace(found, prompts={**found.prompts, "bare": good}))
    assert any("The wording decides" in text and "(bare)" in text and "tuning" in text for text in result["warnings"])


def test_what_is_shown_is_drawn():
    result = json.loads(json.dumps(evaluation().full(embedded())))
    first, prompts, decisions = evaluation().sections(result)
    assert first.title == "Zero-shot AUROC" and first.table.rows[0][0] == "macro mean"
    assert len(first.table.rows) == len(first.table.intervals) == len(first.table.classes) == 4
    assert {len(row) + 1 for row in first.table.rows} == {len(first.table.head)}
    assert prompts.table.rows and {len(row) for row in decisions.table.rows} == {len(decisions.table.head)}
    pictures = [svg(chart) for chart in first.charts]
    assert len(pictures) == 3 and all(picture.startswith("<?xml") for picture in pictures)
    curve = result["roc"]["classes"]["a"]
    assert len(curve["low"]) == 101 and curve["true_positive_rate"][-1] == 1
    assert all(low <= high for low, high in zip(curve["low"], curve["high"], strict=True))
    assert sum(result["calibration"]["count"]) == (embedded().labels >= 0).sum()


def test_few_volumes_are_said_and_not_called_inverted():
    result = evaluation().full(embedded(patients=8, sign=0.5))
    assert any("Every class has fewer than 10 volumes" in text for text in result["warnings"])
    assert not any(row["inverted"] for row in result["by_class"].values())
    labels = embedded().labels.copy()
    labels[:, 0] = 0
    labels[:3, 0] = 1
    result = evaluation().full(dataclasses.replace(embedded(), labels=labels))
    assert any("says little: a (3 present, " in text for text in result["warnings"])
