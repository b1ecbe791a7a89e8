"""Features of a frozen report encoder that are computed once, before training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from support import quick_state, tiny_builder, tiny_config, with_plain_towers, with_smallest_towers

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.config import Config, checks
from mg3d_jax.data.pipeline import PreparedData, train_batches
from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.training import report_texts as texts_lib
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib
from mg3d_jax.training.loop import Trainer
from mg3d_jax.training.report_texts import FILE, TextFeatures, report_texts

FROZEN = {
    "model__report_encoder__frozen_layers": -1,
    "objectives__alignment__report_view": "subsets",
    "objectives__alignment__report_sentences": 16,
    "objectives__alignment__sentence_tokens": 40,
    "objectives__negation__weight": 1.0,
    "objectives__negation__statements": 16,
    "objectives__negation__tokens": 40,
    "data__max_tokens": 250,
}


def frozen_config(
    *data: str, towers: Callable[[ConfigDict], ConfigDict] = with_smallest_towers, **options: Any
) -> Config:
    return config_lib.typed(towers(tiny_builder(*data, **FROZEN, **options)))


@pytest.fixture(scope="module")
def data(tiny_data: dict[str, str]) -> PreparedData:
    return PreparedData((tiny_data["train"],))


@pytest.fixture(scope="module")
def tokenizer(data: PreparedData) -> ReportTokenizer:
    sentences = [one for index in range(len(data)) for one in data.text(index).sentences]
    return ReportTokenizer(train_wordpiece(sentences, 400), 250, 16)


def losses(data: PreparedData, tokenizer: ReportTokenizer, **options: Any) -> dict[str, float]:
    """Loss and metrics of the first batch, with nothing random: all sentences and statements of each report are drawn."""
    config = frozen_config(**options)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    setup = state_lib.build(config, tokenizer.vocab_size, mesh, steps=1)
    params = quick_state(setup)["params"]
    more_text = report_texts(setup, params, tokenizer, [data])
    batch = next(train_batches(data, tokenizer, config.data, mesh, seed=0, start=0, stop=1, more_text=more_text))
    metrics = step_lib.evaluation_step(setup, tokenizer.special)(params, batch, jax.random.key(0))
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def test_precomputed_features_give_the_losses_of_the_tower(data: PreparedData, tokenizer: ReportTokenizer) -> None:
    sizes = {"objectives__alignment__subset_sizes": (0,)}
    whole = losses(data, tokenizer, **sizes)
    once = losses(data, tokenizer, model__report_encoder__precompute=True, **sizes)
    assert once.keys() == whole.keys()
    for name in ("loss", "alignment", "negation", "negation/accuracy", "alignment/report_norm"):
        assert once[name] == pytest.approx(whole[name], rel=2e-3), name


def test_a_run_keeps_its_features_and_computes_only_what_is_new(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counts: list[int] = []
    encoded = texts_lib._encoded

    def counted(setup: Any, params: Any, texts: Any) -> np.ndarray:
        counts.append(len(texts))
        return encoded(setup, params, texts)

    monkeypatch.setattr(texts_lib, "_encoded", counted)

    def trainer(steps: int, folder: str = "run", **more: Any) -> Trainer:
        options = {"model__report_encoder__precompute": True, "training__steps": steps} | more
        config = frozen_config(tiny_data["train"], tiny_data["valid"], towers=with_plain_towers, **options)
        return Trainer(config, tmp_path / folder)

    assert trainer(2).run() == 0
    assert len(counts) == 1 and counts[0] > 20
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("valid" in str(record) for record in records)
    trainer(2)
    assert len(counts) == 1  # read from the run's folder
    (tmp_path / "run" / FILE).write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        trainer(2)
    assert counts[1:] == counts[:1] and "computed again" in caplog.text
    shared = {"model__report_encoder__features": str(tmp_path / "features")}
    trainer(2, "first", data__max_patients=3, **shared)
    trainer(2, "second", **shared)
    assert (
        counts[2] + counts[3] == counts[0] and min(counts[2:]) > 0
    )  # the second one computes what the first one lacked
    assert len(list((tmp_path / "features").iterdir())) == 1 and not (tmp_path / "second" / FILE).exists()


def test_features_of_other_weights_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    features = TextFeatures(3)
    text = np.array([2, 7, 3], np.int32)
    features.add([text.tobytes()], np.array([[1.0, 2.0, 3.0]]))
    features.save(tmp_path / FILE, "mark")
    same, other = TextFeatures(3), TextFeatures(3)
    same.load(tmp_path / FILE, "mark")
    padded = np.array([[2, 7, 3, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    assert same(padded).tolist() == [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
    assert same.missing([text.tobytes(), b"new"]) == [b"new"]
    other.load(tmp_path / FILE, "other mark")
    assert other.missing([text.tobytes()]) and "computed again" in caplog.text


def test_a_tower_that_is_trained_is_refused() -> None:
    config = tiny_config(model__report_encoder__precompute=True)
    with pytest.raises(UserError, match=r"frozen_layers=-1, or precompute=False"):
        checks.validate(config)
    assert tiny_builder().model.report_encoder.precompute is False


@pytest.mark.processes
def test_worker_processes_make_the_same_texts(data: PreparedData, tokenizer: ReportTokenizer) -> None:
    def first(**options: Any) -> dict[str, np.ndarray]:
        config = frozen_config(model__report_encoder__precompute=True, **options)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        setup = state_lib.build(config, tokenizer.vocab_size, mesh, steps=1)
        more_text = report_texts(setup, quick_state(setup)["params"], tokenizer, [data])
        batches = train_batches(data, tokenizer, config.data, mesh, seed=0, start=0, stop=2, more_text=more_text)
        batch = jax.device_get(next(batches))
        batches.close()
        return batch

    here, there = first(), first(data__workers=1)
    assert here.keys() == there.keys() and {"statements", "sentences"} <= here.keys()
    for name in here:
        np.testing.assert_array_equal(here[name], there[name], err_msg=name)


def test_the_mark_of_weights_is_of_their_bits() -> None:
    """Whatever the mesh and its devices; a permutation and the smallest change show."""
    weights = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    changed = np.nextafter(weights, 9.0, dtype=np.float32)
    same, *others = (
        texts_lib._fingerprint({"report_encoder": {"a": jnp.asarray(array)}})
        for array in (weights, weights[::-1], changed)
    )
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.device_put(weights, jax.NamedSharding(mesh, jax.P("data")))
    assert texts_lib._fingerprint({"report_encoder": {"a": split}}) == same
    assert len({same, *others}) == 3
