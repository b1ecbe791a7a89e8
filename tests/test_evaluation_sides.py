"""Left against right: how sentences are exchanged, and what perfect, blind and mirrored models score."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support import embedded

from mg3d_jax.evaluation.sides import Sides, SidesOptions, other_side, side_of


@pytest.mark.parametrize(
    ("sentence", "side", "exchanged"),
    [
        ("Nodule in the right upper lobe.", "right", "Nodule in the left upper lobe."),
        ("Left-sided effusion, LEFT lung.", "left", "Right-sided effusion, RIGHT lung."),
        ("Opacities in the left and right lung.", None, "Opacities in the right and left lung."),
        ("Bright leftover material.", None, "Bright leftover material."),
    ],
)
def test_sides_of_a_sentence(sentence, side, exchanged):
    assert side_of(sentence) == side and other_side(sentence) == exchanged
    assert other_side(exchanged) == sentence


class Reads:
    """Embeds a text by the side that it names: `[left, right]`."""

    def tokenize(self, entries):
        return [entry[0][0] for entry in entries]

    def texts(self, params, texts):
        return np.array([[side_of(text) == side for side in ("left", "right")] for text in texts], np.float32)


def found(volumes, sides):
    """A patient per volume, whose report names one side."""
    texts = tuple((f"Finding on the {side}.", "Heart is normal.") for side in sides)
    return embedded(
        np.asarray(volumes, np.float32), report_texts=texts, model=SimpleNamespace(embedder=Reads(), params=None)
    )


def test_what_models_score():
    sides = ["left", "right"] * 20
    exact = np.array([[side == "left", side == "right"] for side in sides], float)
    cases = {"exact": (exact, 1.0), "mirrored": (exact[:, ::-1], 0.0), "blind": (np.ones((40, 2)), 0.5)}
    for volumes, expected in cases.values():
        result = Sides(SidesOptions(draws=50)).full(found(volumes, sides))
        assert result["accuracy"] == expected and result["sentences"] == 40 and result["patients"] == 40
        assert result["accuracy_95"][0] <= expected <= result["accuracy_95"][1]
    always_left = Sides().full(found(np.tile([1.0, 0.0], (40, 1)), sides))
    assert always_left["confusion"]["right"] == {"left": 1.0, "right": 0.0} and always_left["accuracy"] == 0.5
    section = Sides().section(always_left)
    assert "includes chance" in section.warnings[0] and section.table.rows[1][1:] == ("1.000", "0.000")
    mirrored = Sides().section(Sides().full(found(exact[:, ::-1], sides)))
    assert "exchanged" in mirrored.warnings[0]


def test_reports_without_a_side():
    result = Sides().full(found(np.ones((2, 2)), ["base", "apex"]))
    assert result["sentences"] == 0 and Sides().section(result).table.rows == [("sentences that name one side", "0")]
    assert Sides().metrics(found(np.ones((2, 2)), ["base", "apex"])) == {}
