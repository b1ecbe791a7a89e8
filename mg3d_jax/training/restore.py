"""Opens a run that was trained earlier: its config, tokenizer and the parameters of one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.config import Config
from mg3d_jax.data.records import read_manifest
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.models.mg3d import MG3D
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.run_folder import CONFIG_FILE, TOKENIZER_FOLDER


@dataclass(frozen=True)
class RestoredRun:
    """What a folder of `mg3d train` holds, at one of its checkpoints.

    `params` lie on a data-parallel mesh over the devices that are here; `meta` is what the checkpoint says of itself;
    `ema` says whether they are the moving average of the parameters or the raw ones.
    """

    folder: Path
    config: Config
    setup: state_lib.Setup
    params: Any
    meta: dict[str, Any]
    tokenizer: Tokenizer
    ema: bool

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def view_tokenizer(self) -> ReportTokenizer:
        """With the token limit that training used for a view of a report."""
        return ReportTokenizer(self.tokenizer, self.config.text_tokens(), self.config.data.max_sentences)

    def prepared(self, key: str) -> Any:
        """What is known of the data that the run was trained on, e.g. its "spacing", "source" or "settings": as the
        checkpoint says, else the manifest of the first training folder if it is still there, else None."""
        if self.meta.get(key) is not None:
            return self.meta[key]
        folders = self.config.data.train
        try:
            return read_manifest(Path(folders[0])).get(key) if folders else None
        except UserError:
            return None


def exact_model(config: Config, vocab_size: int) -> MG3D:
    """The model computing in float32, whatever the run computed in."""
    exact = config_lib.replace(config, {"model.dtype": "float32", "model.attention": "xla", "model.remat": "none"})
    return state_lib.build_model(exact, vocab_size)


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
    return RestoredRun(workdir, config, setup, state[wanted], meta, tokenizer, ema)
