"""What a run in training shows of itself on the held-out data: the registered evaluations, and pictures."""

from __future__ import annotations

from mg3d_jax.config.parts import DataConfig, TrainingConfig
from mg3d_jax.evaluation.online import OnlineEvaluation
from mg3d_jax.evaluation.reconstructions import Reconstructions
from mg3d_jax.training.held_out import HeldOut
from mg3d_jax.training.hooks import AfterStep, Hook, TrainingRun


def chosen_hooks(data: DataConfig, training: TrainingConfig, reconstruction: float) -> list[Hook]:
    """Those that a configuration asks for. `reconstruction`: weight of masked volume modelling; 0 has nothing to draw."""
    found: list[Hook] = []
    if data.valid and reconstruction > 0:
        found.append(DrawReconstructions(training.validate_every))
    if data.valid and training.evaluate_every:
        found.append(Evaluate(training.evaluate_every))
    return found


class Evaluate(Hook):
    """The metrics of every registered evaluation, as "evaluation/auroc_macro", ..."""

    def __init__(self, every: int):
        self.every = every

    def start(self, run: TrainingRun) -> None:
        self._evaluation = OnlineEvaluation(run.setup, run.tokenizer, run.held_out, log_folder=run.workdir)

    def __call__(self, after: AfterStep) -> dict[str, float]:
        return {f"evaluation/{name}": value for name, value in self._evaluation.metrics(after.params).items()}


class DrawReconstructions(Hook):
    """Pictures of what masked volume modelling fills in, of the same patients every time."""

    def __init__(self, every: int):
        self.every = every

    def start(self, run: TrainingRun) -> None:
        self._pictures = Reconstructions(run.setup, run.tokenizer.special, spacing=run.held_out.spacing)
        self._held_out = HeldOut(run.setup, run.tokenizer, run.held_out, log_folder=run.workdir)

    def __call__(self, after: AfterStep) -> None:
        for name, pixels in self._pictures(after.params, self._held_out.first_batch()).items():
            after.writers.image(after.step, "valid", name, pixels)
