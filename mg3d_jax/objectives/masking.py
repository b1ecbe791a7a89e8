"""What is hidden from the towers: patches of the volume, words of the report. Drawn inside the compiled step.

Every function takes a key that the step derives from `(seed, step)`, has static shapes, and draws the same on any mesh.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.errors import UserError

KEEP_SHARE, RANDOM_SHARE = 0.1, 0.1  # of the selected words; the others become the mask token (Devlin et al. 2019)


def masked_count(total: int, ratio: float) -> int:
    """How many of `total` are hidden: the nearest to `ratio`, but at least one hidden and at least one visible."""
    if not 0 < ratio < 1:
        raise UserError(f"mask ratio {ratio} must lie strictly between 0 and 1.")
    if total < 2:
        raise UserError(f"{total} patch or cell cannot be split into hidden and visible ones; use smaller ones.")
    return min(max(round(total * ratio), 1), total - 1)


def _visible_and_mask(scores: jax.Array, visible: int) -> tuple[jax.Array, jax.Array]:
    """The `visible` lowest scores of each row stay: their indices in ascending order [B, Nv], and mask [B, N]."""
    kept = jnp.sort(jnp.argsort(scores, axis=1)[:, :visible], axis=1).astype(jnp.int32)
    rows = jnp.arange(scores.shape[0])[:, None]
    return kept, jnp.ones(scores.shape, jnp.bool_).at[rows, kept].set(False)


def random_patch_mask(rng: jax.Array, batch: int, num_patches: int, ratio: float) -> tuple[jax.Array, jax.Array]:
    """Hides `round(ratio * num_patches)` patches of every patient, uniformly.

    Returns `visible` int32 [B, Nv], ascending, and `mask` bool [B, N], True where the patch is hidden.
    """
    scores = jax.random.uniform(rng, (batch, num_patches))
    return _visible_and_mask(scores, num_patches - masked_count(num_patches, ratio))


def nested_patch_mask(
    rng: jax.Array, batch: int, grid: tuple[int, int, int], ratio: float, cell: tuple[int, int, int] = (2, 2, 2)
) -> tuple[jax.Array, jax.Array]:
    """Mask in mask, two levels (after MiM, arXiv 2404.15580): whole cells of patches, then patches in the other cells.

    Half of the ratio is spent on cells that vanish as a whole, so that their inside cannot be filled in from a
    neighbouring patch; the rest is spent evenly in the cells that remain, so that each of them keeps some patches.

    Args:
        grid: patches along x, y, z, row-major as `patchify` numbers them.
        ratio: share of all patches that is hidden, both levels together; rounded as by `random_patch_mask`.
        cell: patches per cell along each axis; must divide `grid`.

    Returns:
        As `random_patch_mask`.
    """
    if any(g % c for g, c in zip(grid, cell, strict=True)):
        raise UserError(f"mask cells of {tuple(cell)} patches do not tile a grid of {tuple(grid)} patches.")
    cells = tuple(g // c for g, c in zip(grid, cell, strict=True))
    num_cells, cell_patches = math.prod(cells), math.prod(cell)
    if cell_patches < 2:
        raise UserError(
            f"mask cells of {tuple(cell)} patches have no second level: a cell must hold at least two patches."
        )
    wanted = masked_count(num_cells * cell_patches, ratio)
    # Half in whole cells, or more where the others could not keep a patch each.
    hidden_cells = max(masked_count(num_cells, ratio / 2), wanted - num_cells * (cell_patches - 1))
    remaining, inside = num_cells - hidden_cells, wanted - hidden_cells * cell_patches
    if inside < 1:
        raise UserError(
            f"mask ratio {ratio} is too low for two levels on {num_cells} cells of {tuple(cell)} patches: "
            "raise the ratio, or use smaller patches or plain random masking."
        )
    each, more = divmod(inside, remaining)  # hidden in each remaining cell, and in how many of them one more
    cell_key, patch_key = jax.random.split(rng)
    cell_rank = jnp.argsort(jnp.argsort(jax.random.uniform(cell_key, (batch, num_cells)), axis=1), axis=1)
    patch_rank = jnp.argsort(
        jnp.argsort(jax.random.uniform(patch_key, (batch, num_cells, cell_patches)), axis=2), axis=2
    )
    inside_of_cell = jnp.where(cell_rank < hidden_cells, cell_patches, each + (cell_rank < hidden_cells + more))
    hidden = patch_rank < inside_of_cell[:, :, None]
    hidden = hidden.reshape(batch, *cells, *cell).transpose(0, 1, 4, 2, 5, 3, 6).reshape(batch, math.prod(grid))
    visible = jnp.argsort(hidden, axis=1, stable=True)[:, : math.prod(grid) - wanted]
    return visible.astype(jnp.int32), hidden


def _pick_words(rng: jax.Array, candidate: jax.Array, word_index: jax.Array, ratio: float) -> jax.Array:
    """Bool [B, W]: `max(1, round(ratio * words))` of each report's words, uniformly; word 0 is no word."""
    batch, length = word_index.shape
    rows = jnp.arange(batch)[:, None]
    exists = jnp.zeros((batch, length + 1), jnp.bool_).at[rows, word_index].max(candidate).at[:, 0].set(False)
    scores = jnp.where(exists, jax.random.uniform(rng, exists.shape), jnp.inf)
    words = jnp.sum(exists, axis=1, dtype=jnp.int32)
    wanted = jnp.minimum(jnp.maximum(jnp.round(ratio * words).astype(jnp.int32), 1), words)
    rank = jnp.argsort(jnp.argsort(scores, axis=1), axis=1)
    return exists & (rank < wanted[:, None])


