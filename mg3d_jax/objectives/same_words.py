"""The same words with other patients' volumes: how a loss keeps what a report says of itself from answering for the volume.

As published, three terms compare patients by features that have read the report: fused tokens, or what a sentence finds in a
volume, which carries the sentence in the places that it attends to. Two patients then differ in their words already, and the
loss falls without a look at the volume. In the form "same_words" everything that is compared has read the same words, and
only the volumes differ: the words of row b meet the volume of row b and those of the K rows that follow it in the batch, which
is shuffled. A volume encoder that gives every patient the same leaves these losses at chance, whatever the rest learns.

The K rows are of the rows that a step computes at once: of the batch, or with `optimizer.accumulation` or
`optimizer.gradient_cache` of a micro-batch. So what pairs rows happens in `draw`, in the model and in `features` of an
objective, and never in its loss, which sees the rows of all micro-batches.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mg3d_jax.objectives.pairwise import Tree, masked_mean

PUBLISHED, SAME_WORDS = FORMS = ("published", "same_words")
FORM_MEANING = '"published", or "same_words": the same words with model.fusion.other_volumes other volumes'


def too_few_rows(name: str, config: Any) -> list[str]:
    """The problem of a batch, or micro-batch, that has no other volumes to offer to the objective `name`."""
    rows, wanted = config.data.batch_size // config.optimizer.accumulation, config.model.fusion.other_volumes
    if rows > wanted >= 1:
        return []
    return [
        f"{name} in the form {SAME_WORDS!r} needs model.fusion.other_volumes = {wanted} to be at least 1, and below the {rows} "
        "patients of a batch (data.batch_size / optimizer.accumulation)"
    ]


def others(tree: Tree, count: int) -> Tree:
    """[B, ...] -> [B, K, ...]: beside row b the K rows that follow it, after the last the first again. K is `count`."""
    return jax.tree.map(lambda a: jnp.stack([jnp.roll(a, -k, axis=0) for k in range(1, count + 1)], axis=1), tree)


def other_patients(valid: jax.Array, groups: jax.Array, count: int) -> jax.Array:
    """bool [B, K]: is the other row one to compare with? Both rows are `valid` [B], and of different `groups` int [B]."""
    differ = groups[:, None] != others(groups, count)
    return differ & valid[:, None] & others(valid, count)


def own_among_others(logits: jax.Array, there: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of a softmax over volumes that have met the same words; the right one is the first.

    Args:
        logits: [B, 1 + K], the patient's own volume first.
        there: bool [B, K], the other volumes that count. A row without any takes no part.

    Returns:
        The mean over the rows, 0 without any, and metrics: `accuracy` (the own volume beats every other one; a tie does not
        count as that) and `chance`, the loss of equal logits.
    """
    logits, rows = logits.astype(jnp.float32), jnp.any(there, axis=1)
    # -log softmax of the first = log(1 + sum of exp(other - own)).
    margins = jnp.where(there, logits[:, 1:] - logits[:, :1], -jnp.inf)
    margins = jnp.where(rows[:, None], margins, 0.0)  # a row of -inf only has no gradient but NaN
    losses = jax.nn.softplus(jax.nn.logsumexp(margins, axis=1))
    chance = jnp.log1p(jnp.sum(there, axis=1, dtype=jnp.float32))
    wins = jnp.all(margins < 0, axis=1).astype(jnp.float32)
    metrics = {"accuracy": masked_mean(wins, rows), "chance": masked_mean(chance, rows)}
    return masked_mean(losses, rows), jax.lax.stop_gradient(metrics)
