"""Writes texts with a model of the next token: greedy, nucleus sampling (Holtzman et al. 2020), beam search.

Pure and traceable: one loop on the device that ends when all texts have ended. The model is a function of the last tokens
and a cache (`Step`), so that each token costs one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mg3d_jax.errors import UserError

METHODS = ("greedy", "nucleus", "beam")
# `(ids int32 [B, K], their position, cache) -> (logits [B, K, V] of what follows, cache)`, for K texts per row.
Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Reorder = Callable[[Any, jax.Array], Any]  # (cache, int32 [B, K]: which text of its row each one goes on with) -> cache
NEVER = -1e9  # log probability of what must not be chosen: finite, so that sums stay numbers


@dataclass(frozen=True)
class Sampling:
    """How texts are written.

    Args:
        method: one of `METHODS`.
        max_tokens: of a text, the one that ends it included.
        start, end: ids of the tokens before and after a text. pad: what stands after the end.
        forbidden: ids that are never written.
        temperature, top_p: of "nucleus": logits are divided by the first; of the most likely tokens those are drawn from
            that together just reach the second.
        beams, length_penalty: of "beam": how many texts per row are followed; their log probability is divided by
            ((5 + length) / 6) ** length_penalty (Wu et al. 2016).
        no_repeat: so many tokens in a row never stand twice in a text; 0: they may.
    """

    method: str
    max_tokens: int
    start: int
    end: int
    pad: int = 0
    forbidden: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 0.9
    beams: int = 4
    length_penalty: float = 1.0
    no_repeat: int = 0

    @property
    def texts(self) -> int:
        """Texts per row that the cache must hold."""
        return self.beams if self.method == "beam" else 1


def write(
    step: Step, cache: Any, rows: int, options: Sampling, keys: jax.Array, reorder: Reorder
) -> dict[str, jax.Array]:
    """Writes one text per row.

    Args:
        cache: for `options.texts` texts per row, nothing written.
        keys: random keys [B], one per row: a row's text does not depend on the other rows. Only "nucleus" draws.
        reorder: only "beam" calls it.

    Returns:
        `tokens` int32 [B, L], without the start, `pad` after the end; `length` int32 [B], with the end; `ended` bool [B],
        False where `max_tokens` cut the text; `log_probability` float32 [B] of the tokens given the volume.
    """
    if options.method not in METHODS:
        raise UserError(f"method {options.method!r} is unknown: choose one of {', '.join(METHODS)}")
    if options.method == "beam":
        return _beam(step, cache, rows, options, reorder)
    return _one_by_one(step, cache, rows, options, keys)


def _log_probabilities(logits: jax.Array, tokens: jax.Array, position: jax.Array, options: Sampling) -> jax.Array:
    """Of what follows `tokens` [..., L], float32 [..., V]. What is forbidden takes no share of the probability; a repetition
    keeps its share, or a text that can only repeat itself would look likely."""
    logits = logits.astype(jnp.float32)
    if options.forbidden:
        logits = logits.at[..., jnp.array(options.forbidden)].set(NEVER)
    found = jax.nn.log_softmax(logits, axis=-1)
    if options.no_repeat:
        found = jnp.where(repetitions(tokens, position, options.no_repeat, found.shape[-1]), NEVER, found)
    return found


def repetitions(tokens: jax.Array, position: jax.Array, length: int, vocab: int) -> jax.Array:
    """Which tokens at `position` would make the last `length` tokens ones that stand earlier in the text: bool [..., V].

    Args:
        tokens: int [..., L]; those before `position` are written.
    """
    starts = tokens.shape[-1] - length + 1
    if starts < 1:
        return jnp.zeros((*tokens.shape[:-1], vocab), bool)
    first = position - length + 1  # of the last `length` - 1 tokens
    last = jax.lax.dynamic_slice_in_dim(tokens, first, length - 1, axis=-1)
    earlier = tokens[..., jnp.arange(starts)[:, None] + jnp.arange(length - 1)]  # [..., starts, length - 1]
    same = jnp.all(earlier == last[..., None, :], axis=-1) & (jnp.arange(starts) < first)
    followers, flat = tokens[..., length - 1 :].reshape(-1, starts), same.reshape(-1, starts)
    rows = jnp.arange(len(flat))[:, None]
    found = jnp.zeros((len(flat), vocab), bool).at[rows, followers].max(flat)
    return found.reshape(*tokens.shape[:-1], vocab)


def _one_by_one(step: Step, cache: Any, rows: int, options: Sampling, keys: jax.Array) -> dict[str, jax.Array]:
    """Greedy and nucleus: each token is chosen for good."""

    def choose(log_p: jax.Array, position: jax.Array) -> jax.Array:
        if options.method == "greedy":
            return jnp.argmax(log_p, axis=-1).astype(jnp.int32)
        kept = nucleus(log_p / options.temperature, options.top_p)
        drawn = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, position), row))(keys, kept)
        return drawn.astype(jnp.int32)

    def body(state: dict[str, Any]) -> dict[str, Any]:
        position, ended = state["position"], state["ended"]
        logits, cache = step(state["last"][:, None], position, state["cache"])
        log_p = _log_probabilities(logits[:, 0], state["tokens"], position, options)
        token = jnp.where(ended, options.pad, choose(log_p, position))
        gained = jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0]
        return {
            "position": position + 1,
            "last": token,
            "cache": cache,
            "tokens": state["tokens"].at[:, position].set(token),
            "length": state["length"] + ~ended,
            "log_probability": state["log_probability"] + jnp.where(ended, 0.0, gained),
            "ended": ended | (token == options.end),
        }

    state = jax.lax.while_loop(
        lambda state: (state["position"] < options.max_tokens) & ~jnp.all(state["ended"]),
        body,
        {
            "position": jnp.int32(0),
            "last": jnp.full(rows, options.start, jnp.int32),
            "cache": cache,
            "tokens": jnp.full((rows, options.max_tokens), options.pad, jnp.int32),
            "length": jnp.zeros(rows, jnp.int32),
            "log_probability": jnp.zeros(rows, jnp.float32),
            "ended": jnp.zeros(rows, bool),
        },
    )
    return {name: state[name] for name in ("tokens", "length", "ended", "log_probability")}


def nucleus(log_p: jax.Array, top_p: float) -> jax.Array:
    """Log weights [..., V] of the fewest most likely tokens whose probabilities reach `top_p`; `NEVER` for the others.

    Of equals the one with the lower id comes first. The most likely token always stays.
    """
    order = jnp.argsort(-log_p, axis=-1, stable=True)
    ordered = jax.nn.softmax(jnp.take_along_axis(log_p, order, axis=-1), axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    kept = jnp.take_along_axis((before < top_p).at[..., 0].set(True), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, log_p, NEVER)


def _penalty(length: Any, options: Sampling) -> jax.Array:
    return ((5.0 + length) / 6.0) ** options.length_penalty


def _beam(step: Step, cache: Any, rows: int, options: Sampling, reorder: Reorder) -> dict[str, jax.Array]:
    """The `beams` most likely unfinished texts go on; of the finished ones the best by `_penalty` is kept.

    A row is done when no unfinished text can become better than its best finished one. A text that `max_tokens` cuts counts
    only where none was finished.
    """
    beams, most = options.beams, options.max_tokens

    def done(state: dict[str, Any]) -> jax.Array:
        # Log probabilities only fall, and the largest penalty flatters them most.
        bound = state["alive"][:, 0] / jnp.maximum(_penalty(most, options), _penalty(1, options))
        return jnp.all(state["best"]["score"] >= bound)

    def body(state: dict[str, Any]) -> dict[str, Any]:
        position = state["position"]
        logits, cache = step(state["last"], position, state["cache"])
        # [B, K, V]
        log_p = state["alive"][..., None] + _log_probabilities(logits, state["tokens"], position, options)
        vocab = log_p.shape[-1]
        # At most K of these end, one of each text: K are left to go on.
        total, place = jax.lax.top_k(log_p.reshape(rows, -1), 2 * beams)
        parent, token = place // vocab, (place % vocab).astype(jnp.int32)
        tokens = jnp.take_along_axis(state["tokens"], parent[..., None], axis=1).at[:, :, position].set(token)
        ends = token == options.end
        best = _better(state["best"], jnp.where(ends, total, -jnp.inf), tokens, position + 1, options)
        alive, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, total), beams)
        return {
            "position": position + 1,
            "last": jnp.take_along_axis(token, kept, axis=1),
            "cache": reorder(cache, jnp.take_along_axis(parent, kept, axis=1)),
            "tokens": jnp.take_along_axis(tokens, kept[..., None], axis=1),
            "alive": alive,
            "best": best,
        }

    empty = jnp.full((rows, beams, most), options.pad, jnp.int32)
    nothing = {
        "score": jnp.full(rows, -jnp.inf),
        "tokens": empty[:, 0],
        "length": jnp.full(rows, most, jnp.int32),
        "log_probability": jnp.full(rows, -jnp.inf),
    }
    state = jax.lax.while_loop(
        lambda state: (state["position"] < most) & ~done(state),
        body,
        {
            "position": jnp.int32(0),
            "last": jnp.full((rows, beams), options.start, jnp.int32),
            "cache": cache,
            "tokens": empty,
            # All texts of a row are the same at first: only one of them counts.
            "alive": jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (rows, beams)),
            "best": nothing,
        },
    )
    best, ended = state["best"], jnp.isfinite(state["best"]["score"])
    return {
        "tokens": jnp.where(ended[:, None], best["tokens"], state["tokens"][:, 0]),
        "length": best["length"],
        "ended": ended,
        "log_probability": jnp.where(ended, best["log_probability"], state["alive"][:, 0]),
    }


def _better(
    best: dict[str, jax.Array], total: jax.Array, tokens: jax.Array, length: jax.Array, options: Sampling
) -> dict[str, jax.Array]:
    """The best finished text of each row: that so far, or one of those that end now, by `total` [B, n]."""
    first = jnp.argmax(total, axis=1)
    log_p = jnp.take_along_axis(total, first[:, None], axis=1)[:, 0]
    score, own = log_p / _penalty(length, options), jnp.take_along_axis(tokens, first[:, None, None], axis=1)[:, 0]
    new = score > best["score"]
    return {
        "score": jnp.where(new, score, best["score"]),
        "tokens": jnp.where(new[:, None], own, best["tokens"]),
        "length": jnp.where(new, length, best["length"]),
        "log_probability": jnp.where(new, log_p, best["log_probability"]),
    }


def beam_reorder(cache: dict[str, Any], parents: jax.Array) -> dict[str, Any]:
    """`Reorder` for the cache of `models.report_decoder`: what was written moves with its text, the volume stays."""
    rows, beams = parents.shape
    source = (jnp.arange(rows)[:, None] * beams + parents).reshape(-1)
    return cache | {"written": jax.tree.map(lambda array: jnp.take(array, source, axis=0), cache["written"])}
