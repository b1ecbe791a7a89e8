"""Starts the encoders of a new run from published or imported weights: `model.*_encoder.pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.interop.hugging_face import check_vocabulary, load_checkpoint
from mg3d_jax.interop.tower import Tower, at_volume_size, check_fields, load_tower, merge
from mg3d_jax.training.state import Setup, State


def load_pretrained(setup: Setup, state: State, tokenizer: ReportTokenizer) -> State:
    """`state` with the weights that the config names in place of the fresh ones.

    A tower made for another volume size is adapted where its kind can do that (learned positions are interpolated). Raises
    `UserError` naming every parameter that is missing, unknown or of another shape, every setting that is not the
    checkpoint's, and when the report encoder's vocabulary is not the tokenizer's.
    """
    params, config = dict(state["params"]), setup.config
    model = config.model
    modules = {
        "volume_encoder": (model.volume_encoder, model.volume_encoder.tower.build(model, len(config.data.windows))),
        "report_encoder": (model.report_encoder, model.report_encoder.tower.build(model, tokenizer.vocab_size)),
    }
    for encoder, (options, module) in modules.items():
        if options.pretrained:
            tower = _tower(options.pretrained, encoder, options.kind, setup, tokenizer)
            check_fields(tower, module)
            params[encoder] = _placed(merge(params[encoder], tower), setup.shardings["params"][encoder])
    average = {"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else {}
    return state | {"params": params} | average


def _tower(source: str, encoder: str, kind: str, setup: Setup, tokenizer: ReportTokenizer) -> Tower:
    vocabulary = tokenizer.tokenizer.get_vocab()
    if (Path(source) / "tower.json").is_file():
        tower = load_tower(Path(source))
        if tower.kind != kind:
            raise UserError(f"model.{encoder}.pretrained = {source!r} holds a {tower.kind}, a {kind} is needed")
        if encoder == "report_encoder":  # `mg3d import` has copied the checkpoint's own tokenizer
            _check_size(source, tower, len(vocabulary), setup)
            check_vocabulary(Path(source), tower.encoder["vocab_size"], vocabulary)
        return at_volume_size(tower, tuple(setup.config.model.volume_size))
    form = next((form for form in getattr(setup.config.model, encoder).tower.forms.values() if form.folder), None)
    if form is None:
        raise UserError(f"model.{encoder}.pretrained = {source!r} is no folder written by `mg3d import`")
    loaded = load_checkpoint(source, form, vocabulary)
    return Tower(kind, loaded.fields, loaded.params, source, loaded.unused)


def _check_size(source: str, tower: Tower, tokens: int, setup: Setup) -> None:
    if tower.encoder["vocab_size"] != tokens:
        raise UserError(
            f"model.report_encoder.pretrained = {source!r} has {tower.encoder['vocab_size']} tokens, the tokenizer of "
            f"data.tokenizer = {setup.config.data.tokenizer!r} has {tokens}: use the checkpoint's own tokenizer"
        )


def _placed(params: Any, shardings: Any) -> Any:
    """Host arrays on the mesh; arrays that are there already stay."""
    places = flatten_dict(shardings)

    def place(path: tuple, array: Any) -> jax.Array:
        if isinstance(array, jax.Array):
            return array
        host = np.asarray(array, np.float32)
        return jax.make_array_from_callback(host.shape, places[path], lambda index: host[index])

    return unflatten_dict({path: place(path, array) for path, array in flatten_dict(params).items()})