def _random_ids(rng: jax.Array, shape: tuple[int, ...], vocab_size: int, special_ids: tuple[int, ...]) -> jax.Array:
    """Uniform over the vocabulary without the special ids."""
    special = sorted({i for i in special_ids if 0 <= i < vocab_size})
    ids = jax.random.randint(rng, shape, 0, vocab_size - len(special), dtype=jnp.int32)
    for skip in special:
        ids += ids >= skip
    return ids


def most_selected(tokens: int, ratio: float) -> int:
    """Tokens of a report that are predicted at most. Words have different numbers of pieces: twice the expected share of
    tokens leaves room for them, and keeps the prediction over the vocabulary from running over all tokens."""
    return min(tokens, math.ceil(2 * ratio * tokens))


def selected_positions(selected: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Bool [B, T] with at most `most` True per row -> their positions int32 [B, most], in order, and which of them count.

    The positions that do not count are of tokens that are not selected.
    """
    positions = jnp.argsort(~selected, axis=1, stable=True)[:, :most].astype(jnp.int32)
    return positions, jnp.take_along_axis(selected, positions, axis=1)


def whole_word_mask(
    rng: jax.Array,
    token_ids: jax.Array,
    token_mask: jax.Array,
    word_index: jax.Array,
    *,
    ratio: float = 0.15,
    mask_id: int,
    vocab_size: int,
    special_ids: tuple[int, ...] = (),
    most: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Selects words and corrupts them: 80 % become the mask token, 10 % random tokens, 10 % stay as they are.

    Whether a word is masked, replaced or kept is decided per WORD: decided per token, a kept piece would give away the
    word whose other pieces are masked. Random replacements are drawn per token.

    Args:
        token_ids: int [B, T]. token_mask: bool [B, T], False for padding.
        word_index: int [B, T], 1..T: the word that the token belongs to; 0 (special tokens, padding) is never selected.
        ratio: share of the words of each report; the nearest whole number, at least one word where there is one.
        mask_id: id of the mask token.
        vocab_size: random ids are drawn below it.
        special_ids: ids that are never selected nor drawn ([PAD], [UNK], [CLS], [SEP], [MASK]).
        most: selected words that do not fit into so many tokens of a report, the last ones of it, stay as they are; see
            `most_selected`.

    Returns:
        `corrupted_ids` int32 [B, T] and `selected` bool [B, T], the tokens that are to be predicted.
    """
    if not 0 < ratio < 1:
        raise UserError(f"word mask ratio {ratio} must lie strictly between 0 and 1.")
    word_key, action_key, id_key = jax.random.split(rng, 3)
    token_mask, word_index = jnp.asarray(token_mask).astype(jnp.bool_), jnp.asarray(word_index)
    candidate = token_mask & (word_index > 0) & (word_index <= word_index.shape[1])
    if special_ids:
        candidate &= ~jnp.isin(token_ids, np.asarray(special_ids))
    word_index = jnp.where(candidate, word_index, 0)
    picked = _pick_words(word_key, candidate, word_index, ratio)
    action = jax.random.uniform(action_key, picked.shape)

    def of_word(per_word: jax.Array) -> jax.Array:
        return jnp.take_along_axis(per_word, word_index, axis=1)

    selected = of_word(picked)
    if most is not None:
        beyond = selected & (jnp.cumsum(selected, axis=1) > most)
        cut = jax.vmap(lambda word, late: jnp.zeros(word.size + 1, bool).at[word].max(late))(word_index, beyond)
        selected &= ~of_word(cut)
    action = of_word(action)
    replacements = _random_ids(id_key, token_ids.shape, vocab_size, (*special_ids, mask_id))
    corrupted = jnp.where(
        action < KEEP_SHARE, token_ids, jnp.where(action < KEEP_SHARE + RANDOM_SHARE, replacements, mask_id)
    )
    return jnp.where(selected, corrupted, token_ids).astype(jnp.int32), selected
