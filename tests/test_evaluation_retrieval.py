"""Ranks, galleries and neighbours against brute force, with ties, copies and unknown labels; memory of large galleries."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from support import environment

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import galleries, ranking, volume_retrieval
from mg3d_jax.evaluation.base import Embedded
from mg3d_jax.evaluation.bootstrap import PatientDraws
from mg3d_jax.evaluation.retrieval import Retrieval, RetrievalOptions
from mg3d_jax.evaluation.volume_retrieval import VolumeRetrieval


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def embedded(scans=30, width=6, labels=4, seed=0, unknown=0.0):
    """Two reconstructions of every second scan, two scans of every third patient, few distinct vectors: ties abound."""
    rng = np.random.default_rng(seed)
    scan_of = np.sort(np.concatenate([np.arange(scans), np.arange(0, scans, 2)]))
    number = np.array([1 + int((scan_of[:i] == scan).sum()) for i, scan in enumerate(scan_of)])
    patient_of = np.cumsum(np.arange(scans) % 3 != 1) - 1
    pool = unit(rng.normal(size=(12, width)))
    table = rng.integers(0, 2, (scans, labels)).astype(np.int8)
    table[rng.random(table.shape) < unknown] = -1
    names = np.array([f"valid_{patient_of[s]}_{s}" for s in range(scans)])
    return Embedded(
        volumes=pool[rng.integers(0, 12, len(scan_of))],
        volume_ids=np.array([f"{names[s]}_{n}" for s, n in zip(scan_of, number, strict=True)]),
        scans=names[scan_of],
        patients=np.array([f"valid_{patient_of[s]}" for s in scan_of]),
        volume_reports=np.array([f"r{s}" for s in scan_of]),
        labels=table[scan_of],
        label_names=tuple("abcdefgh"[:labels]),
        reports=pool[rng.integers(0, 12, scans)],
        report_ids=np.array([f"r{s}" for s in range(scans)]),
        report_texts=tuple((f"Report {s // 2}.",) for s in range(scans)),
        prompts={},
        texts=np.zeros((0, width), np.float32),
        logit_scale=1.0,
    )


def slow_rank(similarity, correct, first):
    order = sorted(range(len(similarity)), key=lambda i: (-similarity[i], i if first else bool(correct[i]), correct[i]))
    return 1 + next(place for place, i in enumerate(order) if correct[i])


@pytest.mark.parametrize("ties", ["against", "first"])
@pytest.mark.parametrize("block_bytes", [1, 2000, 1 << 20])
def test_ranks_are_those_of_a_sorted_list(ties, block_bytes):
    rng = np.random.default_rng(1)
    pool = unit(rng.normal(size=(9, 5)))
    queries, candidates = pool[rng.integers(0, 9, 23)], pool[rng.integers(0, 9, 40)]
    groups = np.concatenate([np.arange(15), rng.integers(0, 15, 25)])
    of_query = rng.integers(0, 15, 23)
    found = ranking.ranks_by_group(queries, candidates, of_query, groups, ties=ties, block_bytes=block_bytes)
    exact = (queries.astype(np.float64) @ candidates.T.astype(np.float64)).round(9)
    expected = [slow_rank(exact[q], groups == of_query[q], ties == "first") for q in range(23)]
    assert found.tolist() == expected


def test_copies_of_a_vector_are_ties_wherever_they_stand():
    """Matrix products round by the place of a column; a model that gives every report one vector must not profit."""
    rng = np.random.default_rng(2)
    one = unit(rng.normal(size=(1, 333)))
    queries, candidates = unit(rng.normal(size=(37, 333))), np.repeat(one, 101, axis=0)
    assert set(ranking.ranks_by_group(queries, candidates, np.arange(37), np.arange(101)).tolist()) == {101}
    first = ranking.ranks_by_group(queries, candidates, np.arange(37), np.arange(101), ties="first")
    assert first.tolist() == list(range(1, 38))


def brute(found, volumes, reports, own, first):
    """{direction: recall@k} of lists of (volume row, report row) by sorting."""
    result = {}
    v, r = found.volumes[volumes].astype(np.float64), found.reports[reports].astype(np.float64)
    similarity = (r @ v.T).round(9)
    ids = found.report_ids[reports]
    correct = np.eye(len(reports), dtype=bool) if own else ids[:, None] == found.volume_reports[volumes][None, :]
    for direction, s, c in (("report_to_volume", similarity, correct), ("volume_to_report", similarity.T, correct.T)):
        result[direction] = np.array([slow_rank(s[q], c[q], first) for q in range(len(s))])
    return result


def test_every_gallery_is_what_its_name_says(tmp_path):
    found = embedded()
    exclude = tmp_path / "no_chest.txt"
    exclude.write_text(f"{found.scans[0]}.nii.gz\n{found.volume_ids[10]}\n{found.patients[20]}\n")
    evaluation = Retrieval(RetrievalOptions(exclude=str(exclude)))
    result = evaluation.full(found)
    assert list(result["galleries"]) == list(galleries.GALLERIES) and result["need_exclude"] == []
    n, of_report = len(found.volumes), {name: i for i, name in enumerate(found.report_ids.tolist())}
    every, report = list(range(n)), [of_report[name] for name in found.volume_reports.tolist()]
    named = {found.volume_ids[10]}
    chest = [
        i for i in every
        if found.scans[i] != found.scans[0] and found.volume_ids[i] not in named and found.patients[i] != found.patients[20]
    ]  # fmt: skip

    def first_of_scan(rows):
        return [i for i in rows if not any(found.scans[j] == found.scans[i] for j in rows if j < i)]

    def new_text(rows):
        texts = [found.report_texts[report[i]] for i in rows]
        return [i for place, i in enumerate(rows) if texts[place] not in texts[:place]]

    expected = {  # volumes, reports, only the own one correct, of ties the first
        "distinct": (every, sorted({report[i] for i in every}), False, False),
        "all": (every, report, False, False),
        "one_per_scan": (first_of_scan(every), sorted({report[i] for i in every}), False, False),
        "chest": (chest, sorted({report[i] for i in chest}), False, False),
        "chest_one_per_scan": (first_of_scan(chest), sorted({report[i] for i in chest}), False, False),
        "ct_clip": (every, report, True, True),
        "colipri": (rows := new_text(first_of_scan(chest)), [report[i] for i in rows], False, False),
        "radfinder": (rows := first_of_scan(every), [report[i] for i in rows], True, True),
    }
    flat, arrays = evaluation.flat(result), evaluation.arrays(found)
    for name, (volumes, reports, own, first) in expected.items():
        one = result["galleries"][name]
        assert (one["volumes"], one["reports"]) == (len(volumes), len(reports)), name
        for direction, ranks in brute(found, volumes, reports, own, first).items():
            assert one[f"{direction}/median_rank"] == np.median(ranks), name
            for k in (1, 5, 10):
                assert one[f"{direction}/recall@{k}"] == pytest.approx(np.mean(ranks <= k)), (name, direction, k)
                assert flat[f"retrieval/gallery={name}/{direction}/recall@{k}"] == one[f"{direction}/recall@{k}"]
            assert arrays[f"{name}/{direction}/ranks"].tolist() == ranks.tolist()
    assert result["report_to_volume/recall@5"] == result["galleries"]["distinct"]["report_to_volume/recall@5"]
    assert evaluation.metrics(found)["report_to_volume/recall@5"] == result["report_to_volume/recall@5"]
    assert [section.title for section in evaluation.sections(result)] == ["Retrieval", "Retrieval by gallery"]


def test_draws_of_patients_start_with_the_numbers_themselves():
    found, evaluation = embedded(seed=3), Retrieval()
    result = evaluation.full(found)
    flat, drawn = (
        evaluation.flat(result),
        evaluation.resampled(evaluation.arrays(found), PatientDraws(found.patients, 50)),
    )
    for name, values in drawn.items():
        assert values.shape == (51,) and values[0] == pytest.approx(flat[name])
    low, high = flat["retrieval/gallery=distinct/report_to_volume/recall@5_95"]
    assert low <= flat["retrieval/gallery=distinct/report_to_volume/recall@5"] <= high


def test_galleries_of_chest_scans_need_a_list(tmp_path):
    found = embedded()
    assert Retrieval().full(found)["need_exclude"] == ["chest", "chest_one_per_scan", "colipri"]
    with pytest.raises(UserError, match="--exclude FILE"):
        Retrieval(RetrievalOptions(galleries=("chest",))).full(found)
    everyone = tmp_path / "all.txt"
    everyone.write_text("\n".join(set(found.patients.tolist())))
    with pytest.raises(UserError, match="45 volumes none is left"):
        Retrieval(RetrievalOptions(galleries=("chest",), exclude=str(everyone))).full(found)
    problems = Retrieval.problems
    assert "choose one of distinct" in problems(RetrievalOptions(galleries=("dinstinct",)), None)[0]
    assert "set evaluations.retrieval.exclude" in problems(RetrievalOptions(galleries=("colipri",)), None)[0]
    assert "no such file" in problems(RetrievalOptions(exclude="/nothing"), None)[0]


def test_volumes_without_a_report_are_left_out_and_counted():
    found = embedded()
    reports = found.volume_reports.copy()
    reports[:3] = ["", "elsewhere", ""]  # the whole first scan and one more: two reports lose their volumes
    one = Retrieval().full(replace(found, volume_reports=reports))["galleries"]["distinct"]
    without = sum(name not in reports for name in found.report_ids)
    assert one["left_out"] == {"volumes without a report": 3, "reports without a volume": without} and without
    assert one["volumes"] == 42


def slow_map(volumes, labels, k, same):
    """SPECTRE's definition, by sorting; `same(i, j)`: j is not to be found by i."""
    similarity, values = (volumes.astype(np.float64) @ volumes.T.astype(np.float64)).round(9), []
    for i in range(len(volumes)):
        others = [j for j in range(len(volumes)) if not same(i, j)]
        good = {j for j in others if (labels[j] == labels[i]).all()}
        order = sorted(others, key=lambda j: (-similarity[i, j], j in good))[:k]
        hits = [j in good for j in order]
        precisions = [sum(hits[: r + 1]) / (r + 1) for r in range(len(order)) if hits[r]]
        if good:
            values.append(sum(precisions) / min(len(good), k))
    return np.mean(values)


