"""Presence against absence: what report encoders and volumes that know it, do not, or have it the wrong way round score."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import embedded

from mg3d_jax.evaluation.negation import Negation, NegationEvaluationOptions
from mg3d_jax.language.statements import statements

FINDINGS = ("Emphysema", "Cardiomegaly", "Pleural effusion", "Hiatal hernia")
OPTIONS = NegationEvaluationOptions(draws=50)


def direction(text: str, *, knows: bool) -> list[float]:
    """A finding in three numbers; the fourth is its presence, for an encoder that knows it, else of no meaning."""
    finding = next((name for name in FINDINGS if name.lower() in text.lower()), "")
    code = np.random.default_rng(len(finding)).normal(size=3)
    said = statements().parse(text)
    present = 1.0 if said is not None and said.present in (True, None) else -1.0
    if not knows:
        present = float(np.random.default_rng(zlib.crc32(text.encode())).choice([-1.0, 1.0]))
    return [*(0.3 * code), present]


class Reads:
    def __init__(self, *, knows: bool):
        self.knows = knows

    def tokenize(self, entries: Any) -> list[str]:
        return [entry[0][0] for entry in entries]

    def texts(self, params: Any, texts: list[str]) -> np.ndarray:
        return np.array([direction(text, knows=self.knows) for text in texts], np.float32)


def found(volumes: np.ndarray, reports: list[str], *, knows: bool = True) -> Any:
    reads = Reads(knows=knows)
    asked = Negation(OPTIONS).texts(FINDINGS)
    return embedded(
        np.asarray(volumes, np.float32),
        label_names=FINDINGS,
        labels=np.zeros((len(volumes), len(FINDINGS)), np.int8),
        report_texts=tuple((report, "Correlation is recommended.") for report in reports),
        texts=reads.texts(None, [text[0] for text in asked]),
        model=SimpleNamespace(embedder=reads, params=None),
    )


REPORTS = ["There is emphysema.", "No emphysema was detected."] * 15


def test_texts_that_know_presence_are_told_apart_for_a_finding_that_was_left_out() -> None:
    volumes = np.zeros((30, 4))
    volumes[:, 3] = [1.0, -1.0] * 15
    result = Negation(OPTIONS).full(found(volumes, REPORTS))
    assert result["texts"] == 1.0 and set(result["texts_by_finding"]) == set(FINDINGS)
    assert result["volumes"] == 1.0 and result["volumes_by_kind"] == {"present": 1.0, "absent": 1.0}
    assert result["statements"] == 30  # advice is no statement
    assert not Negation().section(result).warnings
    assert Negation().flat(result)["negation/opposite_statements/accuracy"] == 1.0
    mirrored = Negation(OPTIONS).full(found(-volumes, REPORTS))
    assert mirrored["volumes"] == 0.0 and mirrored["texts"] == 1.0
    assert "the volumes do not" in Negation().section(mirrored).warnings[0]


def test_what_all_volumes_share_does_not_count() -> None:
    result = Negation(OPTIONS).full(found(np.tile([0.0, 0.0, 0.0, 5.0], (30, 1)), REPORTS))
    assert result["volumes"] == 0.5


def test_an_encoder_that_mixes_them_up_is_named() -> None:
    result = Negation(OPTIONS).full(found(np.eye(4)[np.arange(30) % 4], REPORTS, knows=False))
    assert 0.2 < result["texts"] < 0.8
    assert "mixes up presence and absence" in Negation().section(result).warnings[0]


def test_nothing_to_ask() -> None:
    silent = found(np.ones((3, 4)), ["Correlation is recommended."] * 3)
    assert Negation().metrics(silent).keys() == {"negation/texts"}
    assert Negation(OPTIONS).full(silent)["statements"] == 0
    nothing = embedded(np.ones((2, 4), np.float32), model=silent.model)
    section = Negation().section(Negation(OPTIONS).full(nothing))
    assert section.table.rows[0][1] == "0"


def test_not_a_number_counts_against() -> None:
    volumes = np.full((30, 4), np.nan)
    assert Negation(OPTIONS).metrics(found(volumes, REPORTS))["negation/volumes"] == pytest.approx(0.0)
