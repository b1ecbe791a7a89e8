"""Global alignment with single-sentence views and centred embeddings, against loops over the NumPy reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import contrastive as reference
from support import SPECIAL, quick_state, random_batch, tiny_builder, tiny_config, with_plain_towers

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.models.mg3d import text_embedding, volume_embedding
from mg3d_jax.objectives.alignment import AlignmentOptions, embedding_statistics, make
from mg3d_jax.objectives.alignment import loss as alignment
from mg3d_jax.objectives.base import CENTERS, REPORT_BIAS, VOLUME_BIAS, Context
from mg3d_jax.objectives.contrastive import info_nce
from mg3d_jax.objectives.views import random_groups, text_views
from mg3d_jax.options import Group
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib

SCALE = 5.0


def features(batch=6, views=3, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    found = {
        "volume_embedding": rng.normal(size=(batch, dim)) + 3.0,
        "view_embeddings": rng.normal(size=(batch, views, dim)) - 2.0,
    }
    found = {name: array.astype(np.float32) for name, array in found.items()}
    mask = rng.random((batch, views)) < 0.8
    mask[:, 0] = True
    ids = rng.integers(0, 4, (batch, views)).astype(np.int32)
    return found | {"view_mask": mask, "view_id": ids, "logit_scale": np.float32(SCALE)}


def batch_of(count, report_ids=None):
    ids = np.arange(count, dtype=np.int32) if report_ids is None else np.asarray(report_ids, np.int32)
    return {"report_id": ids, "valid": np.ones(count, bool)}


def slow(found, batch, centered):
    """Mean over the sentences of the reference InfoNCE, whose groups are found pair by pair."""
    volume, text = (np.float64(found[name]) for name in ("volume_embedding", "view_embeddings"))
    if centered:
        volume = volume - volume.mean(0)
        text = text - text[found["view_mask"]].mean(0)
    losses = []
    for k in range(text.shape[1]):
        same = (batch["report_id"][:, None] == batch["report_id"]) | (
            found["view_id"][:, None, k] == found["view_id"][None, :, k]
        )
        valid = found["view_mask"][:, k]
        for queries, keys in ((volume, text[:, k]), (text[:, k], volume)):
            for i in np.flatnonzero(valid):
                others = [j for j in np.flatnonzero(valid) if j != i and not same[i, j]]
                logits = [SCALE * reference.unit(queries[i]) @ reference.unit(keys[j]) for j in [i, *others]]
                losses.append(np.log(np.sum(np.exp(logits))) - logits[0])
    return np.mean(losses)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("report_ids", [None, [0, 1, 2, 0, 4, 4]])
def test_views_equal_the_slow_mean_over_sentences(center, report_ids):
    options = tiny_config(objectives__alignment__center=center).objectives["alignment"]
    found, batch = features(), batch_of(6, report_ids)
    loss, metrics = alignment(found, batch, options)
    assert float(loss) == pytest.approx(slow(found, batch, center), rel=1e-5)
    assert any(name.startswith(CENTERS) for name in metrics) == center


def test_centred_loss_does_not_see_a_common_part_and_gives_its_bias_no_gradient():
    options = tiny_config(objectives__alignment__center=True).objectives["alignment"]
    found, batch = features(), batch_of(6)

    def loss(shift):
        moved = found | {
            "volume_embedding": found["volume_embedding"] + shift,
            "view_embeddings": found["view_embeddings"] - shift,
        }
        return alignment(moved, batch, options)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.zeros(8))
    assert float(loss(jnp.full(8, 2.0))) == pytest.approx(float(value), rel=1e-4)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_the_biases_follow_the_means_so_that_embeddings_become_centred():
    config = config_lib.typed(with_plain_towers(tiny_builder(optimizer__learning_rate=0.0)))
    setup = state_lib.build(config, 400, sharding.make_mesh(config.mesh, jax.devices()[:1]), steps=10)
    batch = sharding.to_global(random_batch(config, 400), setup.mesh, config.data.batch_size)
    state, step = quick_state(setup), step_lib.train_step(setup, SPECIAL)

    inputs = step_lib.step_inputs.window(batch["volume"], config.data.windows)
    embed = jax.jit(lambda p: setup.model.apply({"params": p}, inputs, method="embed_volume")["volume_embedding"])
    before = np.linalg.norm(np.asarray(embed(state["params"])).mean(0))
    for _ in range(30):
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics["loss"])
    after = np.linalg.norm(np.asarray(embed(state["params"])).mean(0))
    assert after < 0.1 * before  # 0.9 ** 30 = 0.04
    assert not any(name.startswith(CENTERS) for name in metrics)


def test_the_bias_of_directions_follows_minus_their_mean_and_texts_are_embedded_with_it():
    mean, bias = np.array([0.6, 0.2], np.float32), np.zeros(2, np.float32)
    params = {REPORT_BIAS: bias}
    for _ in range(60):
        params, left = step_lib.follow_centers(params, {CENTERS + REPORT_BIAS: mean, "loss": 1.0}, {REPORT_BIAS: 1.0})
    np.testing.assert_allclose(params[REPORT_BIAS], -mean, atol=2e-3)
    assert left == {"loss": 1.0}
    direction = np.array([[0.6, 0.8]], np.float32)
    np.testing.assert_allclose(text_embedding(params, direction), [[0, 1]], atol=5e-3)
    np.testing.assert_allclose(text_embedding({}, 2 * direction), direction, rtol=1e-6)
    known = {VOLUME_BIAS: -mean}
    expected = text_embedding({REPORT_BIAS: -mean}, direction)
    np.testing.assert_allclose(volume_embedding(known, 7 * direction), expected, atol=1e-6)
    np.testing.assert_allclose(volume_embedding({}, 7 * direction), direction, rtol=1e-6)
    frozen, _ = step_lib.follow_centers({REPORT_BIAS: bias}, {CENTERS + REPORT_BIAS: mean}, {REPORT_BIAS: 0.0})
    assert not np.any(frozen[REPORT_BIAS])


def test_groups_of_two_kinds_are_joined():
    """A pair that shares either the report or the sentence is no negative; with one key the other kind is."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(5, 4)).astype("f"), rng.normal(size=(5, 4)).astype("f")
    a, b = np.array([0, 0, 1, 2, 3]), np.array([0, 1, 2, 2, 3])
    joined = info_nce(x, y, temperature=0.2, group_ids=np.stack([a, b], 1).astype(np.int32))[0]
    one = info_nce(x, y, temperature=0.2, group_ids=a.astype(np.int32))[0]
    assert float(joined) < float(one)


