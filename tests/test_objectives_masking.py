"""Masks: counts, static shapes, uniformity, whole words, and the same draw on any mesh."""

import jax
import numpy as np
import pytest
from reference.tools import fake_mesh

from mg3d_jax.errors import UserError
from mg3d_jax.objectives.masking import (
    masked_count,
    nested_patch_mask,
    random_patch_mask,
    selected_positions,
    whole_word_mask,
)

MASK_ID, VOCABULARY, SPECIAL = 4, 50, (0, 1, 2, 3, 4)


def check_consistent(visible, mask):
    for row, hidden in zip(np.asarray(visible), np.asarray(mask), strict=True):
        np.testing.assert_array_equal(row, np.flatnonzero(~hidden))


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.75])
def test_random_patches(ratio):
    visible, mask = jax.jit(random_patch_mask, static_argnums=(1, 2, 3))(jax.random.key(0), 400, 24, ratio)
    check_consistent(visible, mask)
    assert np.all(mask.sum(1) == masked_count(24, ratio))
    np.testing.assert_allclose(np.asarray(mask).mean(0), masked_count(24, ratio) / 24, atol=0.12)  # uniform over places
    assert len(np.unique(np.asarray(mask), axis=0)) > 100  # patients differ


def test_at_least_one_patch_is_hidden_and_one_visible():
    assert masked_count(10, 0.01) == 1 and masked_count(10, 0.99) == 9
    for total, ratio in ((1, 0.5), (8, 0.0), (8, 1.0)):
        with pytest.raises(UserError, match=r"ratio|patch"):
            masked_count(total, ratio)


@pytest.mark.parametrize("ratio,vanish", [(0.05, 1), (0.5, 12), (0.6, 14), (0.75, 18), (0.98, 40)])
def test_nested_patches_hide_whole_cells_and_thin_the_others(ratio, vanish):
    """Half of the ratio, until the other cells could keep none of their patches."""
    visible, mask = nested_patch_mask(jax.random.key(1), 50, (8, 8, 6), ratio)
    check_consistent(visible, mask)
    assert np.all(np.asarray(mask).sum(1) == round(384 * ratio))
    cells = np.asarray(mask).reshape(50, 4, 2, 4, 2, 3, 2).transpose(0, 1, 3, 5, 2, 4, 6).reshape(50, 48, 8).sum(2)
    whole = (cells == 8).sum(1)
    assert np.all(whole == vanish)
    partial = cells[cells < 8]
    assert partial.max() - partial.min() <= 1
    often = np.mean(cells == 8, axis=0)
    assert np.abs(often - vanish / 48).max() < 5 * np.sqrt(0.25 / 50)  # every cell alike


def test_nested_patches_refuse_what_they_cannot_tile():
    with pytest.raises(UserError, match="tile"):
        nested_patch_mask(jax.random.key(0), 2, (3, 4, 4), 0.5)
    with pytest.raises(UserError, match="too low"):
        nested_patch_mask(jax.random.key(0), 2, (2, 2, 4), 0.25)
    with pytest.raises(UserError, match="at least two patches"):
        nested_patch_mask(jax.random.key(0), 2, (4, 4, 4), 0.5, cell=(1, 1, 1))


