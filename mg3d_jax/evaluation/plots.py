"""Pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def plot_evaluation(result: dict, path: Path) -> None:
    """AUROC per abnormality with its interval beside recall at k in both directions; chance is drawn in both panels."""
    zero_shot, retrieval = result["zero_shot"], result["retrieval"]
    names = [key.removeprefix("auroc/") for key in zero_shot if key.startswith("auroc/") and not key.endswith("_95")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), width_ratios=(3, 2), layout="constrained")
    _bars(left, zero_shot, sorted(names, key=lambda n: zero_shot[f"auroc/{n}"]))
    for direction, color in (("report_to_volume", "tab:blue"), ("volume_to_report", "tab:orange")):
        ks = sorted(int(key.split("@")[1]) for key in retrieval if key.startswith(f"{direction}/recall@"))
        label = direction.replace("_", " ") + f" (gallery {retrieval[f'{direction}/gallery']})"
        right.plot(ks, [retrieval[f"{direction}/recall@{k}"] for k in ks], "o-", color=color, label=label)
        right.plot(ks, [retrieval[f"{direction}/chance@{k}"] for k in ks], ":", color=color)
    right.set(xscale="log", xlabel="k", ylabel="recall at k (dotted: chance)", ylim=(0, 1), title="retrieval")
    right.set_xticks(ks, map(str, ks))
    right.minorticks_off()
    right.legend()
    right.grid(alpha=0.3)
    figure.suptitle(
        f"{result['run']}, step {result['step']}, {result['volumes']} volumes of {result['patients']} patients"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: plt.Axes, zero_shot: dict, names: Sequence[str]) -> None:
    values = np.array([zero_shot[f"auroc/{n}"] for n in names])
    intervals = np.array([zero_shot[f"auroc/{n}_95"] for n in names]).reshape(-1, 2)
    errors = np.abs(np.stack([values - intervals[:, 0], intervals[:, 1] - values]))
    axes.barh(range(len(names)), values - 0.5, left=0.5, xerr=errors, color="tab:green", alpha=0.75, ecolor="0.3")
    axes.axvline(0.5, color="0.2", linestyle=":")
    axes.axvline(zero_shot["auroc_macro"], color="tab:red", label=f"macro mean {zero_shot['auroc_macro']:.3f}")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0.3, 1.0), xlabel="zero-shot AUROC (95 % interval; dotted: chance)", title="18 abnormalities")
    axes.legend(loc="lower right")
