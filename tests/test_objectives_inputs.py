"""What is put into the losses: shapes that do not fit are refused, NaN shows, what is masked has no influence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mg3d_jax.errors import UserError
from mg3d_jax.objectives.contrastive import info_nce, sigmoid_contrastive
from mg3d_jax.objectives.discrimination import patient_discrimination
from mg3d_jax.objectives.masking import whole_word_mask
from mg3d_jax.objectives.matching import sentence_matching
from mg3d_jax.objectives.report_reconstruction import sentence_sums, token_sums
from mg3d_jax.objectives.sums import mean_of_sums
from mg3d_jax.objectives.volume_reconstruction import patch_sums

B, S, K, N, V = 4, 3, 5, 6, 7
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


X, Y, Z, SENTENCES, PATCHES, LOGITS = (
    normal(B, K),
    normal(B, K),
    normal(B, S, K),
    normal(B, S, 2),
    normal(B, N, 2),
    normal(B, N, V),
)
LABELS = RNG.integers(0, V, (B, N))
MASK, HIDDEN = np.arange(B * S).reshape(B, S) % 3 > 0, np.arange(B * N).reshape(B, N) % 2 > 0
MASK[2] = False  # a patient without sentences, and a row that is not valid

# name -> (loss of its arrays by name, those arrays)
LOSSES = {
    "info_nce": (lambda **a: info_nce(temperature=0.1, **a)[0], {"x": X, "y": Y, "valid": MASK[:, 1]}),
    "sigmoid": (lambda **a: sigmoid_contrastive(scale=10.0, bias=-1.0, **a)[0], {"x": X, "y": Y, "valid": MASK[:, 1]}),
    "matching": (
        lambda **a: sentence_matching(high=0.3, low=0.2, **a)[0],
        {"z": Z, "s": SENTENCES, "mask": MASK},
    ),
    "discrimination": (
        lambda **a: patient_discrimination(temperature=0.1, **a)[0],
        {"volume": X, "z": Z, "mask": MASK},
    ),
    "patches": (
        lambda **a: mean_of_sums(patch_sums(**a))["loss"],
        {"prediction": PATCHES, "target": PATCHES + 1, "mask": HIDDEN},
    ),
    "tokens": (
        lambda **a: mean_of_sums(token_sums(**a))["loss"],
        {"logits": LOGITS, "labels": LABELS, "mask": HIDDEN},
    ),
    "sentences": (
        lambda **a: mean_of_sums(sentence_sums(**a))["loss"],
        {"reconstructed": Z, "original": Z + 1, "mask": MASK},
    ),
}
LOSSES = {name: (jax.jit(loss), arrays) for name, (loss, arrays) in LOSSES.items()}
WHOLE = [(name, key) for name, (_, arrays) in LOSSES.items() for key in arrays]


@pytest.mark.parametrize("name,key", WHOLE)
@pytest.mark.parametrize("change", ["one row", "one more axis", "one axis less"])
def test_shapes_that_would_broadcast_are_refused(name, key, change):
    loss, arrays = LOSSES[name]
    array = arrays[key]
    changed = {"one row": array[:1], "one more axis": array[..., None], "one axis less": array[0]}[change]
    with pytest.raises(UserError, match="has the shape"):
        loss(**arrays | {key: changed})


def test_the_message_names_the_array_and_both_shapes():
    with pytest.raises(UserError, match=r"mask has the shape \(1, 6\) instead of \(4, 6\): prediction and target"):
        patch_sums(PATCHES, PATCHES, HIDDEN[:1])
    with pytest.raises(UserError, match=r"temperature has the shape \(5,\)"):
        info_nce(X, Y, temperature=np.ones(K))
    with pytest.raises(UserError, match=r"group_ids has the shape \(8,\) instead of \(4,\)"):
        info_nce(X, Y, temperature=0.1, group_ids=np.arange(2 * B))
    with pytest.raises(UserError, match="block_size = -1"):
        sentence_matching(Z, SENTENCES, MASK, block_size=-1)
    for ids in (np.array([1, 1 + 2**32, 2, 3]), [0, 1, 2, 2**40]):
        with pytest.raises(UserError, match="32 bits"):
            info_nce(X, Y, temperature=0.1, group_ids=ids)


@pytest.mark.parametrize("name", LOSSES)
def test_masks_may_be_numbers(name):
    """Whatever is not 0 counts, as in NumPy."""
    loss, arrays = LOSSES[name]
    key = "mask" if "mask" in arrays else "valid"
    expected = loss(**arrays)
    for numbers in (
        arrays[key].astype(np.uint8) * 255,
        arrays[key].astype(np.int32) * 2,
        arrays[key].astype(np.float32),
    ):
        assert loss(**arrays | {key: numbers}) == expected


@pytest.mark.parametrize("name,key", [pair for pair in WHOLE if pair[1] not in ("mask", "valid", "labels")])
def test_nan_shows_where_it_counts_and_only_there(name, key):
    loss, arrays = LOSSES[name]
    counts = arrays["mask" if "mask" in arrays else "valid"]
    rows = counts.any(axis=tuple(range(arrays[key].ndim - 1, counts.ndim)))  # of the array, down to its own axes
    everywhere, elsewhere = arrays[key].copy(), arrays[key].copy()
    everywhere[:] = np.nan
    # Targets that are NaN lie in no range: the report side has no loss of its own here.
    assert (name, key) == ("matching", "s") or np.isnan(loss(**arrays | {key: everywhere})), (
        "a model that has diverged looks sound"
    )
    elsewhere[~rows] = np.nan
    assert loss(**arrays | {key: elsewhere}) == loss(**arrays)


@pytest.mark.parametrize(
    "name,key",
    [
        *(("info_nce", "x"), ("sigmoid", "x"), ("matching", "z"), ("discrimination", "z")),
        *(("patches", "prediction"), ("tokens", "logits"), ("sentences", "reconstructed")),
    ],
)
def test_nan_where_nothing_counts_gets_no_gradient(name, key):
    loss, arrays = LOSSES[name]
    counts = arrays["mask" if "mask" in arrays else "valid"]
    arrays = arrays | {key: np.where(counts[..., None], arrays[key], np.nan)}
    gradient = jax.grad(lambda value: loss(**arrays | {key: value}))(jnp.asarray(arrays[key]))
    assert np.all(np.isfinite(gradient)) and not np.any(np.asarray(gradient)[~counts])


def test_square_arrays_do_not_hide_a_missing_axis():
    square, mask = np.ones((B, B), np.float32), np.ones((B, B), bool)
    whole = np.ones((B, B, K), np.float32)
    for z, s in ((square, whole), (whole, square)):
        with pytest.raises(UserError, match="has the shape"):
            sentence_matching(z, s, mask)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_has_no_loss(name):
    loss, arrays = LOSSES[name]
    assert loss(**{key: array[:0] for key, array in arrays.items()}) == 0


def test_no_sentence_at_all_is_no_loss():
    assert sentence_matching(Z[:, :0], SENTENCES[:, :0], MASK[:, :0])[0] == 0


def test_equal_sentences_attract_at_a_threshold_of_one():
    s = np.repeat(normal(50, 1, 64), 2, axis=0)
    _, metrics = sentence_matching(normal(100, 1, 8), s, np.ones((100, 1), bool), high=1.0)
    assert metrics["attract_fraction"] * 100 * 99 == pytest.approx(100)


def test_word_numbers_beyond_the_report_are_no_words():
    ids, ones = np.arange(10, 20)[None], np.ones((1, 10), bool)
    options = {"mask_id": 4, "vocab_size": 100}
    assert not whole_word_mask(jax.random.key(0), ids, ones, np.arange(20, 30)[None], **options)[1].any()
    assert (
        whole_word_mask(jax.random.key(0), ids, ones.astype(np.int32), np.arange(1, 11)[None], **options)[1].sum() == 2
    )
