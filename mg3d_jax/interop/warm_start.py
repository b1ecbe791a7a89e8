"""Starts a new run from other weights: `init_from`, and its short form `model.*_encoder.pretrained`.

Parameters are taken by name. What is taken, resized, left in the source, or new in this run is logged as a table; whatever
does not fit is an error, so that nothing starts from random numbers unnoticed.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mg3d_jax.config.parts import InitConfig
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.interop.sources import ENCODERS, Source, from_tower, open_source
from mg3d_jax.training.state import Setup, State

logger = logging.getLogger(__name__)
MAX_LISTED = 12
VOCABULARY = re.compile(r"report_encoder/.*|token_head/.*")  # what means nothing with another tokenizer
Shape = tuple[int, ...]


@dataclass
class Account:
    """Where the parameters of a new run come from, by name; the same names for what stays in the source."""

    label: str
    taken: dict[str, np.ndarray] = field(default_factory=dict)
    resized: dict[str, np.ndarray] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)  # sizes
    new: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A table of numbers of parameters by part of the model, and the names of what was resized."""
        columns = {
            "taken": {name: array.size for name, array in self.taken.items()},
            "resized": {name: array.size for name, array in self.resized.items()},
            "left": self.left,
            "new": self.new,
        }
        parts = list(dict.fromkeys(name.partition("/")[0] for sizes in columns.values() for name in sizes))
        width = max(map(len, [*parts, "parameters"]))
        found = [f"{'parameters':<{width}}" + "".join(f"{column:>14}" for column in columns)]
        for part in [*parts, ""]:
            counts = [
                sum(size for name, size in sizes.items() if not part or name.partition("/")[0] == part)
                for sizes in columns.values()
            ]
            found.append(f"{part or 'all':<{width}}" + "".join(f"{count:>14,}" for count in counts))
        return found + [f"resized: {name}" for name in self.resized]


