"""InfoNCE and the sigmoid loss as plain loops in float64, from the formulas of the papers."""

import numpy as np


def unit(v):
    length = np.sqrt(np.sum(v**2))
    return v / length if length > 1e-6 else np.zeros_like(v)


def info_nce(x, y, temperature, group_ids=None, valid=None):
    """Symmetric InfoNCE; same-group rows are masked out of each other's negatives."""
    count = len(x)
    group_ids = range(count) if group_ids is None else group_ids
    valid = [True] * count if valid is None else valid
    losses = []
    for queries, keys in ((x, y), (y, x)):
        for i in range(count):
            if not valid[i]:
                continue
            logits, own = [], None
            for j in range(count):
                if not valid[j] or (j != i and group_ids[j] == group_ids[i]):
                    continue
                logit = unit(queries[i]) @ unit(keys[j]) / temperature
                logits.append(logit)
                if j == i:
                    own = logit
            largest = max(logits)
            losses.append(largest + np.log(sum(np.exp(v - largest) for v in logits)) - own)
    return float(np.mean(losses)) if losses else 0.0


def sigmoid(x, y, scale, bias, group_ids=None, valid=None):
    """Sum over pairs of -log sigmoid(+-(scale cos + bias)), divided by the number of valid rows."""
    count = len(x)
    group_ids = range(count) if group_ids is None else group_ids
    valid = [True] * count if valid is None else valid
    total = 0.0
    for i in range(count):
        for j in range(count):
            if not valid[i] or not valid[j] or (i != j and group_ids[i] == group_ids[j]):
                continue
            logit = scale * (unit(x[i]) @ unit(y[j])) + bias
            total += np.log1p(np.exp(-logit if i == j else logit))
    return total / max(sum(map(bool, valid)), 1)
