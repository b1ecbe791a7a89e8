"""Which record comes when: one integer, the position, is the whole state of the order.

Positions count the samples of all processes together. Every source is walked in an order of its own for each of its
epochs, drawn from (seed, source, epoch) alone, so that any position can be asked for at any time, in any process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from mg3d_jax.errors import UserError

_EPOCHS_KEPT = 2  # batches that are read ahead lie on both sides of an epoch's end


class RecordOrder:
    """Endless sequence of record indices.

    Without weights there is one source, all records: an epoch is every record once. With weights each folder is a source,
    and the folders take turns so evenly that in any n samples in a row the count of a folder differs from n times its
    share by less than 1 with two folders, less than 2 with more. Then "an epoch" (`training.epochs`) is as many samples
    as there are records, in which a folder with more than its share by number is walked more than once.

    Args:
        lengths: records of each folder; indices count through the folders.
        weights: one positive number per folder, in any unit; empty for none.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float] = (), *, seed: int):
        lengths = list(lengths) if weights else [sum(lengths)]
        starts = np.cumsum([0, *lengths])[:-1]
        shares = _whole_numbers(weights) if weights else [1]
        # Large shares first: see `_turn`. The number of the folder stays with it: the order of a folder is its own.
        sources = sorted(range(len(shares)), key=lambda k: (-shares[k], k))
        self._shares = [shares[k] for k in sources]
        self._sources = [(k, int(starts[k]), lengths[k]) for k in sources]
        self._seed = seed % 2**64
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        turn, count = _turn(position, self._shares)
        source, start, length = self._sources[turn]
        epoch, place = divmod(count, length)
        return start + int(self._permutation(source, epoch, length)[place])

    def _permutation(self, source: int, epoch: int, length: int) -> np.ndarray:
        known = self._permutations  # threads share it: replaced as a whole, at worst drawn twice
        if (source, epoch) not in known:
            recent = {key: p for key, p in known.items() if key[0] != source or abs(key[1] - epoch) < _EPOCHS_KEPT}
            known = self._permutations = recent | {(source, epoch): permutation(length, self._seed, source, epoch)}
        return known[source, epoch]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_permutations": {}}


def permutation(length: int, *key: int) -> np.ndarray:
    """A permutation of `range(length)` drawn from `key`. Made from a generator's raw bits: of NumPy's random numbers
    these alone are promised to stay the same in every version, and a run may be resumed with another one."""
    bits = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(length)
    return np.argsort(bits, kind="stable")


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """The same shares as whole numbers, exactly as written in decimals: (0.7, 0.2) -> [7, 2]."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def _turn(position: int, shares: list[int]) -> tuple[int, int]:
    """(whose turn it is at `position`, how many turns it had before). The first takes position p where
    floor(p * share) rises, and the others share what it leaves in the same way."""
    rest = sum(shares)
    for turn, share in enumerate(shares[:-1]):
        before = position * share // rest
        if (position + 1) * share // rest > before:
            return turn, before
        position, rest = position - before, rest - share
    return len(shares) - 1, position


def reports_of_others(patients: Sequence[Sequence[int]], *, seed: int) -> np.ndarray:
    """For every record the index of another patient's record, each used once: `data.shuffle_reports`.

    Args:
        patients: of each folder, the number of records of each patient, in record order.

    Partners are of the same folder, so that each keeps the reports that its weight says. `UserError` where one patient
    has more than half of a folder's records.
    """
    partner, start = [], 0
    for folder, counts in enumerate(map(np.asarray, patients)):
        total, shift = int(counts.sum()), int(counts.max())
        if 2 * shift > total:
            raise UserError(
                f"data.shuffle_reports: a patient of folder {folder + 1} of data.train has {shift} of its {total} records: "
                "not every record can get the report of another patient; use more patients"
            )
        firsts = np.cumsum(counts) - counts
        shuffled = permutation(len(counts), seed % 2**64, folder)
        line = np.concatenate([np.arange(firsts[p], firsts[p] + counts[p]) for p in shuffled])
        of_folder = np.empty(total, np.int64)
        of_folder[line] = np.roll(line, -shift)  # patients lie together in the line: none spans the shift
        partner.append(start + of_folder)
        start += total
    return np.concatenate(partner)
