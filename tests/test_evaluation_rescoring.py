"""The second pass of retrieval: its scores are the model's, its ranks those of a sort by hand."""

import jax
import numpy as np
import pytest
from support import quick_state, records_of, tiny_builder, with_plain_towers

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import rescoring
from mg3d_jax.evaluation.embed import DataEmbedder, Embedder
from mg3d_jax.objectives.alignment import FUSED_HEAD
from mg3d_jax.progress import Progress
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training import state as state_lib

FORMS = {
    "published": {},
    "same_words": {"objectives__alignment__fused_form": "same_words", "model__fusion__other_volumes": 2},
}


def embedded(tiny_data, top, fused_weight=1.0, progress=None, embeddings=0.0, **overrides):
    """What the evaluation is given, of random weights on 8 volumes."""
    data = PreparedData((tiny_data["valid"],))
    builder = with_plain_towers(tiny_builder(model__fusion__depth=1, **overrides))
    builder.objectives.alignment.fused_weight = fused_weight
    config = config_lib.typed(builder)
    sentences = [sentence for record in records_of(data) for sentence in record.sentences]
    tokenizer = ReportTokenizer(train_wordpiece(sentences, 300), config.data.max_tokens, config.data.max_sentences)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=1, tensor=1), jax.devices()[:2])
    setup = state_lib.build(config, tokenizer.vocab_size, mesh, steps=1)
    params = quick_state(setup)["params"]
    one = rescoring.Rescoring(rescoring.RescoringOptions(top=top, embeddings=embeddings))
    return one, DataEmbedder(Embedder(setup, tokenizer, 8), data, {"rescoring": one})(params, progress)["rescoring"]


@pytest.mark.parametrize(("form", "weight"), [("published", 0.0), ("same_words", 0.0), ("same_words", 0.7)])
def test_ranks_are_those_of_the_models_own_scores(tiny_data, form, weight):
    one, found = embedded(tiny_data, top=20, embeddings=weight, **FORMS[form])
    model, config, params = found.model.embedder.setup.model, found.model.embedder.config, found.model.params
    row_of = {name: row for row, name in enumerate(found.report_ids.tolist())}
    table = np.zeros((len(found.reports), len(found.volumes)))
    for volume, record in enumerate(records_of(found.model.data)):
        rows = [found.model.embedder.tokenizer(text) for text in found.report_texts]
        report = {name: np.stack([row[name] for row in rows]) for name in ("token_ids", "token_mask", "sentence_index")}
        windowed = step_inputs.window(np.repeat(record.volume[None], len(rows), 0), config.data.windows)
        given = {"volume": windowed, "report": report}
        if form == "published":
            (fused,) = model.apply({"params": params}, given, ("fused_embedding",), method="compute").values()
            single = np.concatenate([found.reports, np.repeat(found.volumes[volume][None], len(rows), 0)], 1)
            fused = fused / np.linalg.norm(fused, axis=1, keepdims=True)
            table[:, volume] = (fused * single / np.linalg.norm(single, axis=1, keepdims=True)).sum(1)
        else:
            names = ("fused_volume", "fused_report")
            fused = model.apply({"params": params}, given, names, method="compute")
            both = np.concatenate([fused[name] for name in names], 1)
            table[:, volume] = (both @ np.asarray(params[FUSED_HEAD]["kernel"]))[:, 0]
    table += weight * found.logit_scale * found.reports @ found.volumes.T
    result = one.full(found)
    own = np.array([row_of[name] for name in found.volume_reports])
    right = own[None, :] == np.arange(len(found.reports))[:, None]
    best = np.where(right, table, -np.inf).max(1)
    ranks = 1 + ((table >= best[:, None]) & ~right).sum(1)
    assert result["report_to_volume/recall@1"] == pytest.approx(np.mean(ranks <= 1))
    assert result["report_to_volume/recall@5"] == pytest.approx(np.mean(ranks <= 5))
    ranks = 1 + ((table.T[np.arange(len(own)), own][:, None] <= table.T) & ~right.T).sum(1)
    assert result["volume_to_report/recall@5"] == pytest.approx(np.mean(ranks <= 5))
    assert (
        one.flat(result)[f"rescoring/top=20/embeddings={weight:g}/report_to_volume/recall@5"]
        == result["report_to_volume/recall@5"]
    )
    assert "with the second pass" in str(one.sections(result)[0].table)


def test_towers_read_each_volume_and_report_once(tiny_data, capsys, monkeypatch):
    rows, in_batches = [], Embedder.in_batches

    def counted(self, program, params, fields):
        rows.append((frozenset(fields), len(next(iter(fields.values())))))
        return in_batches(self, program, params, fields)

    with Progress("embed", 8) as progress:
        one, found = embedded(tiny_data, top=20, progress=progress)
    monkeypatch.setattr(Embedder, "in_batches", counted)
    one.full(found)
    pairs = len(found.volumes) * len(found.reports)
    assert sum(count for names, count in rows if "token_ids" in names) == len(found.reports)
    assert sum(count for names, count in rows if "volume_tokens" in names) == pairs
    assert all(count == found.model.embedder.batch_size for names, count in rows[1:-1]), "batches that are not full"
    assert f"rescore: {pairs}/{pairs} pairs" in capsys.readouterr().err


def test_nothing_is_printed_while_a_run_trains(tiny_data, capsys):
    one, found = embedded(tiny_data, top=2)
    one.full(found)
    assert "rescore" not in capsys.readouterr().err


def test_ranks_of_the_second_pass():
    scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.2, 0.1], [0.3, np.nan, 0.1], [1.0, 2.0, 3.0]])
    correct = np.array([[False, False, True], [True, False, False], [True, False, False], [False, False, False]])
    # One better; a tie and a number that is none count against; not among the candidates: the rank of the first pass.
    assert rescoring.second_ranks(scores, correct, np.array([3, 1, 1, 7])).tolist() == [2, 2, 2, 7]


def test_off_by_default_and_refused_without_the_fused_pair(tiny_data):
    one, found = embedded(tiny_data, top=0)
    assert one.full(found) == {} and found.model is None
    one, found = embedded(tiny_data, top=5, fused_weight=0.0)
    with pytest.raises(UserError, match="did not train the fused pair"):
        one.full(found)
    config = found.model.embedder.config
    assert "fused_weight above 0" in one.problems(one.settings, config)[0]
