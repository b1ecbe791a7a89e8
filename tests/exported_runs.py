"""Runs with random weights for the tests of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from support import drawn, overridden, tiny_builder, with_smallest_towers

from mg3d_jax import config as config_lib
from mg3d_jax.data.tokens import load_tokenizer, save_tokenizer, train_wordpiece
from mg3d_jax.interop.export_run import Run
from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training import state as state_lib

SPACING = (20.0, 18.0, 20.0)
SENTENCES = {"There is no nodule.", "The heart is large.", "A cyst (2.5 cm)."}


def small_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer of few words."""
    save_tokenizer(train_wordpiece(SENTENCES, 120), folder)
    return folder


def random_run(tokenizer_folder: Path, policy: str = "center", *, near_start: bool = False, **overrides: object) -> Run:
    """On the smallest towers; no weight is zero or one: an untrained bias or scale would hide a mix-up.

    Args:
        near_start: weights are near those of a model that is about to be trained, so that a deep decoder's numbers stay small.
        overrides: dotted keys of the configuration with `__`.
    """
    config = config_lib.typed(overridden(with_smallest_towers(tiny_builder()), overrides))
    model = state_lib.build_model(config, load_tokenizer(str(tokenizer_folder)).get_vocab_size())
    shapes = jax.eval_shape(model.init, jax.random.key(0), step_inputs.dummy_inputs(model))["params"]
    shapes, rng = state_lib.nn.unbox(shapes), np.random.default_rng(1)

    def shaken(x: Any) -> np.ndarray:
        start, scale = (x, 0.1) if near_start else (0.0, 0.15)
        return np.asarray(start + scale * rng.standard_normal(x.shape), np.float32)

    params = jax.tree.map(shaken, drawn(shapes) if near_start else shapes)
    return Run(config, params, tokenizer_folder, 7, Grid(config.grid, SPACING, policy), ("ctrate",))
