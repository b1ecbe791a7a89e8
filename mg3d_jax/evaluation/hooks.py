"""What a run in training shows of itself on the held-out data: the registered evaluations, and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mg3d_jax.config import Config
from mg3d_jax.evaluation.online import OnlineEvaluation
from mg3d_jax.evaluation.reconstructions import Reconstructions
from mg3d_jax.training.held_out import HeldOut
from mg3d_jax.training.hooks import AfterStep, Hook, TrainingRun


def chosen_hooks(config: Config) -> list[Hook]:
    """Those that a configuration asks for."""
    found: list[Hook] = []
    if not config.data.valid:
        return found
    if config.objectives["volume_reconstruction"].weight > 0:  # without it there is nothing to draw
        found.append(DrawReconstructions(config.training.validate_every))
    cadence = {name: options.every or config.training.evaluate_every for name, options in config.evaluations.items()}
    if cadence := {name: every for name, every in cadence.items() if every > 0}:
        found.append(Evaluate(cadence))
    return found


class Evaluate(Hook):
    """The metrics of the registered evaluations, each at its own interval, as "evaluation/auroc_macro", ...

    Args:
        cadence: steps between measurements, by name of the evaluation. What is due at the same step shares one embedding
            of the data.
    """

    def __init__(self, cadence: Mapping[str, int]):
        self._cadence = dict(cadence)
        self.every = math.gcd(*cadence.values())

    def due(self, after: AfterStep) -> bool:
        return after.step == after.last or bool(self._due(after))

    def start(self, run: TrainingRun) -> None:
        self._evaluation = OnlineEvaluation(run.setup, run.tokenizer, run.held_out, log_folder=run.workdir)

    def __call__(self, after: AfterStep) -> dict[str, float]:
        names = list(self._cadence) if after.step == after.last else self._due(after)
        return {f"evaluation/{name}": value for name, value in self._evaluation.metrics(after.params, names).items()}

    def _due(self, after: AfterStep) -> list[str]:
        return [name for name, every in self._cadence.items() if after.step % every == 0]


class DrawReconstructions(Hook):
    """Pictures of what masked volume modelling fills in, of the same patients every time."""

    def __init__(self, every: int):
        self.every = every

    def start(self, run: TrainingRun) -> None:
        self._pictures = Reconstructions(run.setup, run.tokenizer.special, spacing=run.held_out.spacing)
        self._held_out = HeldOut(run.setup, run.tokenizer, run.held_out, run.more_text, log_folder=run.workdir)

    def __call__(self, after: AfterStep) -> None:
        for name, pixels in self._pictures(after.params, self._held_out.first_batch()).items():
            after.writers.image(after.step, "valid", name, pixels)
