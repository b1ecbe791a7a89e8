"""Runs with random weights for the tests of exports."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from support import tiny_builder, with_smallest_towers

from mg3d_jax import config as config_lib
from mg3d_jax.data.tokens import load_tokenizer
from mg3d_jax.interop.export_run import Run
from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training import state as state_lib

SPACING = (20.0, 18.0, 20.0)


def random_run(tokenizer_folder: Path, policy: str = "center", **overrides: object) -> Run:
    """On the smallest towers; no weight is zero or one: an untrained bias or scale would hide a mix-up."""
    builder = with_smallest_towers(tiny_builder())
    for key, value in overrides.items():
        group, _, name = key.rpartition("__")
        node = builder
        for part in group.split("__") if group else ():
            node = node[part]
        node[name] = value
    config = config_lib.typed(builder)
    model = state_lib.build_model(config, load_tokenizer(str(tokenizer_folder)).get_vocab_size())
    shapes = jax.eval_shape(model.init, jax.random.key(0), step_inputs.dummy_inputs(model))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.float32(0.15 * rng.standard_normal(x.shape)), state_lib.nn.unbox(shapes))
    return Run(config, params, tokenizer_folder, 7, Grid(config.grid, SPACING, policy), ("ctrate",))
