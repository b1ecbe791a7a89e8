"""Prompts as classes: which labels are asked about, what the loss is, and that a tiny run learns to answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_builder, tiny_config, with_plain_towers

from mg3d_jax import config as config_lib
from mg3d_jax.config import checks
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.data.order import RecordOrder
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.embed import Embedder
from mg3d_jax.interop import finetune
from mg3d_jax.objectives.base import DIRECTION_BIASES, Context
from mg3d_jax.options import Group
from mg3d_jax.tasks.vocabulary import VOCABULARY, VocabularyOptions
from mg3d_jax.trainer import first_state
from mg3d_jax.training import loop
from mg3d_jax.training.restore import restore_run
from mg3d_jax.training.writers import read_metrics

NAMES = ("Nodule", "Effusion", "Hernia")
OPTIONS = VocabularyOptions(1.0, NAMES, labels_per_step=2, tokens=8)


def context() -> Context:
    config = tiny_config()
    return Context(config.data, config.model, 400, Group({"[PAD]": 0, "[CLS]": 2, "[SEP]": 3}))


def words(texts):
    """A tokenizer of one id per word, from 5 on."""
    known = sorted(
        {
            word
            for name in NAMES
            for text in ("{} is present.", "{} is not present.")
            for word in text.format(name).split()
        }
    )
    return [[2, *(5 + known.index(word) for word in text.split()), 3] for text in texts]


def drawn(labels: np.ndarray, seed: int = 0):
    made = VOCABULARY.texts.make((), words, OPTIONS, context())
    batch = {name: jnp.asarray(np.stack([array] * len(labels))) for name, array in made.items()}
    return made, VOCABULARY.draw(jax.random.key(seed), batch | {"labels": jnp.asarray(labels)}, OPTIONS, context())


def test_known_labels_are_asked_about_with_both_prompts():
    labels = np.array([[1, 0, -1], [-1, -1, 0]], np.int8)
    made, found = drawn(labels)
    asked = found["drawn_statements"]
    assert asked["token_ids"].shape == (2, 2, 2, 8) and asked["kind"].shape == (2, 2)
    assert set(np.asarray(asked["kind"])[0].tolist()) == {1, 2}  # the unknown one is not among them
    assert sorted(np.asarray(asked["kind"])[1].tolist()) == [0, 2]
    for row, place in np.argwhere(np.asarray(asked["kind"]) > 0):
        label = int(np.flatnonzero(labels[row] == {1: 1, 2: 0}[int(asked["kind"][row, place])])[0])
        np.testing.assert_array_equal(asked["token_ids"][row, place], made["prompts"][label])
    assert any(
        not np.array_equal(found["drawn_statements"]["kind"], drawn(labels, seed)[1]["drawn_statements"]["kind"])
        for seed in range(1, 6)
    )


def test_the_loss_is_the_cross_entropy_of_a_softmax_over_the_two_prompts():
    rng = np.random.default_rng(0)
    volume, texts = rng.normal(size=(3, 5)), rng.normal(size=(3, 2, 2, 5))
    kind, valid = np.array([[1, 2], [0, 1], [2, 2]]), np.array([True, True, False])
    volume /= np.linalg.norm(volume, axis=-1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    features = {"volume_direction": volume, "statement_directions": texts, "statement_kind": kind}
    found, metrics = VOCABULARY.loss(jax.tree.map(jnp.asarray, features), {"valid": jnp.asarray(valid)}, OPTIONS)
    losses, right = [], []
    for row, place in [(0, 0), (0, 1), (1, 1)]:
        logits = [volume[row] @ text / 0.1 for text in texts[row, place]]
        side = {1: 0, 2: 1}[kind[row, place]]
        losses.append(np.log(np.exp(logits).sum()) - logits[side])
        right.append(logits[side] == max(logits))
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(right))


def test_what_cannot_be():
    on = {"tasks__vocabulary__weight": 1.0}
    for more, says in (
        ({}, "labels is empty"),
        ({"tasks__vocabulary__labels": NAMES, "tasks__vocabulary__labels_per_step": 4}, "from 1 to the 3 labels"),
        ({"tasks__vocabulary__labels": NAMES, "tasks__vocabulary__present": "yes"}, "must stand for the label"),
        ({"tasks__vocabulary__labels": NAMES, "objectives__negation__weight": 1.0}, "switch one of them off"),
    ):
        with pytest.raises(UserError, match=says):
            checks.validate(tiny_config(**on, **more))
    with pytest.raises(UserError, match=r"has 5 tokens: set tasks\.vocabulary\.tokens to as many"):
        VOCABULARY.texts.make((), words, VocabularyOptions(1.0, NAMES, tokens=4), context())


def zero_shot_loss(source, run):
    """Of the first batch of `run`, from what evaluations of the `source` compare; and the source's mean directions."""
    restored = restore_run(source)
    embedder = Embedder.of_run(restored, 8)
    order = RecordOrder([len(run.data)], seed=run.config.seed)
    records = [run.data.read(order[position]) for position in range(run.config.data.batch_size)]
    volumes = np.stack([embedder.volume(restored.params, record.volume) for record in records])
    entries = [
        [[pattern.format(name)]] for pattern in ("{} is present.", "{} is not present.") for name in ABNORMALITIES
    ]
    present, absent = np.split(embedder.texts(restored.params, embedder.tokenize(entries)), 2)
    margin = volumes @ (present - absent).T / run.config.tasks["vocabulary"].temperature
    labels = np.stack([record.labels for record in records])
    losses = np.log1p(np.exp(np.where(labels == 1, -margin, margin)))
    return losses[labels != -1].mean(), {name: restored.params[name] for name in DIRECTION_BIASES}


