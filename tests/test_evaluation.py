"""Retrieval against closed forms and slow counts, the field's known bugs, and an evaluation in the loop on a mesh."""

import jax
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from support import records_of, tiny_config

from mg3d_jax import sharding
from mg3d_jax.data import pipeline
from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece
from mg3d_jax.evaluation import ranking, retrieval
from mg3d_jax.evaluation.online import OnlineEvaluation
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training import state as state_lib


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


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


def test_what_is_not_a_number_counts_against():
    nan, similarity = np.nan, np.array([[0.9, 0.1, 0.2], [0.9, 0.1, 0.2], [0.9, 0.1, 0.2]])
    similarity[1, 0], similarity[2, 1] = nan, nan
    assert ranking.ranks(similarity, np.arange(3), np.zeros(3, int)).tolist() == [1, 3, 2]


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


def plain_embeddings(setup, params, tokenizer, records, names):
    """Volumes, reports and prompts on one device, text by text: [n, k], {report: [k]}, [2 L, k]."""
    model, params, size = setup.model, jax.device_get(params), setup.config.data.max_sentences
    short = ReportTokenizer(tokenizer.tokenizer, setup.config.objectives["alignment"].sentence_tokens, size)
    windowed = step_inputs.window(np.stack([r.volume for r in records]), setup.config.data.windows)
    volumes = jax.jit(lambda v: model.apply({"params": params}, v, method="embed_volume")["volume_embedding"])(windowed)
    embed = jax.jit(lambda text: model.apply({"params": params}, text, method="embed_report")["report_embedding"])

    def sentence(text):
        fields = {name: array[None] for name, array in short([text]).items() if name != "word_index"}
        return unit(np.asarray(embed(fields), np.float64)[0])

    reports = {r.report_id: unit(np.mean([sentence(s) for s in r.sentences], axis=0)) for r in records}
    prompts = [sentence(f"{name} is {word}.") for word in ("present", "not present") for name in names]
    return unit(np.asarray(volumes, np.float64)), reports, np.array(prompts)


def test_evaluation_in_the_loop_is_a_slow_evaluation_on_one_device(tiny_data, monkeypatch):
    """13 held-out records in batches of 6, on a mesh of 2 x 1 x 2; every record is decoded once per evaluation."""
    data, config = pipeline.PreparedData((tiny_data["valid"],)), tiny_config(data__batch_size=6)
    records, names = records_of(data), data.label_names
    words = train_wordpiece({s for r in records for s in r.sentences}, 400)
    tokenizer = ReportTokenizer(words, config.data.max_tokens, config.data.max_sentences)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    setup = state_lib.build(config, tokenizer.vocab_size, mesh, steps=10)
    rng = np.random.default_rng(6)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), setup.abstract["params"])
    params, evaluation = jax.device_put(params, setup.shardings["params"]), OnlineEvaluation(setup, tokenizer, data)
    decoded, read = [], data.read
    monkeypatch.setattr(data, "read", lambda index, out=None: decoded.append(index) or read(index, out))
    found = evaluation.metrics(params)
    assert sorted(decoded) == [*range(13), *[12] * 5]  # the last batch is filled up with the last record
    assert evaluation.metrics(params) == found and len(decoded) == 36

    volumes, reports, prompts = plain_embeddings(setup, params, tokenizer, records, names)
    margin = volumes @ prompts[: len(names)].T - volumes @ prompts[len(names) :].T
    labels = np.stack([r.labels for r in records])
    usable = [i for i in range(len(names)) if {0, 1} <= set(labels[:, i])]
    areas = {names[i]: roc_auc_score(labels[labels[:, i] >= 0, i], margin[labels[:, i] >= 0, i]) for i in usable}
    assert {key for key in found if key.startswith("auroc/")} == {f"auroc/{name}" for name in areas} and areas
    for name, area in areas.items():
        assert found[f"auroc/{name}"] == pytest.approx(area)
    assert found["auroc_macro"] == pytest.approx(np.mean(list(areas.values())))
    gallery, ids = np.stack(list(reports.values())), np.array(list(reports))
    correct = ids[:, None] == np.array([r.report_id for r in records])[None, :]
    for k in (1, 5):
        assert found[f"report_to_volume/recall@{k}"] == slow_recall(gallery @ volumes.T, correct, k)
        assert found[f"volume_to_report/recall@{k}"] == slow_recall(volumes @ gallery.T, correct.T, k)
