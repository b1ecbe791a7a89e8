"""Opens a run that was trained earlier: its config, tokenizer and the parameters of one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.config import Config
from mg3d_jax.data.tokens import load_tokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.run_folder import CONFIG_FILE, TOKENIZER_FOLDER


@dataclass(frozen=True)
class RestoredRun:
    """`params` lie on a data-parallel mesh over the devices that are here; `meta` is what the checkpoint says of itself.

    `ema` says whether they are the moving average of the parameters or the raw ones.
    """

    config: Config
    setup: state_lib.Setup
    params: Any
    meta: dict[str, Any]
    tokenizer: Tokenizer
    ema: bool


def restore_run(workdir: Path, step: int | None = None, *, ema: bool | None = None) -> RestoredRun:
    """The newest checkpoint of a run, or that of `step`.

    `ema`: the averaged parameters (True), the raw ones (False), or the averaged ones where the run keeps them (None).
    `UserError` where there is no checkpoint, or no average and `ema` asks for it.
    """
    for needed in (CONFIG_FILE, f"{TOKENIZER_FOLDER}/tokenizer.json"):
        if not (workdir / needed).exists():
            raise UserError(f"{workdir} is not a training run: it has no {needed}")
    config = config_lib.read(workdir / CONFIG_FILE)
    tokenizer = load_tokenizer(str(workdir / TOKENIZER_FOLDER))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    setup = state_lib.build(config, tokenizer.get_vocab_size(), mesh, steps=0)
    averaged = "ema" in setup.abstract
    if ema and not averaged:
        raise UserError(f"{workdir} keeps no average of its parameters (optimizer.ema = 0): leave ema out")
    ema = averaged if ema is None else ema
    wanted = "ema" if ema else "params"
    checkpoints = Checkpoints(workdir)
    state, meta = checkpoints.restore(setup, step, only=wanted)
    checkpoints.close()
    return RestoredRun(config, setup, state[wanted], meta, tokenizer, ema)