def test_mean_average_precision_leaves_the_query_out():
    found = embedded(labels=3, unknown=0.03)
    result = VolumeRetrieval().full(found)
    known = (found.labels >= 0).all(axis=1)
    volumes, labels, patients = found.volumes[known], found.labels[known], found.patients[known]
    assert result["volumes_with_unknown_labels"] == (~known).sum() > 0
    for k in volume_retrieval.KS:
        assert result[f"map@{k}"] == pytest.approx(slow_map(volumes, labels, k, lambda i, j: i == j))
        others = slow_map(volumes, labels, k, lambda i, j: patients[i] == patients[j])
        assert result[f"map_other_patients@{k}"] == pytest.approx(others)
    low, high = result["map@10_95"]
    assert low <= result["map@10"] <= high
    drawn = VolumeRetrieval.resampled(VolumeRetrieval().arrays(found), PatientDraws(found.patients, 20))
    flat = VolumeRetrieval().flat(result)
    assert all(values[0] == pytest.approx(flat[name]) for name, values in drawn.items())


def test_average_precision_over_all_neighbours_is_that_of_scikit_learn(monkeypatch):
    rng = np.random.default_rng(5)
    volumes, labels = unit(rng.normal(size=(25, 7))), rng.integers(0, 2, (25, 2)).astype(np.int8)
    monkeypatch.setattr(volume_retrieval, "KS", (24,))
    ours = volume_retrieval._average_precision(volumes, labels, np.arange(25))[:, 0]
    for i in range(25):
        others = np.arange(25) != i
        same = (labels[others] == labels[i]).all(axis=1)
        if same.any():
            assert ours[i] == pytest.approx(average_precision_score(same, volumes[others] @ volumes[i]))


