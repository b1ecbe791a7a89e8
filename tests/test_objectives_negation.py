"""Sentences against their opposites: the texts of a report, what is drawn of them, and the loss."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SPECIAL, tiny_config

from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.objectives import negation
from mg3d_jax.objectives.base import Context
from mg3d_jax.objectives.negation import ABSENT, NEGATION, PRESENT, STATE, NegationOptions
from mg3d_jax.options import Group

SENTENCES = (
    "Heart contour and size are normal.",
    "Clinical correlation is recommended.",
    "No pleural effusion was detected.",
    "Hiatal hernia",
    "There are emphysematous changes in both lungs.",
)
OPTIONS = NegationOptions(weight=1.0, statements=3, tokens=24, wordings=2)


def context(max_sentences: int = 8) -> Context:
    config = tiny_config(data__max_sentences=max_sentences)
    return Context(config.data, config.model, 400, Group(SPECIAL))


@pytest.fixture(scope="module")
def tokenizer() -> ReportTokenizer:
    return ReportTokenizer(train_wordpiece([*SENTENCES, "is observed", "there is no", "not present"] * 9, 400), 64, 8)


def test_a_report_gives_its_statements_with_their_opposites(tokenizer: ReportTokenizer) -> None:
    made = negation.make(SENTENCES, tokenizer.encode, OPTIONS, context())
    assert made["statement_kind"].tolist() == [STATE, ABSENT, PRESENT, PRESENT, 0, 0, 0, 0]
    lengths = made["statement_lengths"]
    assert (lengths[:4] > 2).all() and (lengths[4:] == 0).all()
    for row, wording, side in np.ndindex(4, 2, 2):
        ids = made["statements"][row, wording, side]
        end = lengths[row, wording, side]
        assert ids[0] == tokenizer.special["[CLS]"] and ids[end - 1] == tokenizer.special["[SEP]"]
        assert (ids[end:] == 0).all() and (ids[:end] != 0).all()
        assert not np.array_equal(*made["statements"][row, wording])
    one = negation.make(SENTENCES, tokenizer.encode, dataclasses.replace(OPTIONS, wordings=1), context())
    assert np.array_equal(one["statements"][:, 0], made["statements"][:, 0])  # more of them change none
    many = negation.make(SENTENCES, tokenizer.encode, dataclasses.replace(OPTIONS, wordings=20), context())
    assert len({many["statements"][3, wording, 1].tobytes() for wording in range(20)}) > 4
    again = negation.make(SENTENCES, tokenizer.encode, OPTIONS, context())
    assert all(np.array_equal(made[name], again[name]) for name in made)


def test_other_reports_say_the_same_in_other_words(tokenizer: ReportTokenizer) -> None:
    texts = {
        negation.make((SENTENCES[3], f"Other words {n}"), tokenizer.encode, OPTIONS, context())["statements"][
            0
        ].tobytes()
        for n in range(30)
    }
    assert len(texts) > 8


def test_a_wording_that_does_not_fit_is_no_loss_of_its_statement(tokenizer: ReportTokenizer) -> None:
    wordings = dataclasses.replace(OPTIONS, wordings=20)
    lengths = negation.make(SENTENCES[3:4], tokenizer.encode, wordings, context())["statement_lengths"][0]
    most = int(lengths.max(axis=-1).min())  # of some pairs, not of all
    assert most < lengths.max()
    made = negation.make(SENTENCES[3:4], tokenizer.encode, dataclasses.replace(wordings, tokens=most), context())
    assert made["statement_kind"][0] == PRESENT and (made["statement_lengths"][0] > 2).all()


def test_a_statement_that_does_not_fit_is_left_out(tokenizer: ReportTokenizer) -> None:
    short = NegationOptions(weight=1.0, tokens=6)
    made = negation.make(SENTENCES, tokenizer.encode, short, context())
    assert (made["statement_lengths"] <= 6).all()
    none = negation.make((), tokenizer.encode, OPTIONS, context())
    assert not any(array.any() for array in none.values())
    first = negation.make(SENTENCES, tokenizer.encode, OPTIONS, context(max_sentences=3))
    assert first["statement_kind"].tolist() == [STATE, ABSENT, 0]


def drawn(kind: list[int], options: NegationOptions = OPTIONS, draws: int = 400) -> np.ndarray:
    """The kinds that are drawn [draws, V] for a report with statements of these kinds."""
    count = len(kind)
    ids = np.zeros((1, count, 2, 2, options.tokens), np.int32)
    ids[0, :, :, :, 1] = np.arange(10, 10 + count)[:, None, None]
    ids[0, :, :, :, 2] = np.array([1, 2])[:, None]
    batch = {
        "statements": jnp.asarray(ids),
        "statement_lengths": jnp.full((1, count, 2, 2), 4) * (jnp.array(kind) > 0)[None, :, None, None],
        "statement_kind": jnp.array([kind], jnp.int8),
    }
    draw = jax.jit(jax.vmap(lambda k: NEGATION.draw(k, batch, options, context())["drawn_statements"]))
    found = draw(jax.random.split(jax.random.key(0), draws))
    tokens = np.asarray(found["token_ids"])[:, 0, :, 0, 1]  # names the statement
    there = np.asarray(found["there"])[:, 0, :, 0]
    wording = np.asarray(found["token_ids"])[:, 0, :, :, 2]
    assert np.array_equal(wording[..., 0], wording[..., 1])  # a pair stays together
    assert draws < 100 or np.mean(wording[there, 0] == 1) == pytest.approx(0.5, abs=0.1)
    for row, which in zip(tokens, there, strict=True):
        assert len(set(row[which])) == which.sum()  # without replacement
    assert np.array_equal(np.asarray(found["kind"])[:, 0] > 0, there)
    return np.asarray(found["kind"])[:, 0]


def test_presence_is_drawn_as_often_as_asked() -> None:
    one = NegationOptions(weight=1.0, statements=1, tokens=8, wordings=2, present_share=0.5)
    share = np.mean(drawn([PRESENT, *[ABSENT] * 9], one) == PRESENT)
    assert share == pytest.approx(0.5, abs=0.08)
    rare = NegationOptions(weight=1.0, statements=1, tokens=8, wordings=2, present_share=0.1)
    assert np.mean(drawn([PRESENT] * 5 + [STATE] * 5, rare) == PRESENT) == pytest.approx(0.1, abs=0.05)


def test_a_report_with_few_statements_gives_those_it_has() -> None:
    kinds = drawn([ABSENT, 0, 0, 0], draws=20)
    assert (np.sort(kinds) == [0, 0, ABSENT]).all()
    assert not drawn([0, 0, 0, 0], draws=5).any()


def numbers(batch: int = 6, count: int = 3, width: int = 5) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(1)
    features = {
        "volume_embedding": rng.normal(size=(batch, width)).astype(np.float32) + 3.0,
        "statement_embeddings": rng.normal(size=(batch, count, 2, width)).astype(np.float32),
        "statement_kind": rng.integers(0, 4, (batch, count)).astype(np.int8),
    }
    return features, {"valid": np.arange(batch) != 2}


def test_the_loss_is_that_of_a_loop() -> None:
    features, batch = numbers()
    volume = features["volume_embedding"].astype(np.float64)
    volume /= np.linalg.norm(volume, axis=1, keepdims=True)
    volume -= volume[batch["valid"]].mean(axis=0)
    losses, right, by_kind = [], [], {PRESENT: [], ABSENT: [], STATE: []}
    for i in range(6):
        for j in range(3):
            kind = int(features["statement_kind"][i, j])
            if kind and batch["valid"][i]:
                said, opposite = features["statement_embeddings"][i, j].astype(np.float64)
                cosine = [volume[i] @ t / np.linalg.norm(volume[i]) / np.linalg.norm(t) for t in (said, opposite)]
                losses.append(np.log1p(np.exp(-(cosine[0] - cosine[1]) / 0.1)))
                right.append(cosine[0] > cosine[1])
                by_kind[kind].append(cosine[0] > cosine[1])
    found, metrics = NEGATION.loss(features, batch, OPTIONS)
    assert found == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(np.mean(right), rel=1e-5)
    assert metrics["present_accuracy"] == pytest.approx(np.mean(by_kind[PRESENT]), rel=1e-5)
    assert metrics["absent_accuracy"] == pytest.approx(np.mean(by_kind[ABSENT]), rel=1e-5)


def test_a_text_that_is_always_preferred_does_not_lower_it() -> None:
    """What a volume shares with all others does not count: the texts alone cannot solve the task."""
    features, batch = numbers()
    same = features | {"volume_embedding": np.tile(features["volume_embedding"][:1], (6, 1))}
    assert NEGATION.loss(same, batch, OPTIONS)[0] == pytest.approx(np.log(2), rel=1e-5)


def test_the_length_of_an_embedding_does_not_matter() -> None:
    """One long embedding is no mean of the batch: it would turn all others into its opposite."""
    features, batch = numbers()
    before, _ = NEGATION.loss(features, batch, OPTIONS)
    lengths = np.array([1, 1, 1, 50, 1, 1], np.float32)[:, None]
    longer = features | {"volume_embedding": features["volume_embedding"] * lengths}
    assert NEGATION.loss(longer, batch, OPTIONS)[0] == pytest.approx(float(before), rel=1e-4)


def test_nothing_to_compare_is_zero_and_nan_shows() -> None:
    features, batch = numbers()
    none = features | {"statement_kind": np.zeros((6, 3), np.int8)}
    assert NEGATION.loss(none, batch, OPTIONS)[0] == 0.0
    broken = features | {"statement_embeddings": features["statement_embeddings"] * np.float32(np.nan)}
    assert np.isnan(NEGATION.loss(broken, batch, OPTIONS)[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"statements": 0}, "statements = 0: from 1"),
        ({"statements": 99}, "statements = 99: from 1 to data.max_sentences"),
        ({"present_share": 1.0}, "between 0 and 1"),
        ({"wordings": 0}, "wordings = 0: must be at least 1"),
        ({"tokens": 9999}, "model.report_encoder.max_positions"),
        ({"temperature": 0.0}, "must be positive"),
    ],
)
def test_what_is_out_of_range_is_said(values: dict[str, Any], message: str) -> None:
    found = NEGATION.problems(NegationOptions(weight=1.0, **values), tiny_config())
    assert any(message in problem for problem in found), found
    assert NEGATION.problems(NegationOptions(**values), tiny_config()) == []  # off


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(UserError, match="no rules for the language 'xx'"):
        NEGATION.problems(NegationOptions(weight=1.0, language="xx"), SimpleNamespace(**vars(tiny_config())))
