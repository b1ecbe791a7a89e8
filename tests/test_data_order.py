"""The order of records: every epoch a permutation, shares kept in every window, any position at once."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mg3d_jax.data.order import RecordOrder, reports_of_others
from mg3d_jax.errors import UserError


def test_without_weights_an_epoch_is_every_record_once():
    order = RecordOrder((7, 13), seed=3)
    epochs = [[order[e * 20 + i] for i in range(20)] for e in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert [RecordOrder((7, 13), seed=4)[i] for i in range(20)] != epochs[0]


def test_any_position_can_be_asked_for_at_any_time():
    order = RecordOrder((5, 9, 4), (2, 1, 0.5), seed=0)
    walked = [order[p] for p in range(300)]
    fresh = pickle.loads(pickle.dumps(order))
    positions = np.random.default_rng(0).permutation(300)
    assert [fresh[int(p)] for p in positions] == [walked[p] for p in positions]
    assert RecordOrder((5, 9, 4), (2, 1, 0.5), seed=0)[10**12] < 18  # far into a run, at once


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.1, 0.25, 0.7, 1, 3, 10, 47149, 1564]), min_size=1, max_size=5),
    start=st.integers(0, 10**6),
)
def test_shares_hold_in_every_window(weights, start):
    lengths = [40] * len(weights)
    order, length = RecordOrder(lengths, weights, seed=0), 200
    folders = np.array([order[start + i] // 40 for i in range(length)])
    counts = np.cumsum(np.eye(len(weights))[folders], axis=0)
    counts = np.concatenate([np.zeros((1, len(weights))), counts])
    share, allowed = np.array(weights) / sum(weights), 1 if len(weights) <= 2 else 2
    for a, b in itertools.combinations(range(0, length + 1, 7), 2):
        assert np.abs(counts[b] - counts[a] - (b - a) * share).max() < allowed + 1e-9


def test_every_folder_is_walked_in_shuffled_epochs_of_its_own():
    lengths, weights = (6, 10), (1, 3)
    order = RecordOrder(lengths, weights, seed=1)
    drawn = [order[p] for p in range(240)]
    of_folder = [[i for i in drawn if i < 6], [i - 6 for i in drawn if i >= 6]]
    assert [len(o) for o in of_folder] == [60, 180]
    for length, walked in zip(lengths, of_folder, strict=True):
        epochs = [tuple(walked[i : i + length]) for i in range(0, len(walked), length)]
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
        assert len(set(epochs)) > len(epochs) / 2
    # A folder's own order does not depend on how much of the others is mixed in.
    other = [i for i in (RecordOrder(lengths, (5, 2), seed=1)[p] for p in range(84)) if i < 6]
    assert other[:60] == of_folder[0][: len(other)]


def test_positions_of_records_are_even():
    """No place of an epoch prefers a record: chi-square of 4,000 epochs of 6 records."""
    order = RecordOrder((6,), seed=0)
    counts = Counter((p % 6, order[p]) for p in range(24_000))
    statistic = sum((counts[a, b] - 4000 / 6) ** 2 / (4000 / 6) for a in range(6) for b in range(6))
    assert statistic < 50  # 25 degrees of freedom; 50 has p = 0.002


def test_reports_come_from_other_patients_of_the_same_folder():
    patients = [[3, 1, 2, 1, 1], [1, 1]]
    partner = reports_of_others(patients, seed=5)
    owner = np.repeat(range(7), list(itertools.chain(*patients)))
    assert sorted(partner) == list(range(10)) and np.all(owner[partner] != owner)
    assert np.array_equal(partner < 8, np.arange(10) < 8)
    with pytest.raises(UserError, match="3 of its 5 records"):
        reports_of_others([[3, 2]], seed=0)