def script_of_ct_clip(volumes, labels, ks):
    """The control flow of CT-CLIP's volume_to_volume.py, with both of its faults."""
    gallery = [i for i in range(len(volumes)) if labels[i].sum() != 0]
    similarity, everything, written = (volumes.astype(np.float64) @ volumes.T.astype(np.float64)).round(9), [], []
    for k in ks:
        for i in range(len(volumes)):
            order = sorted(gallery, key=lambda j: similarity[i, j], reverse=True)[:k]
            ratios = [(labels[i] & labels[j]).sum() / (labels[i] | labels[j]).sum() for j in order]
            everything.append(np.mean(ratios))
        written.append(np.mean(everything))
    return written


def test_the_figure_of_ct_clip_is_reproduced_with_its_faults_and_ours_has_none():
    found = embedded(labels=3, seed=7)
    result = VolumeRetrieval().full(found)
    expected = script_of_ct_clip(found.volumes, found.labels, volume_retrieval.KS)
    assert [result[f"legacy_ct_clip_map@{k}"] for k in volume_retrieval.KS] == pytest.approx(expected)
    for k in volume_retrieval.KS:  # each k by itself, without the query
        means = []
        similarity = (found.volumes.astype(np.float64) @ found.volumes.T.astype(np.float64)).round(9)
        for i in np.flatnonzero(found.labels.sum(axis=1)):
            order = sorted((j for j in range(len(found.labels)) if j != i), key=lambda j: (-similarity[i, j], j))[:k]
            a, others = found.labels[i], found.labels[order]
            means.append(np.mean((a & others).sum(axis=1) / (a | others).sum(axis=1)))
        assert result[f"jaccard@{k}"] == pytest.approx(np.mean(means))


def test_volumes_without_labels_have_no_numbers():
    found = embedded()
    nothing = VolumeRetrieval().full(replace(found, labels=found.labels[:, :0], label_names=()))
    assert nothing["volumes"] == 0 and np.isnan(nothing["map@10"])
    assert VolumeRetrieval().section(nothing).table.rows


MEMORY = """
import resource, numpy as np
from mg3d_jax.evaluation.ranking import neighbours, ranks_by_group
rng = np.random.default_rng(0)
a, b = (rng.normal(size=(8000, 16)).astype(np.float32) for _ in range(2))
ids = np.arange(8000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ranks_by_group(a, b, ids, ids, block_bytes=8 << 20)
neighbours(a[:3000], 50, candidates=np.arange(3000), excluded=np.arange(3000), block_bytes=8 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_large_galleries_are_searched_in_bounded_memory():
    """8,000 x 8,000 similarities would be 256 MB; a block and its masks stay near the bound that is asked for."""
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment(), capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64
