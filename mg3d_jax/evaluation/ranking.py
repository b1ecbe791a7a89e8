"""Who stands where when candidates are sorted by similarity: exact, for sets of any size, in blocks of bounded memory.

Candidates with the same bytes get the same similarity, which a matrix product alone does not promise: its rounding depends
on the column. So a tie is a tie.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_BYTES = 64 << 20
_BYTES_PER_PAIR = 16  # similarity, a copy of it, masks
AGAINST, FIRST = "against", "first"
TIES = {AGAINST: "ties count against", FIRST: "of ties the first in the order of the data counts"}


def similarity_blocks(
    queries: np.ndarray, candidates: np.ndarray, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields `(rows, queries[rows] @ candidates.T)`, all rows in order.

    Args:
        queries: `[q, k]`. candidates: `[c, k]`.
        block_bytes: what a block and the work on it may take; at least one row is computed at a time. Beside it the
            candidates are held three times while their copies are looked for.
    """
    distinct, place = _distinct(candidates)
    size = max(1, block_bytes // (_BYTES_PER_PAIR * max(1, len(candidates))))
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        similarity = queries[rows] @ distinct.T
        yield rows, similarity if place is None else similarity[:, place]


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The distinct rows, and where each row is among them; `(rows, None)` where all are."""
    if not rows.size:
        return rows, None
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, place = np.unique(whole, return_index=True, return_inverse=True)
    return (rows, None) if len(first) == len(rows) else (rows[first], place.ravel())


def ranks(similarity: np.ndarray, row: np.ndarray, column: np.ndarray, ties: str = AGAINST) -> np.ndarray:
    """Rank (1 = first) of the best correct candidate for each query. What is not a number counts against.

    Args:
        similarity: `[queries, candidates]`.
        row, column: `[pairs]`, the places of the correct candidates by ascending row, at least one in each row.
        ties: "against": a wrong candidate of the same similarity stands before; "first": where it has a lower index.
    """
    starts = np.searchsorted(row, np.arange(len(similarity)))
    of_correct = similarity[row, column]
    best = np.maximum.reduceat(of_correct, starts)
    before = similarity.shape[1] - np.count_nonzero(similarity < best[:, None], axis=1)
    before -= np.add.reduceat((~(of_correct < best[row])).astype(np.int64), starts)
    if ties == FIRST:
        # Of the candidates as near as the best one those behind the first correct one do not stand before it.
        tied_row, tied_column = np.nonzero(similarity == best[:, None])
        last = np.iinfo(np.int64).max
        first = np.minimum.reduceat(np.where(of_correct == best[row], column, last), starts)
        before -= np.bincount(tied_row[tied_column > first[tied_row]], minlength=len(similarity))
        right = (of_correct == best[row]) & (column > first[row])
        before += np.bincount(row[right], minlength=len(similarity))
    return 1 + before


def ranks_by_group(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_groups: np.ndarray,
    candidate_groups: np.ndarray,
    *,
    ties: str = AGAINST,
    block_bytes: int = BLOCK_BYTES,
) -> np.ndarray:
    """`ranks` int64 `[q]` where the candidates of a query's group are the correct ones; each group has a candidate.

    Args:
        queries, candidates: `[q, k]`, `[c, k]`. query_groups, candidate_groups: `[q]`, `[c]`.
    """
    found = np.zeros(len(queries), np.int64)
    order = np.argsort(candidate_groups, kind="stable")
    start, stop = (np.searchsorted(candidate_groups[order], query_groups, side) for side in ("left", "right"))
    for rows, similarity in similarity_blocks(queries, candidates, block_bytes):
        count = stop[rows] - start[rows]
        row = np.repeat(np.arange(len(count)), count)
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        found[rows] = ranks(similarity, row, order[start[rows][row] + place], ties)
    return found


def neighbours(
    vectors: np.ndarray,
    k: int,
    *,
    candidates: np.ndarray,
    excluded: np.ndarray | None,
    groups: np.ndarray | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> np.ndarray:
    """The k nearest of each vector, nearest first: int64 `[n, k]`, -1 where there are no more.

    Args:
        vectors: `[n, k]`, l2-normalised.
        candidates: rows of `vectors` that may be found, ascending.
        excluded: `[n]`; what shares a value with the query is not found, itself least of all. None: all may be found.
        groups: `[n]`; of ties those of the query's group come last. Without it the lower row comes first.
    """
    found = np.full((len(vectors), k), -1, np.int64)
    for rows, similarity in similarity_blocks(vectors, vectors[candidates], block_bytes):
        similarity[np.isnan(similarity)] = -np.inf
        if excluded is not None:
            similarity[excluded[rows, None] == excluded[candidates][None, :]] = -np.inf
        found[rows] = _nearest(similarity, k, rows, candidates, groups)
    return found


def _nearest(
    similarity: np.ndarray, k: int, rows: slice, candidates: np.ndarray, groups: np.ndarray | None
) -> np.ndarray:
    count, most = len(similarity), min(k, similarity.shape[1])
    found = np.full((count, k), -1, np.int64)
    if not most:
        return found
    last = np.partition(similarity, -most, axis=1)[:, -most, None]
    row, column = np.nonzero((similarity >= last) & (similarity > -np.inf))
    late = np.zeros(len(row), bool) if groups is None else groups[rows][row] == groups[candidates[column]]
    order = np.lexsort((column, late, -similarity[row, column], row))
    row, column = row[order], column[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < most
    found[row[kept], place[kept]] = candidates[column[kept]]
    return found


def chance(correct: np.ndarray, gallery: int, k: int) -> np.ndarray:
    """Probability that a random order has one of `correct` among the first k: 1 - C(gallery - correct, k) / C(gallery, k)."""
    steps = np.arange(k)[None, :]
    missing = np.clip(gallery - correct[:, None] - steps, 0, None) / (gallery - steps)
    return 1.0 - np.prod(missing, axis=1)