def test_embedding_statistics_are_means_over_rows_and_over_pairs():
    rng = np.random.default_rng(3)
    rows, mask = rng.normal(size=(4, 3, 5)).astype(np.float32) + 1, rng.random((4, 3)) < 0.6
    norm, cosine = jax.jit(embedding_statistics)(rows, mask)
    kept = np.float64(rows[mask])
    pairs = [reference.unit(a) @ reference.unit(b) for i, a in enumerate(kept) for j, b in enumerate(kept) if i != j]
    np.testing.assert_allclose([norm, cosine], [np.linalg.norm(kept, axis=1).mean(), np.mean(pairs)], rtol=1e-5)
    collapsed = np.tile(rows[:1], (4, 1, 1))
    np.testing.assert_allclose(embedding_statistics(collapsed[:, 0], np.ones(4, bool))[1], 1.0, rtol=1e-5)
    np.testing.assert_allclose(embedding_statistics(np.eye(4), np.ones(4, bool)), [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(embedding_statistics(rows, np.zeros((4, 3), bool)), [0.0, 0.0])  # nobody there


def test_alignment_says_how_the_embeddings_lie_before_they_are_centred():
    found, batch = features(), batch_of(6)
    batch["valid"][4:] = False
    options = tiny_config().objectives["alignment"]
    metrics = alignment(found, batch, options)[1]
    expected = embedding_statistics(found["volume_embedding"][:4], np.ones(4, bool))
    np.testing.assert_allclose([metrics["volume_norm"], metrics["volume_cosine"]], expected, rtol=1e-5)
    expected = embedding_statistics(found["view_embeddings"][:4], found["view_mask"][:4])
    np.testing.assert_allclose([metrics["report_norm"], metrics["report_cosine"]], expected, rtol=1e-5)


@pytest.mark.parametrize("center", [False, True])
def test_groups_of_sentences_equal_the_slow_mean_over_sizes(center):
    """Each group of sentences is one text, the mean of its unit vectors, with `center` less that of the batch; groups of the
    same sentences are no negatives."""
    found, mean_of = features(views=4), {}
    rng = np.random.default_rng(3)
    groups = rng.random((6, 2, 4)) < 0.5
    groups[:, :, 0] = True
    groups[1] = groups[4] = [[True, False, False, False]] * 2
    found["view_id"] = np.arange(24, dtype=np.int32).reshape(6, 4) * 7 + 1
    found["view_id"][4, 0] = found["view_id"][1, 0]  # 1 and 4 say the same in both groups
    found |= {"view_groups": groups}
    losses, batch = [], batch_of(6)
    batch["valid"][5] = False
    volume, texts = found["volume_embedding"], found["view_embeddings"]
    volume_mean = (volume / np.linalg.norm(volume, axis=-1, keepdims=True))[:5].mean(0)
    if center:
        volume = volume / np.linalg.norm(volume, axis=-1, keepdims=True) - volume_mean
    for size in range(2):
        inside = (groups[:, size] & found["view_mask"])[..., None]
        units = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
        text = np.sum(units * inside, axis=1) / np.sum(inside, axis=1)
        mean_of[size] = text[:5].mean(0)
        text = text - mean_of[size] if center else text
        same = np.arange(6, dtype=np.int32)
        same[4] = 1
        known = {"temperature": 1 / SCALE, "group_ids": same, "valid": batch["valid"]}
        losses.append(info_nce(volume, text, **known)[0])
    options = AlignmentOptions(report_view="subsets", center=center, learn_temperature=True)
    value, metrics = alignment(found, batch, options)
    assert value == pytest.approx(float(np.mean(losses)), rel=1e-5)
    if center:
        np.testing.assert_allclose(metrics[CENTERS + REPORT_BIAS], (mean_of[0] + mean_of[1]) / 2, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics[CENTERS + VOLUME_BIAS], volume_mean, rtol=1e-4, atol=1e-6)
        longer = found | {"volume_embedding": found["volume_embedding"] * np.array([1, 1, 50, 1, 1, 1])[:, None]}
        assert alignment(longer, batch, options)[0] == pytest.approx(float(value), rel=1e-4)  # lengths do not matter
    else:
        assert not any(name.startswith(CENTERS) for name in metrics)


def test_random_groups_have_their_sizes_and_only_what_is_there():
    there = np.array([[True] * 5, [True, True, False, False, False], [False] * 5])
    groups = np.asarray(random_groups(jax.random.key(0), jnp.asarray(there), (1, 3, 0)))
    assert groups.shape == (3, 3, 5) and not (groups & ~there[:, None]).any()
    assert groups.sum(axis=-1).tolist() == [[1, 3, 5], [1, 2, 2], [0, 0, 0]]
    draws = np.stack([np.asarray(random_groups(jax.random.key(n), jnp.asarray(there), (1,))) for n in range(40)])
    assert draws[:, 0, 0].any(axis=0).all()  # every sentence gets its turn


def test_a_statement_is_read_in_its_other_wording_as_often_as_asked():
    sentences = (
        "Hiatal hernia is present.",
        "Clinical correlation is recommended.",
        "No pleural effusion was detected.",
    )
    config = tiny_config(data__max_sentences=4)
    context = Context(config.data, config.model, 400, Group(SPECIAL))
    options = AlignmentOptions(report_view="sentences", report_sentences=4, sentence_tokens=8, reworded=0.3)
    texts: list[str] = []

    def encode(said):
        texts.extend(said)
        return [[2, 10 + texts.index(text), 3] for text in said]

    made = make(sentences, encode, options, context)
    assert made["sentence_lengths"].tolist() == [[3, 3], [3, 0], [3, 3], [0, 0]]  # advice has no other wording
    assert texts[:3] == list(sentences) and texts[3] != sentences[0] and texts[4] != sentences[2]
    batch = {name: jnp.asarray(array)[None] for name, array in made.items()}
    draw = jax.jit(jax.vmap(lambda key: text_views(key, batch, 4, context, reworded=0.3)))
    views = draw(jax.random.split(jax.random.key(0), 600))
    ids, there = np.asarray(views["token_ids"])[:, 0, :, 1], np.asarray(views["there"])[:, 0]
    assert (there.sum(axis=1) == 3).all()
    shares = {name: np.mean((ids == 10 + name).any(axis=1)) for name in range(5)}
    assert shares[0] + shares[3] == 1 and shares[2] + shares[4] == 1 and shares[1] == 1
    assert shares[3] == pytest.approx(0.3, abs=0.07) and shares[4] == pytest.approx(0.3, abs=0.07)
    by_hash = np.asarray(views["view_id"])[:, 0]
    assert len(set(by_hash[ids == 10])) == 1 and set(by_hash[ids == 10]) == set(by_hash[ids == 13])  # one sentence
    plain = make(sentences, encode, dataclasses.replace(options, reworded=0.0), precomputing(context))
    assert plain["sentences"].shape == (4, 1, 8)


def precomputing(context):
    encoder = dataclasses.replace(context.model.report_encoder, precompute=True)
    return dataclasses.replace(context, model=dataclasses.replace(context.model, report_encoder=encoder))
