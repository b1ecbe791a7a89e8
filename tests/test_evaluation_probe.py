"""The evaluation of probes and of a trained head: numbers against scikit-learn, and what is said of what cannot be measured."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, brier_score_loss, f1_score, roc_auc_score
from support import embedded
from test_evaluation_probes import embeddings

from mg3d_jax.commands.main import main
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import class_scores
from mg3d_jax.evaluation.bootstrap import PatientDraws
from mg3d_jax.evaluation.probe import Probe, ProbeOptions
from mg3d_jax.evaluation.probes import linear_probe, load_head, nearest_neighbours

NAMES = ("a", "b", "c")
QUICK = {"draws": 40, "seeds": 2, "fractions": (10.0, 100.0)}


def found(train_n=120, test_n=60, noise=1.5, **changes):
    """Training and evaluated volumes of different patients; class "c" has one outcome among the evaluated ones."""
    x, y, patients = embeddings(train_n, noise=noise)
    test_x, test_y, test_patients = embeddings(test_n, seed=1, noise=noise)
    test_y[:, 2] = np.where(test_y[:, 2] < 0, -1, 1)
    train = embedded(x, labels=y, label_names=NAMES, patients=patients)
    test_patients = np.array([f"q{name}" for name in test_patients])
    known = {"labels": test_y, "label_names": NAMES, "patients": test_patients, "train": train}
    return embedded(test_x, **known | changes)


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, (80, 3)).astype(np.int8)
    labels[:, 2] = -1
    logits = np.round(rng.normal(size=(80, 3)) + labels, 1)  # with ties
    patients = np.array([f"p{i // 2}" for i in range(80)])
    result = class_scores.scored(labels, logits, NAMES, patients, kind="multi_label", draws=30)
    likely = 1 / (1 + np.exp(-logits))
    rows = [labels[:, i] >= 0 for i in range(2)]

    def mean(metric, values):
        return np.mean([metric(labels[rows[i], i], values[rows[i], i]) for i in range(2)])

    assert result["auroc_macro"] == pytest.approx(mean(roc_auc_score, logits))
    assert result["auprc_macro"] == pytest.approx(mean(average_precision_score, logits))
    assert result["f1_macro"] == pytest.approx(mean(f1_score, logits >= 0))
    assert result["balanced_accuracy_macro"] == pytest.approx(mean(balanced_accuracy_score, logits >= 0))
    assert result["brier_macro"] == pytest.approx(mean(brier_score_loss, likely))
    assert result["classes_without_both_outcomes"] == ["c"] and "auroc/c" not in result
    low, high = result["auroc_macro_95"]
    assert low < result["auroc_macro"] < high
    quick = class_scores.quick(labels, logits, NAMES, kind="multi_label")
    assert quick == pytest.approx({key: result[key] for key in ("auroc_macro", "auroc/a", "auroc/b")})
    alone = class_scores.scored(labels, logits, NAMES, patients, kind="multi_label", draws=0, left_out=(0,))
    assert alone["auroc_macro"] == pytest.approx(result["auroc/b"]) and alone["classes_not_learned"] == ["a"]
    assert class_scores.left_out_text(alone) == (
        "Left out, all present or all absent among the evaluated volumes: c; of one outcome only among the training "
        "volumes: a."
    )


def test_several_classes_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 3, 90)
    labels, logits = np.eye(3, dtype=np.int8)[classes], rng.normal(size=(90, 3)) + np.eye(3)[classes]
    labels[4], labels[5] = 0, -1
    known = np.setdiff1d(np.arange(90), [4, 5])
    result = class_scores.scored(labels, logits, NAMES, np.arange(90).astype(str), kind="multi_class", draws=20)
    likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    theirs, called = classes[known], logits[known].argmax(axis=1)
    assert result["accuracy"] == pytest.approx(np.mean(called == theirs))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(theirs, called))
    assert result["auroc_macro"] == pytest.approx(roc_auc_score(theirs, likely[known], multi_class="ovr"))
    assert result["accuracy_95"][0] < result["accuracy"] < result["accuracy_95"][1]
    assert "f1_macro" not in result


def test_probe_of_embeddings():
    one = found()
    result = Probe(ProbeOptions(**QUICK)).full(one)
    train = one.train
    linear = linear_probe(train.volumes, train.labels, train.patients, one.volumes)
    near = nearest_neighbours(train.volumes, train.labels, train.patients, one.volumes)
    for method, scores in (("linear", linear.scores), ("neighbours", near.scores)):
        rows = [one.labels[:, i] >= 0 for i in range(2)]
        expected = [roc_auc_score(one.labels[rows[i], i], scores[rows[i], i]) for i in range(2)]
        assert result[method]["auroc_macro"] == pytest.approx(np.mean(expected)) and np.mean(expected) > 0.7
        assert result[method]["classes_without_both_outcomes"] == ["c"]
    assert result["train"] == {"volumes": 120, "patients": 60} and result["evaluated"]["patients"] == 30
    assert result["neighbours"]["count"] == near.count
    few, all_ = result["few_shot"]
    assert (few["percent"], few["patients"], few["seeds"], len(few["values"])) == (10.0, 6, 2, 2)
    assert few["auroc_macro"] == pytest.approx(np.mean(few["values"])) and few["auroc_macro_95"][0] <= min(
        few["values"]
    )
    assert all_["auroc_macro"] == pytest.approx(result["linear"]["auroc_macro"]) and all_["seeds"] == 1
    metrics = Probe(ProbeOptions(**QUICK)).metrics(one)
    assert metrics == pytest.approx(
        {f"probe/{m}/auroc_macro": result[m]["auroc_macro"] for m in ("linear", "neighbours")}
    )
    more = Probe(ProbeOptions(**QUICK, online_fractions=(10.0,))).metrics(one)
    assert more == pytest.approx(metrics | {"probe/linear/10_percent/auroc_macro": few["auroc_macro"]})


def test_keys_say_the_protocol_and_draws_give_the_same_numbers():
    one, probe = found(), Probe(ProbeOptions(**QUICK))
    result = probe.full(one)
    flat = probe.flat(json.loads(json.dumps(result)))
    start = "probe/method=linear/labels=multi_label/train_patients=100%"
    assert flat[f"{start}/auroc_macro"] == result["linear"]["auroc_macro"]
    assert flat["probe/method=linear/labels=multi_label/train_patients=10%/seeds=2/auroc_macro"] > 0.5
    draws = PatientDraws(one.patients, 40)
    drawn = Probe.resampled(probe.arrays(one), draws)
    assert set(drawn) <= set(flat)
    for key, values in drawn.items():
        assert values.shape == (41,) and values[0] == pytest.approx(flat[key])
        assert np.quantile(values[1:], [0.025, 0.975]) == pytest.approx(flat[f"{key}_95"])


def test_what_a_probe_shows():
    one, probe = found(), Probe(ProbeOptions(**QUICK))
    summary, few, classes = probe.sections(json.loads(json.dumps(probe.full(one))))
    assert (
        summary.headline[0][0] == "AUROC of a linear probe"
        and "120 training volumes of 60 patients" in summary.protocol
    )
    assert "Left out, all present or all absent among the evaluated volumes: c." in summary.table.more
    assert [row[0] for row in few.table.rows] == ["10 %", "100 %"] and few.table.rows[1][3] == ""
    assert sorted(row[0] for row in classes.table.rows) == ["a", "b"] and not classes.on_terminal
    assert Probe().sections({}) == [] and Probe().flat({}) == {}


def test_without_training_volumes_there_is_nothing():
    one = found(train=None)
    assert Probe().full(one) == {} and Probe().metrics(one) == {} and Probe().arrays(one) == {}
    with pytest.raises(UserError, match="there are none"):
        Probe().head(one, {})


def test_patients_in_both_sets_are_left_out_of_the_fit():
    one = found()
    patients = one.patients.copy()
    patients[:4] = ["p0", "p0", "p1", "p1"]
    shared = found(patients=patients)
    probe = Probe(ProbeOptions(**QUICK))
    result = probe.full(shared)
    assert result["shared_patients_left_out"] == 2 and result["train"] == {"volumes": 116, "patients": 58}
    assert "2 patients are in the training and the evaluated set" in probe.sections(result)[0].warnings[0]
    with pytest.raises(UserError, match="measure memory"):
        probe.full(dataclasses.replace(one, train=one))


def test_a_class_that_training_lacks_is_named():
    one = found()
    one.train.labels[:, 0] = 0
    result = Probe(ProbeOptions(**QUICK)).full(one)
    assert result["linear"]["classes_not_learned"] == ["a"] and list(result["linear"]["penalties"]) == ["b", "c"]
    assert result["linear"]["auroc_macro"] == result["linear"]["auroc/b"]
    head = Probe(ProbeOptions(**QUICK)).head(one, {"run": "R"})
    assert head.classes == ("b", "c") and head.facts["fitted_to"] == {"volumes": 120, "patients": 60}


def test_a_probe_of_several_classes():
    rng = np.random.default_rng(0)
    sets = []
    for prefix, n in (("p", 150), ("q", 60)):
        classes = rng.integers(0, 3, n)
        x = np.eye(3)[classes] @ np.eye(3, 8) * 2 + rng.normal(size=(n, 8))
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        patients = np.array([f"{prefix}{i}" for i in range(n)])
        sets.append(
            {"volumes": x, "labels": np.eye(3, dtype=np.int8)[classes], "label_names": NAMES, "patients": patients}
        )
    one = embedded(**sets[1], train=embedded(**sets[0]))
    probe = Probe(ProbeOptions(**QUICK, kind="multi_class"))
    result = probe.full(one)
    assert result["linear"]["accuracy"] > 0.6 and result["neighbours"]["accuracy"] > 0.6
    assert "probe/linear/accuracy" in probe.metrics(one) and probe.head(one, {}).kind == "multi_class"
    assert any("accuracy" in row[0] for row in probe.sections(result)[0].table.rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"kind": "x"}, "choose one of"), ({"fractions": (0.0,)}, "percent"), ({"seeds": 0}, "at least 1")],
)
def test_wrong_options(options, says):
    assert says in Probe.problems(ProbeOptions(**options), None)[0]


def test_classes_are_found_by_name():
    """As for an external set, whose labels are fewer, others, and in another order."""
    one, probe = found(), Probe(ProbeOptions(**QUICK))
    expected = probe.full(one)
    other = dataclasses.replace(
        one, labels=np.concatenate([one.labels[:, [1, 0]], one.labels[:, :1]], axis=1), label_names=("b", "a", "new")
    )
    result = probe.full(other)
    for name in ("a", "b"):
        assert result["linear"][f"auroc/{name}"] == pytest.approx(expected["linear"][f"auroc/{name}"])
    assert result["linear"]["classes_not_learned"] == ["new"] and sorted(result["by_class"]) == ["a", "b"]
    with pytest.raises(UserError, match="no class is in both"):
        probe.full(dataclasses.replace(one, label_names=("x", "y", "z")))
    with pytest.raises(UserError, match="must be the same"):
        Probe(ProbeOptions(**QUICK, kind="multi_class")).full(other)


@pytest.fixture
def files(tmp_path):
    """The two sets as files; the labels of the evaluated one are in a table, as Rad-ChestCT's would be."""
    one = found()
    for name, part in (("train", one.train), ("test", one)):
        arrays = {"volume_embeddings": part.volumes, "volume_ids": part.volume_ids, "patient_ids": part.patients}
        if name == "train":
            about = np.array(json.dumps({"run": "RUN", "step": 3, "config_hash": "abc"}))
            arrays |= {"labels": part.labels, "label_names": np.array(NAMES, str), "about": about}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    rows = [[volume, *map(str, row)] for volume, row in zip(one.volume_ids, one.labels, strict=True)]
    lines = [",".join(["volume_id", *NAMES]), *(",".join(row) for row in rows)]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path, one