def make_reports(batch=300, length=40, seed=0):
    """Reports of different lengths with words of 1 to 4 pieces; the first report is empty."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((batch, length), np.int32)
    words = np.zeros((batch, length), np.int32)
    mask = np.zeros((batch, length), bool)
    for b in range(batch):
        end = 2 if b == 0 else int(rng.integers(6, length))
        mask[b, :end] = True
        ids[b, 0], ids[b, end - 1] = 2, 3
        position, word = 1, 0
        while position < end - 1:
            word += 1
            pieces = min(int(rng.integers(1, 5)), end - 1 - position)
            words[b, position : position + pieces] = word
            ids[b, position : position + pieces] = rng.integers(5, VOCABULARY, pieces)
            position += pieces
    return ids, mask, words


def corrupt(reports, seed=0, ratio=0.15):
    options = {"ratio": ratio, "mask_id": MASK_ID, "vocab_size": VOCABULARY, "special_ids": SPECIAL}
    return jax.jit(lambda key, *r: whole_word_mask(key, *r, **options))(jax.random.key(seed), *reports)


def test_whole_words_are_selected_and_nothing_else_changes():
    ids, _, words = reports = make_reports()
    corrupted, selected = map(np.asarray, corrupt(reports))
    np.testing.assert_array_equal(corrupted[~selected], ids[~selected])
    assert not selected[words == 0].any()
    for b in range(len(ids)):
        chosen = 0
        for word in range(1, words[b].max() + 1):
            pieces = selected[b, words[b] == word]
            assert pieces.all() or not pieces.any()
            chosen += pieces.all()
        count = words[b].max()
        assert chosen == (max(1, np.round(0.15 * count)) if count else 0)


def test_no_more_than_most_tokens_are_selected_in_whole_words():
    _, _, words = reports = make_reports(batch=40)
    options = {"ratio": 0.4, "mask_id": MASK_ID, "vocab_size": VOCABULARY, "special_ids": SPECIAL}
    free = np.asarray(whole_word_mask(jax.random.key(0), *reports, **options)[1])
    corrupted, selected = map(np.asarray, whole_word_mask(jax.random.key(0), *reports, **options, most=9))
    assert free.sum(axis=1).max() > 9 and selected.sum(axis=1).max() <= 9
    for b in range(len(words)):
        kept = 0
        for word in np.unique(words[b][free[b]]):  # in order: the first words that fit, and the last may fit no more
            place = words[b] == word
            assert selected[b, place].all() == (free[b, : np.flatnonzero(place)[-1] + 1].sum() <= 9)
            kept += place.sum() * selected[b, place].all()
        assert selected[b].sum() == kept
    np.testing.assert_array_equal(corrupted[~selected], reports[0][~selected])
    positions, counts = map(np.asarray, selected_positions(selected, 9))
    for b in range(len(words)):
        np.testing.assert_array_equal(positions[b][counts[b]], np.flatnonzero(selected[b]))


def test_shares_are_80_10_10_per_word():
    ids, _, words = reports = make_reports(batch=600)
    corrupted, selected = map(np.asarray, corrupt(reports, seed=1, ratio=0.5))
    masked = kept = replaced = 0
    for b in range(len(ids)):
        for word in np.unique(words[b][selected[b]]):
            place = words[b] == word
            if np.all(corrupted[b, place] == MASK_ID):
                masked += 1
            elif np.all(corrupted[b, place] == ids[b, place]):
                kept += 1
            else:
                assert MASK_ID not in corrupted[b, place]  # never a mixture within a word
                replaced += 1
    total = masked + kept + replaced
    assert total > 1500
    assert masked / total == pytest.approx(0.8, abs=0.03)
    assert replaced / total == pytest.approx(0.1, abs=0.03) and kept / total == pytest.approx(0.1, abs=0.03)


def test_special_ids_are_neither_selected_nor_drawn():
    ids, mask, words = make_reports(batch=600)
    ids[:, 3] = 1  # an unknown word inside the text
    corrupted, selected = map(np.asarray, corrupt((ids, mask, words), ratio=0.9))
    assert not np.isin(ids[selected], SPECIAL).any()
    drawn = corrupted[selected & (corrupted != MASK_ID)]
    assert not np.isin(drawn, SPECIAL).any()
    assert drawn.min() == 5 and drawn.max() == VOCABULARY - 1


def test_the_draw_depends_on_the_key_only():
    def draw(key, *reports):
        words = whole_word_mask(key, *reports, mask_id=MASK_ID, vocab_size=VOCABULARY)
        return random_patch_mask(key, 16, 24, 0.5), nested_patch_mask(key, 16, (4, 4, 2), 0.5), words

    reports = make_reports(16)
    expected = jax.jit(draw)(jax.random.key(3), *reports)
    mesh = fake_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        drawn = jax.block_until_ready(
            jax.jit(draw, out_shardings=rows)(jax.random.key(3), *jax.device_put(reports, rows))
        )
    jax.tree.map(np.testing.assert_array_equal, drawn, expected)
    other = jax.jit(draw)(jax.random.key(4), *reports)
    assert np.any(np.asarray(other[0][1]) != np.asarray(expected[0][1]))