def load_initial(setup: Setup, state: State, tokenizer: ReportTokenizer) -> State:
    """`state` with the weights that the config names in place of the fresh ones; an average starts from the same.

    Raises `UserError` naming every regex that matches nothing, every parameter whose shape does not fit, every setting that
    is not the source's, and when the source reads reports with another tokenizer.
    """
    fresh = {name: tuple(x.shape) for name, x in flatten_dict(setup.abstract["params"], sep="/").items()}
    accounts = [account(source, options, fresh, tokenizer) for source, options in _sources(setup, tokenizer)]
    if not accounts:
        return state
    loaded: dict[str, np.ndarray] = {}
    for one in accounts:
        loaded |= one.taken | one.resized
        logger.info("\n".join([f"starting from {one.label}:", *one.lines()]))
    params = _placed(state["params"], loaded, setup.shardings["params"])
    average = {"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else {}
    return state | {"params": params} | average


def _sources(setup: Setup, tokenizer: ReportTokenizer) -> Iterable[tuple[Source, InitConfig]]:
    config = setup.config
    init, model = config.init_from, config.model
    short = {name: getattr(model, name).pretrained for name in ENCODERS if getattr(model, name).pretrained}
    if init.path and short:
        keys = ", ".join(f"model.{name}.pretrained" for name in short)
        raise UserError(f"init_from.path and {keys} are both set: give one of them")
    if init.path:
        yield open_source(init.path, setup, tokenizer), init
    for encoder, path in short.items():
        yield from_tower(path, encoder, config, tokenizer, f"model.{encoder}.pretrained"), InitConfig(path)


def account(source: Source, options: InitConfig, wanted: Mapping[str, Shape], tokenizer: ReportTokenizer) -> Account:
    """What a model takes of a source.

    Args:
        wanted: shape of every parameter of the model, by name.
        tokenizer: of the new run.
    """
    names = chosen(options, [name for name in wanted if name in source.params], [*wanted])
    _check_tokenizer(source, names, tokenizer.tokenizer.get_vocab())
    _check_misfits(source, names)
    found, problems = Account(source.label), []
    for name in names:
        array, shape = source.params[name], wanted[name]
        if name == "report_encoder/position_embedding" and array.shape[0] > shape[0]:
            found.resized[name] = array[: shape[0]]  # a run of shorter texts reads the first positions only
        elif array.shape == shape:
            (found.resized if name in source.resized else found.taken)[name] = array
        else:
            problems.append(f"{name}: {list(array.shape)} in the checkpoint, {list(shape)} in the model")
    problems += _incomplete(source, wanted)
    if problems:
        more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        listing = "\n  ".join(problems[:MAX_LISTED] + more)
        raise UserError(
            f"the weights of {source.label} do not fit the model:\n  {listing}\nSet the model's keys to the source's, or "
            "name the parameters in init_from.leave."
        )
    used = found.taken.keys() | found.resized.keys()
    found.left = {name: array.size for name, array in source.params.items() if name not in used}
    found.new = {name: int(np.prod(shape)) for name, shape in wanted.items() if name not in used}
    return found


def chosen(options: InitConfig, present: list[str], known: list[str]) -> list[str]:
    """Names of parameters that `take` matches and `leave` does not. `UserError` for a regex that matches nothing.

    Args:
        present: names that both the source and the model have. known: all names of the model, for the message.
    """
    taken = _matching("take", options.take, present, known)
    left = _matching("leave", options.leave, sorted(taken), known)
    return [name for name in present if name in taken and name not in left]


def _matching(key: str, patterns: Iterable[str], names: list[str], known: list[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            matched = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(f"init_from.{key}: {pattern!r} is no regular expression: {error}") from error
        if not matched:
            near = difflib.get_close_matches(pattern, names or known, 3, 0.0)
            among = "that are taken" if key == "leave" else "that the source and the model share"
            raise UserError(
                f"init_from.{key}: {pattern!r} matches none of the {len(names)} parameters {among}. It must match whole "
                f"names; near ones are {', '.join(near) or 'none'}"
            )
        found |= matched
    return found


def _check_tokenizer(source: Source, names: Iterable[str], vocabulary: Mapping[str, int]) -> None:
    taken = [name for name in names if VOCABULARY.fullmatch(name)]
    if not taken or source.vocabulary is None or source.vocabulary == vocabulary:
        return
    differing = sum(source.vocabulary.get(token) != number for token, number in vocabulary.items())
    raise UserError(
        f"{taken[0]} and what else reads tokens cannot be taken from {source.label}: the run's tokenizer has "
        f"{len(vocabulary)} tokens, of which {differing} have another id or are missing there. Set data.tokenizer="
        f"{source.tokenizer}, or add 'report_encoder/.*' and 'token_head/.*' to init_from.leave"
    )


def _check_misfits(source: Source, names: Iterable[str]) -> None:
    encoders = {name.partition("/")[0] for name in names}
    wrong = [f"{name}.{line}" for name, lines in source.misfits.items() if name in encoders for line in lines]
    if wrong:
        raise UserError(
            f"{source.label} does not fit the config; set preset and keys of the model to the source's, or leave the tower "
            "out (init_from.leave):\n  " + "\n  ".join(wrong)
        )


def _incomplete(source: Source, wanted: Mapping[str, Shape]) -> list[str]:
    """A tower of `mg3d import` is a whole one: what it lacks, or what has no place, is a mistake."""
    if not source.complete:
        return []
    of_tower = {name: shape for name, shape in wanted.items() if name.startswith(f"{source.complete}/")}
    lacking = [name for name in of_tower if name not in source.params and not name.startswith(source.fresh)]
    unknown = [name for name in source.params if name not in wanted]
    return [
        *(f"{name} {list(of_tower[name])}: missing in the checkpoint" for name in lacking),
        *(f"{name} {list(source.params[name].shape)}: unknown to the model" for name in unknown),
    ]


def _placed(fresh: Any, loaded: Mapping[str, np.ndarray], shardings: Any) -> Any:
    """The fresh parameters, with the loaded ones on the mesh in place of them."""
    places = flatten_dict(shardings, sep="/")

    def place(name: str, array: Any) -> jax.Array:
        if name not in loaded:
            return array
        host = np.asarray(loaded[name], np.float32)
        return jax.make_array_from_callback(host.shape, places[name], lambda index: host[index])

    return unflatten_dict({name: place(name, x) for name, x in flatten_dict(fresh, sep="/").items()}, sep="/")
