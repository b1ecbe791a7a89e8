"""The report decoder and what it writes: cached against uncached, each method against a slow one and by properties."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import quick_variables

from mg3d_jax.errors import UserError
from mg3d_jax.models.report_decoder import ReportDecoder
from mg3d_jax.models.sampling import Sampling, beam_reorder, nucleus, repetitions, write

VOCAB, LENGTH, START, END, PAD = 7, 5, 1, 2, 0
DECODER = ReportDecoder(VOCAB, LENGTH, width=16, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def model():
    """Parameters whose words are far apart, so that tokens depend on what was written; and volume tokens [3, 6, 12]."""
    rng = np.random.default_rng(0)
    volumes = jnp.asarray(rng.normal(size=(3, 6, 12)), jnp.float32)
    variables = quick_variables(DECODER, jnp.zeros((1, LENGTH), jnp.int32), volumes[:1], seed=1)
    scaled = {name: 30 * variables["params"][name] for name in ("word_embedding", "position_embedding")}
    return {"params": variables["params"] | scaled}, volumes


@pytest.fixture(scope="module")
def log_probabilities(model):
    """`(row, ids written) -> float64 [V]` of what follows: the whole text anew each time, without a cache."""
    variables, volumes = model
    forward = jax.jit(lambda ids, volume: DECODER.apply(variables, ids, volume))
    known = {}

    def of(row, written):
        if (row, written) not in known:
            ids = np.full((1, LENGTH), PAD, np.int32)
            ids[0, : len(written) + 1] = (START, *written)
            logits = np.asarray(forward(ids, volumes[row : row + 1]), np.float64)[0, len(written)].copy()
            logits[[PAD, START]] = -np.inf
            known[row, written] = logits - np.log(np.exp(logits).sum())
        return known[row, written]

    return of


@functools.partial(jax.jit, static_argnums=0)
def compiled(sampling, variables, volumes, keys):
    cache = DECODER.apply(variables, volumes, sampling.texts, LENGTH, method="start")
    step = functools.partial(DECODER.apply, variables, method="step")
    return write(step, cache, volumes.shape[0], sampling, keys, beam_reorder)


def written(model, order=(0, 1, 2), seeds=(0, 1, 2), **options):
    variables, volumes = model
    sampling = Sampling(**({"max_tokens": LENGTH, "start": START, "end": END, "forbidden": (PAD, START)} | options))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    return jax.device_get(compiled(sampling, variables, volumes[jnp.asarray(order)], keys))


def texts(found):
    """The ids that were written, with the end; what stands behind is padding."""
    for tokens, length in zip(found["tokens"], found["length"], strict=True):
        assert np.all(tokens[length:] == PAD) and not np.any(tokens[:length] == PAD)
    ends = [END in tokens for tokens in found["tokens"]]
    np.testing.assert_array_equal(ends, found["ended"])
    return [tuple(tokens[:length].tolist()) for tokens, length in zip(found["tokens"], found["length"], strict=True)]


def total(log_probabilities, row, text):
    return sum(log_probabilities(row, text[:place])[token] for place, token in enumerate(text))


def test_a_later_token_changes_no_earlier_logits(model):
    variables, volumes = model
    ids = np.array([[1, 3, 4, 5, 6]] * 3, np.int32)
    changed = np.array([[1, 3, 4, 6, 3]] * 3, np.int32)
    forward = jax.jit(DECODER.apply)
    before, after = (np.asarray(forward(variables, one, volumes)) for one in (ids, changed))
    np.testing.assert_allclose(before[:, :3], after[:, :3], atol=1e-5)
    assert np.abs(before[:, 3:] - after[:, 3:]).max() > 0.1
    other = np.asarray(forward(variables, ids, volumes[::-1]))
    assert np.abs(before - other)[0].max() > 0.01  # the volume is read


def test_steps_with_a_cache_give_the_logits_of_the_whole_text(model):
    """K texts per volume at once, each with its own past; several layers."""
    volumes, deep = model[1], ReportDecoder(VOCAB, LENGTH, width=16, depth=2, num_heads=2)
    variables = quick_variables(deep, jnp.zeros((1, LENGTH), jnp.int32), volumes[:1], seed=2)
    ids = np.random.default_rng(1).integers(0, VOCAB, (3, 2, LENGTH)).astype(np.int32)
    cache, whole = deep.apply(variables, volumes, 2, LENGTH, method="start"), jax.jit(deep.apply)
    step = jax.jit(functools.partial(deep.apply, variables, method="step"))
    wholes = [whole(variables, ids[:, text], volumes) for text in range(2)]
    for position in range(LENGTH):
        logits, cache = step(ids[:, :, position], jnp.int32(position), cache)
        for text in range(2):
            np.testing.assert_allclose(logits[:, text], wholes[text][:, position], atol=2e-4)


def repeats(text, token, length):
    """Would `token` end a row of `length` tokens that the text already has?"""
    row, longer = (*text, token)[-length:], (*text, token)
    return len(row) == length and any(longer[i : i + length] == row for i in range(len(text) - length + 1))


@pytest.mark.parametrize("no_repeat", [0, 1, 2])
def test_greedy_is_the_most_likely_token_each_time(model, log_probabilities, no_repeat):
    found = written(model, method="greedy", no_repeat=no_repeat)
    expected = []
    for row in range(3):
        text = ()
        while len(text) < LENGTH and END not in text:
            banned = [bool(no_repeat) and repeats(text, token, no_repeat) for token in range(VOCAB)]
            text += (int(np.argmax(np.where(banned, -np.inf, log_probabilities(row, text)))),)
        expected.append(text)
    assert texts(found) == expected
    sums = [total(log_probabilities, row, text) for row, text in enumerate(expected)]
    np.testing.assert_allclose(found["log_probability"], sums, atol=1e-3)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_what_would_repeat(length):
    """Against every place of the text, of texts of few words."""
    tokens = np.random.default_rng(0).integers(0, 3, (2, 4, 8)).astype(np.int32)
    for position in range(8):
        found = np.asarray(jax.jit(repetitions, static_argnums=(2, 3))(tokens, jnp.int32(position), length, 3))
        for place in np.ndindex(2, 4):
            text = tuple(tokens[place][:position].tolist())
            assert found[place].tolist() == [repeats(text, token, length) for token in range(3)]


def test_no_method_repeats_what_it_must_not(model):
    loops = model[0]["params"] | {"position_embedding": 0 * model[0]["params"]["position_embedding"]}
    once = ({"params": loops}, model[1])
    options = {"temperature": 0.5, "top_p": 1.0, "length_penalty": -9.0}
    for method in ("greedy", "nucleus", "beam"):
        for text in texts(written(once, method=method, no_repeat=2, **options)):
            pairs = list(itertools.pairwise(text))
            assert len(set(pairs)) == len(pairs)


def slow_beam(log_probabilities, row, beams, penalty, no_repeat=0):
    """Beam search as it is told, with Python lists: unfinished texts compete with each other, finished ones are kept."""
    alive, finished = [(0.0, ())], []
    for _ in range(LENGTH):
        longer = [
            (score + log_probabilities(row, text)[token], (*text, token))
            for score, text in alive
            for token in range(VOCAB)
            if np.isfinite(log_probabilities(row, text)[token]) and not (no_repeat and repeats(text, token, no_repeat))
        ]
        longer = sorted(longer, key=lambda one: -one[0])[: 2 * beams]
        finished += [one for one in longer if one[1][-1] == END]
        alive = [one for one in longer if one[1][-1] != END][:beams]
    scored = [(score / ((5 + len(text)) / 6) ** penalty, text) for score, text in finished]
    return max(scored)[1] if scored else alive[0][1]


@pytest.mark.parametrize(
    ("beams", "penalty", "no_repeat"), [(1, 1.0, 0), (2, 0.0, 0), (3, 1.0, 0), (3, -1.0, 0), (2, 1.0, 1), (3, 0.0, 2)]
)
def test_beam_search_is_the_slow_one(model, log_probabilities, beams, penalty, no_repeat):
    found = written(model, method="beam", beams=beams, length_penalty=penalty, no_repeat=no_repeat)
    assert texts(found) == [slow_beam(log_probabilities, row, beams, penalty, no_repeat) for row in range(3)]
    sums = [total(log_probabilities, row, text) for row, text in enumerate(texts(found))]
    np.testing.assert_allclose(found["log_probability"], sums, atol=1e-3)


def test_a_beam_that_holds_all_texts_finds_the_most_likely_one(model, log_probabilities):
    """Against all texts of up to 3 words, one by one."""
    words = [token for token in range(VOCAB) if token not in (PAD, START, END)]
    for penalty in (0.0, 1.0):
        found = written(model, method="beam", beams=len(words) ** 2, length_penalty=penalty, max_tokens=3)
        for row, text in enumerate(texts(found)):
            every = [(*some, END) for n in range(3) for some in itertools.product(words, repeat=n)]
            scores = [total(log_probabilities, row, one) / ((5 + len(one)) / 6) ** penalty for one in every]
            assert text == every[int(np.argmax(scores))]


def slow_nucleus(log_p, top_p):
    p, kept = np.exp(log_p), []
    for token in sorted(range(len(p)), key=lambda token: (-p[token], token)):
        kept.append(token)
        if sum(p[kept]) >= top_p:
            break
    return kept


def test_the_nucleus_is_the_fewest_tokens_that_reach_its_share():
    for seed, top_p in itertools.product(range(5), (0.01, 0.5, 0.9, 1.0)):
        logits = np.random.default_rng(seed).normal(size=9)
        log_p = logits - np.log(np.exp(logits).sum())
        kept = np.flatnonzero(np.asarray(nucleus(jnp.asarray(log_p, jnp.float32), top_p)) > -1e8)
        assert sorted(slow_nucleus(log_p, top_p)) == kept.tolist() or (top_p == 1.0 and len(kept) >= 8)


def test_nucleus_sampling_draws_from_the_nucleus_by_its_probabilities(model, log_probabilities):
    """First tokens of 2,000 texts of one volume: their shares are those of the renormalised nucleus at the temperature."""
    options = {"method": "nucleus", "top_p": 0.8, "temperature": 1.5, "max_tokens": 2}
    found = written(model, order=[0] * 2000, seeds=np.arange(2000), **options)
    logits = log_probabilities(0, ()) / 1.5
    log_p = logits - np.log(np.exp(logits).sum())
    kept = slow_nucleus(log_p, 0.8)
    shares = np.bincount(found["tokens"][:, 0], minlength=VOCAB) / 2000
    expected = np.where(np.isin(np.arange(VOCAB), kept), np.exp(log_p), 0)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.05)
    sums = [total(log_probabilities, 0, text) for text in texts(found)[:50]]
    np.testing.assert_allclose(found["log_probability"][:50], sums, atol=1e-3)  # of the model, not of the nucleus


def test_a_row_is_written_alike_in_any_batch(model):
    """The draw belongs to the key of the row; another key draws other texts. A beam search knows its own row only."""
    options = {"method": "nucleus", "top_p": 1.0, "temperature": 2.0}
    first = texts(written(model, seeds=[5, 6, 7], **options))
    assert texts(written(model, order=[2, 0, 1], seeds=[7, 5, 6], **options)) == [first[2], first[0], first[1]]
    assert texts(written(model, seeds=[8, 9, 10], **options)) != first
    beams = texts(written(model, method="beam", beams=2, length_penalty=0.0))
    assert texts(written(model, order=[2, 0, 1], method="beam", beams=2, length_penalty=0.0)) == [
        beams[i] for i in (2, 0, 1)
    ]


def test_an_unknown_method_is_named(model):
    with pytest.raises(UserError, match="choose one of greedy, nucleus, beam"):
        written(model, method="greed")
