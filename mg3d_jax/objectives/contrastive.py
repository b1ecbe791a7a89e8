"""Contrastive losses over the global batch: symmetric InfoNCE (CLIP) and the sigmoid form (SigLIP).

Both see every pair of the batch through `pairwise.walk`: the B x B matrix of similarities never exists, on any device.

Rows that share a group id (two reconstructions of one scan share a report) are masked: they are left out of each
other's negatives, and each row keeps its own partner as its only positive. Several positives per row would add no
information, since they carry the same report, and the floor of the loss (the log of their number) would move with the
number of duplicates that a batch happens to hold.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.objectives.base import Metrics
from mg3d_jax.objectives.pairwise import (
    Tree,
    check_shapes,
    default_ids,
    l2_normalize,
    masked_mean,
    pair_sum,
    walk,
    zero_unless,
)

NO_NEGATIVES = -1e30  # log-sum-exp of nothing: finite, so that no infinity meets a zero
_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # a TPU would otherwise multiply in bfloat16


def _inputs(
    x: jax.Array, y: jax.Array, group_ids: jax.Array | None, valid: jax.Array | None, **numbers: jax.Array | float
) -> tuple[jax.Array, jax.Array, Tree, list[jax.Array]]:
    """Checked: unit vectors of both sides (zeros where not valid), the keys of `walk`, and each of `numbers` as float32."""
    batch_size, width = (*np.shape(x), 0, 0)[:2]
    kinds = np.shape(group_ids)[1:2] if group_ids is not None else ()
    check_shapes(
        "x and y are [B, k], group_ids [B] or [B, G], valid [B]",
        x=(x, (batch_size, width)),
        y=(y, (batch_size, width)),
        group_ids=(group_ids, (batch_size, *kinds)),
        valid=(valid, (batch_size,)),
    )
    found = {name: jnp.asarray(number, jnp.float32) for name, number in numbers.items()}
    for name, number in found.items():
        if number.size != 1:
            raise UserError(f"{name} has the shape {number.shape}: it is one number")
    groups = default_ids(group_ids, batch_size)
    keys = {
        "index": jnp.arange(batch_size, dtype=jnp.int32),
        "group": groups if groups.ndim > 1 else groups[:, None],
        "valid": jnp.ones(batch_size, jnp.bool_) if valid is None else jnp.asarray(valid).astype(jnp.bool_),
    }
    x, y = (l2_normalize(zero_unless(keys["valid"], side)) for side in (x, y))
    return x, y, keys, [number.reshape(()) for number in found.values()]


def _negatives(rows: Tree, columns: Tree) -> jax.Array:
    """[rows, columns] bool: pairs of valid rows that share no group."""
    differ = jnp.all(rows["group"][:, None, :] != columns["group"], axis=-1)
    return differ & rows["valid"][:, None] & columns["valid"]


def _merge(state: Tree, logits: jax.Array, mask: jax.Array, axis: int) -> Tree:
    """Adds the logits where `mask`, reduced over `axis`, to a running (maximum, sum of exponentials relative to it)."""
    largest = jnp.maximum(state["max"], jnp.max(jnp.where(mask, logits, NO_NEGATIVES), axis=axis))
    exponentials = jnp.where(mask, jnp.exp(jnp.minimum(logits - jnp.expand_dims(largest, axis), 0.0)), 0.0)
    return {"max": largest, "sum": state["sum"] * jnp.exp(state["max"] - largest) + jnp.sum(exponentials, axis=axis)}


def _log(state: Tree) -> jax.Array:
    some = state["sum"] > 0
    return jnp.where(some, state["max"] + jnp.log(jnp.where(some, state["sum"], 1.0)), NO_NEGATIVES)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _negatives_log_sum_exp(block_size: int | None, x: jax.Array, y: jax.Array, keys: Tree) -> tuple[Tree, Tree]:
    """Log-sum-exp and maximum of the logits of the negatives, per row of `x` [B, k] and of `y` [B, k].

    For `x` also their sum ("logits") and "count". Only "log_sum_exp" is differentiable, the rest serves the metrics.
    """

    def tile(rows: Tree, row_state: Tree, columns: Tree, column_state: Tree) -> tuple[Tree, Tree]:
        logits, mask = _dot(rows["x"], columns["y"].T), _negatives(rows["keys"], columns["keys"])
        merged = _merge(row_state, logits, mask, axis=1)
        merged["logits"] = row_state["logits"] + jnp.sum(jnp.where(mask, logits, 0.0), axis=1)
        merged["count"] = row_state["count"] + jnp.sum(mask, axis=1, dtype=jnp.float32)
        return merged, _merge(column_state, logits, mask, axis=0)

    zero = jnp.zeros(x.shape[0], jnp.float32)
    start = {"max": zero + NO_NEGATIVES, "sum": zero}
    row_state = start | {"logits": zero, "count": zero}
    rows, columns = walk(tile, {"x": x, "keys": keys}, row_state, {"y": y, "keys": keys}, start, block_size=block_size)
    return rows | {"log_sum_exp": _log(rows)}, columns | {"log_sum_exp": _log(columns)}


def _forward(block_size: int | None, x: jax.Array, y: jax.Array, keys: Tree) -> tuple[tuple[Tree, Tree], Tree]:
    rows, columns = _negatives_log_sum_exp(block_size, x, y, keys)
    return (rows, columns), (x, y, keys, rows["log_sum_exp"], columns["log_sum_exp"])


def _backward(block_size: int | None, saved: Tree, cotangents: tuple[Tree, Tree]) -> tuple:
    """d log_sum_exp = softmax . d logits, for rows and columns at once, with the tiles recomputed."""
    x, y, keys, row_lse, column_lse = saved

    def tile(rows: Tree, dx: jax.Array, columns: Tree, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, mask = _dot(rows["x"], columns["y"].T), _negatives(rows["keys"], columns["keys"])
        share_of_row = jnp.exp(jnp.minimum(logits - rows["lse"][:, None], 0.0))
        share_of_column = jnp.exp(jnp.minimum(logits - columns["lse"], 0.0))
        d_logits = jnp.where(mask, rows["g"][:, None] * share_of_row + columns["g"] * share_of_column, 0.0)
        return dx + _dot(d_logits, columns["y"]), dy + _dot(d_logits.T, rows["x"])

    rows = {"x": x, "keys": keys, "lse": row_lse, "g": cotangents[0]["log_sum_exp"]}
    columns = {"y": y, "keys": keys, "lse": column_lse, "g": cotangents[1]["log_sum_exp"]}
    dx, dy = walk(tile, rows, jnp.zeros_like(x), columns, jnp.zeros_like(y), block_size=block_size)
    return dx, dy, None


_negatives_log_sum_exp.defvjp(_forward, _backward)


def info_nce(
    x: jax.Array,
    y: jax.Array,
    *,
    temperature: jax.Array | float,
    group_ids: jax.Array | None = None,
    valid: jax.Array | None = None,
    block_size: int | None = None,
) -> tuple[jax.Array, Metrics]:
    """Symmetric InfoNCE over the global batch (CLIP, arXiv 2103.00020): mean cross-entropy of x-to-y and y-to-x.

    Args:
        x, y: [B, k], l2-normalised here in float32 (a zero vector stays zero). Row i of `x` belongs to row i of `y`.
        temperature: divides the cosines; may be learned.
        group_ids: int [B], or [B, G] for G kinds of groups; rows that share a group are not each other's negatives.
            None: all rows differ.
        valid: bool [B]; False rows are neither queries nor candidates. None: all are valid.
        block_size: candidates per tile; it changes memory and speed, never the value. None chooses it by size.

    Returns:
        The loss (0 when no row is valid) and metrics: `accuracy` (share of rows, over both directions, whose partner
        beats every negative), `positive_similarity` and `negative_similarity` (mean cosines).

    Raises:
        UserError: shapes that do not fit together, `block_size` below 1, ids of more than 32 bits.

    First-order gradients in reverse mode only (`jax.grad`, not `jax.jvp`).
    """
    x, y, keys, (temperature,) = _inputs(x, y, group_ids, valid, temperature=temperature)
    valid, scale = keys["valid"], 1.0 / temperature
    scaled = x * scale
    positive = jnp.sum(scaled * y, axis=-1)
    to_y, to_x = _negatives_log_sum_exp(block_size, scaled, y, keys)
    # -log(e^p / (e^p + sum of e^negatives)) = softplus(log_sum_exp(negatives) - p): no cancellation when p wins clearly
    losses = [jax.nn.softplus(side["log_sum_exp"] - positive) for side in (to_y, to_x)]
    loss = masked_mean((losses[0] + losses[1]) / 2, valid)
    wins = [(positive > side["max"]).astype(jnp.float32) for side in (to_y, to_x)]
    metrics = {
        "accuracy": masked_mean((wins[0] + wins[1]) / 2, valid),
        "positive_similarity": masked_mean(positive, valid) / scale,
        "negative_similarity": jnp.sum(to_y["logits"]) / jnp.maximum(jnp.sum(to_y["count"]), 1.0) / scale,
    }
    return loss, jax.lax.stop_gradient(metrics)


def _sigmoid_tile(rows: Tree, columns: Tree, row_keys: Tree, column_keys: Tree) -> Tree:
    cosines = _dot(rows["x"], columns["y"].T)
    logits = rows["scale"][:, None] * cosines + rows["bias"][:, None]
    negative = _negatives(row_keys, column_keys)
    positive = (row_keys["index"][:, None] == column_keys["index"]) & row_keys["valid"][:, None] & column_keys["valid"]
    losses = jnp.where(positive, jax.nn.softplus(-logits), jnp.where(negative, jax.nn.softplus(logits), 0.0))
    correct = (positive & (logits > 0)) | (negative & (logits < 0))
    counted = positive | negative
    parts = {"loss": losses, "correct": correct, "counted": counted, "negatives": negative}
    parts["negative_similarity"] = jax.lax.stop_gradient(jnp.where(negative, cosines, 0.0))
    return {name: jnp.sum(part, axis=1, dtype=jnp.float32) for name, part in parts.items()}


def sigmoid_contrastive(
    x: jax.Array,
    y: jax.Array,
    *,
    scale: jax.Array | float,
    bias: jax.Array | float,
    group_ids: jax.Array | None = None,
    valid: jax.Array | None = None,
    block_size: int | None = None,
) -> tuple[jax.Array, Metrics]:
    """Sigmoid loss over all pairs of the global batch (SigLIP, arXiv 2303.15343): summed, divided by the valid rows.

    Pair (i, j) has logit `scale * cosine + bias` and is positive when i = j. `scale` is the factor itself, not its
    logarithm. The other arguments are those of `info_nce`. Metrics: `accuracy` (share of pairs on the right side of 0),
    `positive_similarity`, `negative_similarity`.
    """
    x, y, keys, (scale, bias) = _inputs(x, y, group_ids, valid, scale=scale, bias=bias)
    per_row = {name: jnp.broadcast_to(number, x.shape[:1]) for name, number in (("scale", scale), ("bias", bias))}
    sums = pair_sum(_sigmoid_tile, block_size, 1, per_row | {"x": x}, {"y": y}, keys, keys)
    total = {name: jnp.sum(values) for name, values in sums.items()}
    metrics = {
        "accuracy": total["correct"] / jnp.maximum(total["counted"], 1.0),
        "positive_similarity": masked_mean(jnp.sum(x * y, axis=-1), keys["valid"]),
        "negative_similarity": total["negative_similarity"] / jnp.maximum(total["negatives"], 1.0),
    }
    return total["loss"] / jnp.maximum(jnp.sum(keys["valid"]), 1), jax.lax.stop_gradient(metrics)
