"""Sentence-wise semantic matching as plain loops in float64."""

import numpy as np
from reference.contrastive import unit


def sentence_matching(z, s, mask, group_ids=None, high=0.9, low=0.6, average="pairs"):
    patients, sentences = mask.shape
    group_ids = range(patients) if group_ids is None else group_ids
    active, patient_means = [], []
    for b in range(patients):
        for c in range(patients):
            if group_ids[b] == group_ids[c]:
                continue
            errors = []
            for i in range(sentences):
                for j in range(sentences):
                    if not (mask[b, i] and mask[c, j]):
                        continue
                    target = unit(s[b, i]) @ unit(s[c, j])
                    cosine = unit(z[b, i]) @ unit(z[c, j])
                    if target >= high:
                        errors.append(abs(cosine - target))
                        active.append(errors[-1])
                    elif target <= low:
                        errors.append(abs(cosine))
                        active.append(errors[-1])
                    else:
                        errors.append(0.0)
            if errors:
                patient_means.append(np.mean(errors))
    values = active if average == "pairs" else patient_means
    return float(np.mean(values)) if values else 0.0