def test_it_starts_at_the_zero_shot_scores_of_the_run_and_learns(tiny_data, tmp_path):
    """The loss of step 0 is that of the source's zero-shot similarities, whose embeddings are less the mean directions that
    the centred run keeps; 100 steps later it is smaller."""
    source, data = tmp_path / "source", {"data__patients_percent": 34.0, "training__log_every": 1}
    pretrain = with_plain_towers(tiny_builder(
        tiny_data["train"], objectives__alignment__report_view="subsets", training__steps=3, optimizer__learning_rate=0.05,
        training__checkpoint_every=3, **data,
    ))  # fmt: skip
    assert loop.Trainer(config_lib.typed(pretrain), source).run() == 0
    config = with_plain_towers(tiny_builder(
        tiny_data["train"], objectives__alignment__weight=0.0, tasks__vocabulary__weight=1.0,
        tasks__vocabulary__labels=ABNORMALITIES, tasks__vocabulary__labels_per_step=18, training__steps=100,
        training__checkpoint_every=100, optimizer__learning_rate=0.05, tasks__vocabulary__tokens=32, **data,
    ))  # fmt: skip
    finetune.start_from(config, str(source), reports=True, volume_size=(16, 16, 16))
    config.optimizer.freeze = (".*_direction_bias",)
    run = loop.Trainer(config_lib.typed(config), tmp_path / "run", initialize=first_state)
    assert run.run() == 0
    rows = read_metrics(tmp_path / "run", "train")
    expected, biases = zero_shot_loss(source, run)
    assert rows[0]["loss"] == pytest.approx(expected, abs=1e-5)
    kept = jax.device_get(restore_run(tmp_path / "run").params)
    for name, bias in biases.items():
        assert np.linalg.norm(bias) > 0.05
        np.testing.assert_array_equal(kept[name], bias)
    assert np.mean([row["loss"] for row in rows[-10:]]) < 0.85 * rows[0]["loss"]


def test_records_of_other_labels(tiny_data, tmp_path):
    wrong = tiny_config(
        tiny_data["train"],
        tasks__vocabulary__weight=1.0,
        tasks__vocabulary__labels=NAMES,
        tasks__vocabulary__labels_per_step=1,
    )
    assert len(PreparedData((tiny_data["train"],)).label_names) == 18
    with pytest.raises(UserError, match=r"the records have 18 labels, tasks\.vocabulary\.labels names 3"):
        loop.Trainer(wrong, tmp_path / "wrong").run()
