"""Evaluations are declared objects: the two of the library measure what version 0.1.0 measured, and one of a user's own is
run, logged while training and shown on the page without a change to the package."""

import json

import numpy as np
import pytest
from support import OLD
from test_report_page import Page

from mg3d_jax.commands.main import main
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.base import Evaluation, merge_metrics
from mg3d_jax.evaluation.online import OnlineEvaluation
from mg3d_jax.html import Section, Table
from mg3d_jax.registry import EVALUATIONS
from mg3d_jax.training.restore import restore_run


class Toy(Evaluation):
    """How far volumes and texts are from the origin, and how many parameters the text scale has."""

    needs = ("volumes", "model")

    def texts(self, label_names):
        return [["one sentence."], ["two sentences.", "of one text."], [label_names[0]]]

    def metrics(self, found):
        return {"toy/length": float(np.linalg.norm(found.volumes, axis=1).mean())}

    def full(self, found):
        assert found.model.data.label_names == list(found.label_names)
        scale = found.model.params["logit_scale"].size
        return {"protocol": "mean length", "texts": list(found.texts.shape), "scale": scale} | self.metrics(found)

    def section(self, result):
        table = Table(("what", "length"), [("volumes", f"{result['toy/length']:.2f}")])
        return Section("Lengths <toy>", result["protocol"], table, lambda axes: axes.plot([0, 1]))


@pytest.fixture
def toy():
    yield EVALUATIONS.register("toy", Toy)
    EVALUATIONS.unregister("toy")


def evaluate(run, *options):
    command = ["evaluate", "--workdir", str(run), "--data", str(OLD / "valid"), *options]
    assert main(command) == 0
    return json.loads((run / "evaluation" / "evaluation.json").read_text())


def test_the_numbers_are_those_of_version_0_1_0(old_run, capsys):
    found, expected = evaluate(old_run), json.loads((OLD / "expected_evaluation.json").read_text())
    assert found["zero_shot"]["auroc_macro"] == pytest.approx(expected["auroc_macro"], abs=1e-6)
    assert found["retrieval"].pop("protocol") == expected["retrieval"].pop("protocol")
    same = {name: found["retrieval"][name] for name in expected["retrieval"]}
    assert same == pytest.approx(expected["retrieval"], abs=1e-6)
    assert (found["step"], found["volumes"], found["patients"]) == (3, 6, 4)
    shown = capsys.readouterr().out
    assert "Zero-shot AUROC" in shown and "Retrieval" in shown and "evaluation.png" in shown


def test_an_evaluation_of_ones_own(old_run, toy, capsys):
    found = evaluate(old_run)
    assert {"zero_shot", "retrieval", "volume_retrieval"} <= found.keys() and list(found)[-1] == "toy"
    width = restore_run(old_run).config.model.projection_dim
    assert found["toy"]["texts"] == [3, width] and found["toy"]["scale"] == 1
    assert found["toy"]["toy/length"] == pytest.approx(1.0, abs=1e-5)
    assert "Lengths <toy>" in capsys.readouterr().out
    assert (old_run / "evaluation" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["report", str(old_run)]) == 0
    page = Page((old_run / "report.html").read_text())
    assert "Lengths <toy>" in page.text and ["volumes", "1.00"] in page.rows
    EVALUATIONS.unregister("toy")  # as for a reader without the module that defines it
    assert main(["report", str(old_run)]) == 0
    assert "Results without a table here: toy" in Page((old_run / "report.html").read_text()).text
    EVALUATIONS.register("toy", Toy)


def test_only_one_of_them(old_run, toy, capsys):
    found = evaluate(old_run, "--only", "toy")
    assert "zero_shot" not in found and "toy" in found and found["patients"] == 4
    assert main(["evaluate", "--workdir", str(old_run), "--data", str(OLD / "valid"), "--only", "to"]) == 2
    assert "Did you mean 'toy'?" in capsys.readouterr().err


def test_it_is_logged_while_training(old_run, toy):
    restored = restore_run(old_run)
    options = restored.config.data
    tokenizer = ReportTokenizer(restored.tokenizer, options.max_tokens, options.max_sentences)
    found = OnlineEvaluation(restored.setup, tokenizer, PreparedData((str(OLD / "valid"),))).metrics(restored.params)
    assert found["toy/length"] == pytest.approx(1.0, abs=1e-5)
    assert {"auroc_macro", "report_to_volume/median_rank"} <= found.keys()


def test_two_evaluations_cannot_log_the_same_name():
    with pytest.raises(UserError, match="loss"):
        merge_metrics({"a": {"loss": 1.0}, "b": {"loss": 2.0}})
