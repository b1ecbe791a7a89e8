"""A hook of a user is one object in a list: when it is called, what it sees, and where what it measures goes."""

import json

import jax
import numpy as np
import pytest
from support import ROOT, tiny_builder, tiny_config, with_plain_towers

from mg3d_jax import config as config_lib
from mg3d_jax.trainer import Trainer
from mg3d_jax.training import loop
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.hooks import AfterStep, Hook
from mg3d_jax.training.writers import Writers, read_metrics

TRAIN, VALID = (str(ROOT / "tests" / "fixtures" / "v0.1.0" / split) for split in ("train", "valid"))


class WeightNorm(Hook):
    every = 2

    def __init__(self):
        self.calls = []

    def start(self, run):
        self.calls.append(("start", run.first, run.setup.steps))

    def __call__(self, after):
        self.calls.append(after.step)
        total = sum(float(np.sum(np.square(jax.device_get(x)))) for x in jax.tree.leaves(after.params))
        return {"valid/weight_norm": total**0.5}

    def close(self):
        self.calls.append("close")


def test_a_hook_measures_after_its_steps_and_chooses_the_best_checkpoint(tmp_path):
    settings = {"training__steps": 5, "training__keep_checkpoints": 1, "training__checkpoint_every": 10}
    settings |= {"training__validate_every": 4}
    builder = tiny_builder(TRAIN, VALID, training__best_metric="valid/weight_norm", **settings)
    config = config_lib.typed(with_plain_towers(builder))
    hook = WeightNorm()
    assert Trainer(config, tmp_path, hooks=[hook]).run() == 0
    assert hook.calls == [("start", 0, 5), 2, 4, 5, "close"]
    lines = [line for line in read_metrics(tmp_path, "valid") if "weight_norm" in line]
    assert [line["step"] for line in lines] == [2, 4, 5]
    final = json.loads((tmp_path / "summary.json").read_text())["final"]
    assert final["valid/weight_norm"] == lines[-1]["weight_norm"] and "valid/loss" in final
    best = min(lines, key=lambda line: line["weight_norm"])["step"]
    assert Checkpoints(tmp_path).steps() == sorted({best, 5})  # saved when measured, though no interval says so
    # A kill before the summary: the hook measures the last step again, and nothing is trained.
    (tmp_path / "summary.json").unlink()
    again = WeightNorm()
    assert Trainer(config, tmp_path, hooks=[again]).run() == 0
    assert again.calls == [("start", 5, 5), 5, "close"]
    assert json.loads((tmp_path / "summary.json").read_text())["final"] == pytest.approx(final)


def test_a_metric_needs_a_split():
    after = AfterStep(1, 2, {}, {}, Writers(()))
    with pytest.raises(ValueError, match="'norm': name it SPLIT/NAME"):
        after.record({"norm": 1.0})
    after.record(None)
    after.record({"a/b": 1.0, "a/c/d": 2.0})
    assert after.measured == {"a/b": 1.0, "a/c/d": 2.0}


def test_weights_that_nobody_reads_are_no_silent_fresh_start(tmp_path):
    config = tiny_config(TRAIN, init_from__path="somewhere")
    with pytest.raises(ValueError, match=r"init_from\.path is set: give `initialize`"):
        loop.Trainer(config, tmp_path)
