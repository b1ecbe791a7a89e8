"""The reconstruction losses as plain loops in float64."""

import numpy as np
from reference.contrastive import unit


def masked_patch_mse(prediction, target, mask):
    errors = [np.mean((prediction[b, n] - target[b, n]) ** 2) for b, n in np.argwhere(mask)]
    return float(np.mean(errors)) if errors else 0.0


def masked_token_cross_entropy(logits, labels, mask):
    losses = []
    for b, t in np.argwhere(mask):
        row = logits[b, t] - logits[b, t].max()
        losses.append(np.log(np.exp(row).sum()) - row[labels[b, t]])
    return float(np.mean(losses)) if losses else 0.0


def sentence_alignment(reconstructed, original, mask):
    distances = [1 - unit(reconstructed[b, s]) @ unit(original[b, s]) for b, s in np.argwhere(mask)]
    return float(np.mean(distances)) if distances else 0.0
