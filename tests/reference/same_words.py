"""The forms "same_words" of three objectives as plain loops in float64."""

import numpy as np
from reference.contrastive import unit


def which_volume(logits, there):
    """Cross-entropy of the first of the volumes that count, over the rows that have another."""
    losses = []
    for row, counts in zip(logits, there, strict=True):
        others = [logit for logit, one in zip(row[1:], counts, strict=True) if one]
        if others:
            all_of_them = np.array([row[0], *others])
            largest = all_of_them.max()
            losses.append(largest + np.log(np.exp(all_of_them - largest).sum()) - row[0])
    return float(np.mean(losses)) if losses else 0.0


def discrimination(found, answers, there, temperature):
    """`found` [B, 1 + K, k], `answers` [B, k], `there` [B, K]."""
    cosines = [[unit(one) @ unit(answer) for one in volumes] for volumes, answer in zip(found, answers, strict=True)]
    return which_volume(np.array(cosines) / temperature, there)


def matching(z, z_others, s, mask, pairs, high=0.9, low=0.6):
    """`z` [B, S, k], `z_others` [B, K, S, k], `s` [B, S, d], `mask` [B, S]; `pairs` [B, K] of row b with row b + 1 + k."""
    patients, sentences = mask.shape
    attract, repel = [], []
    for b in range(patients):
        for k in range(pairs.shape[1]):
            c = (b + 1 + k) % patients
            if not pairs[b, k]:
                continue
            for i in range(sentences):
                if not mask[b, i]:
                    continue
                target = max([unit(s[b, i]) @ unit(s[c, j]) for j in range(sentences) if mask[c, j]], default=-1.0)
                cosine = unit(z[b, i]) @ unit(z_others[b, k, i])
                if target >= high:
                    attract.append(abs(cosine - target))
                elif target <= low:
                    repel.append(abs(cosine))
    return (np.mean(attract) + np.mean(repel)) / 2 if attract and repel else 0.0
