"""A run that begins with the whole state of another one is the run that was trained from the start."""

import pytest
from soak import arrays, losses
from support import tiny_builder, with_plain_towers

from mg3d_jax import config as config_lib
from mg3d_jax.errors import UserError
from mg3d_jax.trainer import Trainer
from mg3d_jax.training.checkpoints import Checkpoints


def config_of(train, steps, **changes):
    """Of a constant rate after one step, with a cooldown over the last two."""
    settings = {
        "schedule__kind": "constant",
        "schedule__warmup_steps": 1,
        "schedule__cooldown_steps": 2,
        "optimizer__ema": 0.9,
    }
    settings |= {"training__steps": steps, "training__checkpoint_every": 100, "optimizer__learning_rate": 1e-2}
    return config_lib.typed(with_plain_towers(tiny_builder(train, **settings | changes)))


@pytest.fixture(scope="module")
def trunk(tiny_data, tmp_path_factory):
    """Of 8 steps, of which the first one that is left, 4, is the end of the constant part of a run of 6 steps."""
    folder = tmp_path_factory.mktemp("trunk") / "run"
    assert (
        Trainer(config_of(tiny_data["train"], 8, training__keep_steps=(4,), training__keep_checkpoints=1), folder).run()
        == 0
    )
    assert Checkpoints(folder).steps() == [4, 8]
    return folder


def test_an_earlier_cooldown_is_that_of_a_run_from_the_start(trunk, tiny_data, tmp_path, capsys):
    alone, branch = tmp_path / "alone", tmp_path / "branch"
    assert Trainer(config_of(tiny_data["train"], 6), alone).run() == 0
    begun = Trainer(config_of(tiny_data["train"], 6, init_from__path=f"{trunk}@4", init_from__whole=True), branch)
    assert begun.resume_step == 4 and "whole state" in capsys.readouterr().err
    assert begun.run() == 0
    assert arrays(branch) == arrays(alone)
    found, expected = losses(branch), losses(alone)
    assert found == {step: expected[step] for step in (5, 6)}
    again = Trainer(config_of(tiny_data["train"], 6, init_from__path=f"{trunk}@4", init_from__whole=True), branch)
    assert again.resume_step == 6  # its own checkpoint, once there is one


@pytest.mark.parametrize(
    ("steps", "changes", "says"),
    [
        (6, {"seed": 3}, "seed: 0 -> 3"),
        (6, {"data__batch_size": 4}, r"data\.batch_size: 8 -> 4"),
        (4, {}, "is at step 4, and this run has 4"),
    ],
)
def test_what_is_no_branch_is_said(trunk, tiny_data, tmp_path, steps, changes, says):
    with pytest.raises(UserError, match=says):
        Trainer(
            config_of(tiny_data["train"], steps, init_from__path=f"{trunk}@4", init_from__whole=True, **changes),
            tmp_path / "x",
        )


def test_a_lower_rate_is_allowed_and_said(trunk, tiny_data, tmp_path, capsys):
    changes = {"init_from__path": f"{trunk}@4", "init_from__whole": True, "optimizer__learning_rate": 1e-3}
    Trainer(config_of(tiny_data["train"], 9, **changes), tmp_path / "run")
    assert "the next step has a rate of 0.001" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"give the run in init_from\.path"):
        Trainer(config_of(tiny_data["train"], 9, init_from__whole=True), tmp_path / "other")
