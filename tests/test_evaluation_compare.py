"""Paired comparison: the interval is that of copying the drawn patients, it knows about pairs and seeds, and it refuses runs
that were not measured on the same things."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from test_evaluation_zero_shot import embedded

from mg3d_jax.commands.main import main
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import compare as compare_lib
from mg3d_jax.evaluation.bootstrap import PatientDraws
from mg3d_jax.evaluation.compare import compare, read_scores
from mg3d_jax.evaluation.zero_shot import ZeroShot, ZeroShotOptions

PREFIX = "zero_shot/classes=a+b/prompts=ct_clip/score=softmax/"
OPTIONS = ZeroShotOptions(classes="a,b", compare_prompts=())


@pytest.fixture
def save(tmp_path):
    def one(name, found, **other):
        folder = tmp_path / name / "evaluation"
        folder.mkdir(parents=True)
        arrays = {f"zero_shot/{key}": array for key, array in ZeroShot(OPTIONS).arrays(found).items()}
        np.savez(folder / "scores.npz", **arrays, **other)
        return folder.parent

    return one


def noisy(found, amount, seed):
    """The same data as another model sees it."""
    noise = np.random.default_rng(seed).normal(size=found.volumes.shape)
    volumes = found.volumes + amount * noise
    return found.__class__(**{
        **{name: getattr(found, name) for name in found.__dataclass_fields__},
        "volumes": (volumes / np.linalg.norm(volumes, axis=1, keepdims=True)).astype(np.float32),
    })  # fmt: skip


def test_the_difference_is_that_of_the_drawn_patients(save):
    found = embedded(patients=80)
    worse = noisy(found, 0.15, 1)
    result = compare([save("a", found)], [save("b", worse)], draws=60)
    weights = PatientDraws(found.patients, 60).weights(found.patients)
    areas = []
    for one in (found, worse):
        arrays = ZeroShot(OPTIONS).arrays(one)
        margin = arrays["similarity/ct_clip"][0] - arrays["similarity/ct_clip"][1]
        values = []
        for row in weights:
            drawn = np.repeat(np.arange(len(row)), row)
            labels, scores = one.labels[drawn, 0], margin[drawn, 0]
            values.append(roc_auc_score(labels[labels >= 0], scores[labels >= 0]))
        areas.append(np.array(values))
    metric = result.metrics[f"{PREFIX}auroc/a"]
    assert (metric["a"], metric["b"]) == pytest.approx((areas[0][0], areas[1][0]))
    assert metric["difference"] == pytest.approx(areas[1][0] - areas[0][0])
    expected = np.quantile((areas[1] - areas[0])[1:], [0.025, 0.975])
    assert metric["difference_95"] == pytest.approx(expected)
    assert result.patients == 80 and any("another seed" in note for note in result.notes)


def test_a_model_is_no_better_than_itself_and_order_does_not_matter(save):
    found = embedded(patients=60)
    order = np.random.default_rng(0).permutation(len(found.volumes))
    names = ("volumes", "labels", "patients", "volume_ids", "scans", "volume_reports")
    fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
    shuffled = found.__class__(**fields | {name: fields[name][order] for name in names})
    result = compare([save("a", found)], [save("b", shuffled)], draws=30)
    for key, one in result.metrics.items():
        if "linear_probe" not in key:  # its folds may differ
            assert one["difference"] == pytest.approx(0) and one["difference_95"] == pytest.approx([0, 0]), key
            assert not one["better"]


def test_what_is_better_depends_on_the_metric(save):
    result = compare([save("a", embedded())], [save("b", noisy(embedded(), 0.5, 1))], draws=100).metrics
    assert result[f"{PREFIX}auroc_macro"]["better"] == "a" and result[f"{PREFIX}auroc_macro"]["difference"] < 0
    brier = result[f"{PREFIX}brier_macro"]  # noise makes these probabilities less certain, which helps them
    assert brier["better"] == "b" and brier["difference"] < 0
    assert compare_lib._difference("retrieval/x/median_rank", np.full(9, 5.0), np.full(9, 3.0))["better"] == "b"


def test_seeds_are_drawn_as_clusters():
    """Two recipes without a difference, five seeds each whose effect is large: the interval must hold 0 as often as it
    says. Patients alone, or seeds without the correction, would claim a difference far too often."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        effects = rng.normal(size=(2, 5, 1))
        values = effects + 0.1 * rng.normal(size=(2, 5, 301))
        sides = [compare_lib._side([{"m": row} for row in side], rng)["m"] for side in values]
        low, high = compare_lib.interval(sides[1] - sides[0])
        held += low <= 0 <= high
    assert held / 200 > 0.85
    one = compare_lib._side([{"m": values[0, 0]}], rng)["m"]
    np.testing.assert_array_equal(one, values[0, 0])
    runs = [{"m": row, "n": row} for row in values[0]]
    both = compare_lib._side([*runs, {"m": values[1, 0]}], rng)
    assert set(both) == {"m"} and both["m"][0] == pytest.approx(np.mean([*values[0, :, 0], values[1, 0, 0]]))
    drawn = compare_lib._side(runs, rng)["m"][1:]
    assert drawn.std() == pytest.approx(values[0].mean(axis=1).std(ddof=1) / np.sqrt(5), rel=0.25)