def command(folder, *more):
    train, test = str(folder / "train.npz"), str(folder / "test.npz")
    return ["probe", "--train", train, "--test", test, "--out", str(folder / "out"), *more]


def test_the_command_on_files_of_embeddings(files, capsys):
    folder, one = files
    labels = ["--test-labels", str(folder / "labels.csv")]
    options = ["--fractions", "10,100", "--seeds", "2", "--evaluations.probe.draws=40"]
    assert main(command(folder, *labels, *options)) == 0
    expected, out = Probe(ProbeOptions(**QUICK)).full(one), folder / "out"
    result = json.loads((out / "evaluation.json").read_text())["probe"]
    assert result["linear"]["auroc_macro"] == pytest.approx(expected["linear"]["auroc_macro"])
    assert [row["percent"] for row in result["few_shot"]] == [10.0, 100.0]
    flat = json.loads((out / "metrics.json").read_text())
    assert flat["probe/method=linear/labels=multi_label/train_patients=100%/auroc_macro"] == pytest.approx(
        expected["linear"]["auroc_macro"]
    )
    head = load_head(out / "probe.safetensors")
    assert head.classes == NAMES and head.facts["step"] == 3 and head.facts["config_hash"] == "abc"
    np.testing.assert_allclose(
        head.logits(one.volumes)[:, 0], linear_probe(
            one.train.volumes, one.train.labels, one.train.patients, one.volumes
        ).scores[:, 0], atol=1e-3,
    )  # fmt: skip
    assert (out / "classes.csv").read_text().splitlines()[0].startswith("evaluation,class,auroc")
    shown = capsys.readouterr().out
    assert "Probes of the embeddings" in shown and "few patients" in shown and "probe.safetensors" in shown


def test_evaluate_says_what_a_probe_needs(files, capsys):
    folder, _ = files
    words = [
        "evaluate",
        "--embeddings",
        str(folder / "test.npz"),
        "--labels",
        str(folder / "labels.csv"),
        "--only",
        "probe",
    ]
    assert main(words) == 2
    assert "'probe' needs labelled training volumes: give --train-data or --train-embeddings" in capsys.readouterr().err


def test_what_the_command_refuses(files, capsys):
    folder, _ = files
    assert main(command(folder)) == 2
    assert "'probe' needs labels of the volumes" in capsys.readouterr().err
    for words, says in (
        (["--step", "3"], "give --workdir RUN"),
        (["--workdir", "RUN", "--train-labels", "x.csv"], "prepared folders have their labels"),
        (["--kind", "x"], "invalid choice"),
        (["--batch-size", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(command(folder, *words))
        assert says in capsys.readouterr().err