def test_runs_that_were_measured_on_other_things_are_refused(save):
    first, other = save("a", embedded(patients=40)), save("b", embedded(patients=41))
    with pytest.raises(UserError, match="not evaluated on the same data"):
        compare([first], [other])
    found = embedded(patients=40)
    labels = found.labels.copy()
    labels[0, 0] = 1 - abs(labels[0, 0])
    fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
    with pytest.raises(UserError, match="differ in the labels of zero_shot"):
        compare([first], [save("c", found.__class__(**fields | {"labels": labels}))])
    with pytest.raises(UserError, match="mg3d evaluate --workdir"):
        compare([first], [first.parent / "nowhere"])
    broken = first.parent / "scores.npz"
    broken.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read as scores"):
        read_scores(broken)


def test_the_same_number_of_other_classes_is_refused(save):
    """Their key says only how many there are."""
    names = ("a", "b", "c", "d", "e")
    found = embedded(names=names)

    def scores(name, classes):
        arrays = ZeroShot(ZeroShotOptions(classes=classes, compare_prompts=())).arrays(found)
        path = save(name, found) / "evaluation" / "scores.npz"
        np.savez(path, **{f"zero_shot/{key}": array for key, array in arrays.items()})
        return path

    with pytest.raises(UserError, match="scored other classes under one name, labels_4; not in both: d, e"):
        compare([scores("one", "a,b,c,d")], [scores("two", "a,b,c,e")], draws=5)


def test_files_that_hold_no_scores(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "other.npz", volume_ids=np.zeros(2))
    for name, says in (("cut", "cannot be read"), ("other", "holds no scores of an evaluation, but volume_ids")):
        with pytest.raises(UserError, match=says):
            read_scores(tmp_path / f"{name}.npz")


def test_the_command(save, capsys, tmp_path):
    runs = [save(name, noisy(embedded(patients=50), 0.1, seed)) for seed, name in enumerate("abcd")]
    out = tmp_path / "compare.json"
    assert main(["compare", str(runs[0]), str(runs[1]), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "auroc_macro" in shown and "95 % interval" in shown and "50 patients" in shown
    document = json.loads(out.read_text())
    assert document["a"] == [str(runs[0])] and f"{PREFIX}auroc/a" in document["metrics"]
    assert main(["compare", "--a", *map(str, runs[:2]), "--b", *map(str, runs[2:]), "--classes"]) == 0
    assert "Fewer than 5 runs" in capsys.readouterr().out
    for wrong in (["compare", str(runs[0])], ["compare", "--a", str(runs[0])], ["compare", "x", "y", "--a", "z"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_evaluations_that_are_not_known_are_named(save):
    other = {"toy/ids": np.array(["x"]), "toy/patients": np.array(["p0"])}
    result = compare([save("a", embedded(patients=40), **other)], [save("b", embedded(patients=40), **other)], draws=5)
    assert any("not known here: toy" in note for note in result.notes)
