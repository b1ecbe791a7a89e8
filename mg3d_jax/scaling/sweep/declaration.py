"""A sweep as it is declared: a grid of model sizes, unique patients and seeds over one training config.

A sweep file is Python with `get_config(arg)` returning a `ConfigDict` with the keys of `KEYS`. Each cell of the grid
becomes a `Run` whose id is its name and a hash of its resolved training config: the same cell keeps its id, another
setting gets another. Data sets are nested: `data.max_patients` takes the first K patients of an order, which
`subset_seeds` makes another one for every seed; else what is special about K patients looks like what K does.

A run may start from the weights of another one, of the same seed: of this sweep, so that one method is trained in stages, or of
an earlier sweep, which is then fine-tuned. Length in FLOPs gives every run the steps that it has for them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mg3d_jax import config as config_lib
from mg3d_jax.config import checks
from mg3d_jax.data.records import read_manifest
from mg3d_jax.data.tokens import load_tokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.training import cost as step_cost

KEYS = {
    "name": "of the sweep",
    "base": "training config FILE[:ARG]; a relative path starts at the sweep file",
    "models": "((name, {training config key: value, ...}), ...): the model sizes",
    "patients": "(K, ...): numbers of unique patients, nested",
    "seeds": "(seed, ...)",
    "overrides": "((training config key, value), ...) for every run",
    "length": "(kind, value): kind is epochs, steps, samples or flops; how long each run trains",
    "loss": "metric of summary.json that the law describes, e.g. valid/alignment",
    "model_size": "what N is: n_active, n_total, n_vision or n_text",
    "data_size": "what D is: unique_patients, unique_records or samples_seen",
}
OPTIONAL_KEYS = {
    "subset_seeds": "(data.subset_seed, ...), one for each of the seeds: which patients are drawn; without it all seeds share "
    "the first ones",
    "shares": "((name of a model, share), ...): of the length, where a run does not train for all of it",
    "starts_from": "((name of a model, name of the one whose runs its runs start from), ...)",
    "starts_in": "folder of an earlier sweep, which the latter names are of; without it they are earlier models of this one",
}
LENGTHS = ("epochs", "steps", "samples")
FLOPS = "flops"
MODEL_SIZES = ("n_active", "n_total", "n_vision", "n_text")
DATA_SIZES = ("unique_patients", "unique_records", "samples_seen")
AXES = {"data.max_patients": "patients", "data.subset_seed": "subset_seeds", "seed": "seeds"} | {
    f"training.{kind}": "length" for kind in LENGTHS
}
DECLARATION_FILE = "sweep.json"
RUNS_FOLDER = "runs"
TRAINED_HERE = "train"  # `data.tokenizer` for one that is trained on the reports, of about `data.vocab_size` tokens


@dataclass(frozen=True)
class Run:
    """One cell of the grid. `overrides` are `--config.KEY=VALUE` arguments on top of `base`."""

    id: str
    model: str
    patients: int
    seed: int
    base: str
    overrides: tuple[str, ...]
    config_hash: str
    after: str = ""  # folder of the run that this one starts from
    subset: int = 0  # `data.subset_seed`

    def config(self) -> config_lib.Config:
        return config_lib.load(self.base, list(self.overrides))


@dataclass(frozen=True)
class Sweep:
    """All declared runs, in the order in which they are trained, and what the law is fitted to."""

    name: str
    loss: str
    model_size: str
    data_size: str
    runs: tuple[Run, ...]
    data: str = ""  # `data_fingerprint` when it was last run


def load(path: str, settings: Sequence[str] = (), workdir: Path = Path()) -> Sweep:
    """Loads a sweep file `FILE[:ARG]`; `settings` are `KEY=VALUE` overrides of every run's training config.

    Args:
        workdir: the sweep's folder, under which runs find the runs of this sweep that they start from. Given in other words,
            the same folder makes other configurations of those that start so.

    Raises `UserError` for a missing file, an unknown or missing key, a value out of range, or two equal cells.
    """
    declared = config_lib.load_file(path)
    _check(path, declared)
    base = _base_path(path, declared.base)
    for setting in settings:
        if "=" not in setting:
            raise UserError(f"--set {setting}: write KEY=VALUE, e.g. --set data.train=RUN/train")
    last = dict(setting.split("=", 1) for setting in settings)  # of one key given twice, the later counts
    starts = _Starts(path, declared, workdir)
    runs: list[Run] = []
    subsets = declared.get("subset_seeds") or (0,) * len(declared.seeds)
    # Seeds outermost: a sweep that is cut short has the whole grid for its first seeds.
    for seed, subset in zip(declared.seeds, subsets, strict=True):
        for patients in declared.patients:
            for model, changes in declared.models:
                first = starts.of(runs, model, int(patients), int(seed))
                runs.append(
                    _run(base, declared, model, dict(changes), int(patients), int(seed), int(subset), last, first)
                )
    ids = [run.id for run in runs]
    if repeated := sorted({one for one in ids if ids.count(one) > 1}):
        raise UserError(f"{path}: the grid declares {', '.join(repeated)} more than once")
    return Sweep(declared.name, declared.loss, declared.model_size, declared.data_size, tuple(runs))


def _check(path: str, declared: ConfigDict) -> None:
    given = set(declared.keys())
    if unknown := sorted(given - KEYS.keys() - OPTIONAL_KEYS.keys()):
        raise UserError(f"{path}: unknown keys {', '.join(unknown)}. Keys: {', '.join((*KEYS, *OPTIONAL_KEYS))}")
    if absent := [name for name in KEYS if name not in given]:
        raise UserError(f"{path}: no " + "; no ".join(f"{name!r} ({KEYS[name]})" for name in absent))
    for name in ("models", "patients", "seeds"):
        if not declared[name]:
            raise UserError(f"{path}: {name!r} is empty ({KEYS[name]})")
    for name, choices in (("model_size", MODEL_SIZES), ("data_size", DATA_SIZES)):
        if declared[name] not in choices:
            raise UserError(f"{path}: {name} = {declared[name]!r}; choose one of {', '.join(choices)}")
    kinds = (*LENGTHS, FLOPS)
    if len(declared.length) != 2 or declared.length[0] not in kinds or declared.length[1] <= 0:
        raise UserError(f"{path}: length = {declared.length}; write (kind, value), kind one of {', '.join(kinds)}")
    names = {name for name, _ in declared.models}
    for key in ("shares", "starts_from"):
        if strangers := sorted({name for name, _ in declared.get(key, ())} - names):
            raise UserError(f"{path}: {key!r} names {', '.join(strangers)}, which 'models' does not declare")
    if wrong := [share for _, share in declared.get("shares", ()) if not 0 < share <= 1]:
        raise UserError(f"{path}: shares = {wrong[0]}; a share of the length is above 0 and up to 1")
    if (subsets := declared.get("subset_seeds")) and len(subsets) != len(declared.seeds):
        raise UserError(f"{path}: subset_seeds = {subsets}: give one for each of the seeds {declared.seeds}")
    if any(patients < 1 for patients in declared.patients):
        raise UserError(f"{path}: patients = {declared.patients}; each must be at least 1")


def _base_path(sweep_file: str, base: str) -> str:
    file, colon, argument = base.partition(":")
    folder = Path(sweep_file.partition(":")[0]).parent
    return os.path.normpath(folder / file) + colon + argument


class _Starts:
    """Which run another one starts from."""

    def __init__(self, path: str, declared: ConfigDict, workdir: Path):
        self._path, self._names = path, dict(declared.get("starts_from", ()))
        self._other = Path(declared.starts_in) if declared.get("starts_in") else None
        self._folder = (workdir if self._other is None else self._other) / RUNS_FOLDER

    def of(self, before: Sequence[Run], model: str, patients: int, seed: int) -> tuple[str, str] | None:
        """Id and folder of that run; None where it starts from nothing. `UserError` where there is not just one."""
        if (wanted := self._names.get(model)) is None:
            return None
        if self._other is None:
            among = [run for run in before if run.patients == patients]
        else:
            among = list(read_declaration(self._other).runs)
        found = [run.id for run in among if (run.model, run.seed) == (wanted, seed)]
        if len(found) != 1:
            where = "earlier in this sweep" if self._other is None else f"in {self._other}"
            raise UserError(
                f"{self._path}: {model} with seed {seed} starts from the run of {wanted!r}, but {where} there are {len(found)}"
            )
        return found[0], str(self._folder / found[0])


def _run(
    base: str,
    declared: ConfigDict,
    model: str,
    changes: dict,
    patients: int,
    seed: int,
    subset: int,
    settings: dict[str, str],
    first: tuple[str, str] | None,
) -> Run:
    """`first`: id and folder of the run that this one starts from."""
    common = dict(declared.overrides)
    if clash := sorted(AXES.keys() & {*common, *changes, *settings}):
        raise UserError(f"{clash[0]} is an axis of the sweep: change {AXES[clash[0]]!r} in the sweep file")
    kind, value = declared.length
    if (share := dict(declared.get("shares", ())).get(model, 1)) != 1:
        value = value * share if kind in (FLOPS, "epochs") else max(1, round(value * share))
    values = common | changes | {"data.max_patients": patients, "seed": seed} | settings
    if subset:  # else not named: sweeps from before there were subsets keep their ids
        values["data.subset_seed"] = subset
    if kind == FLOPS:
        one_step = _arguments(values | {f"training.{name}": int(name == "steps") for name in LENGTHS})
        kind, value = "steps", _steps_for(value, config_lib.load(base, one_step))
    values = {f"training.{name}": 0 for name in LENGTHS} | {f"training.{kind}": value} | values
    # The id names the run that it starts from by its own, wherever the folder is.
    named, placed = ({} if first is None else {"init_from.path": where} for where in first or ("", ""))
    overrides = _arguments(values | placed)
    config = config_lib.load(base, overrides)
    _check_run(config, model, patients, seed)
    digest = config_lib.config_hash(config_lib.load(base, _arguments(values | named)))
    name = f"{model}-p{patients}-s{seed}-{digest[:8]}"
    after = "" if first is None else first[1]
    return Run(name, model, patients, seed, base, tuple(overrides), config_lib.config_hash(config), after, subset)


def _steps_for(wanted: float, config: config_lib.Config) -> int:
    """Whole steps of the configuration for that many FLOPs, at least 1."""
    tokenizer, vocabulary = config.data.tokenizer, None
    if tokenizer != TRAINED_HERE:
        vocabulary = load_tokenizer(tokenizer).get_vocab_size()
    per_step = step_cost.of_config(config, vocabulary).training.total * config.data.batch_size
    return max(1, round(wanted / per_step))


def _arguments(values: dict[str, Any]) -> list[str]:
    return [f"--config.{key}={_text(value)}" for key, value in values.items()]


def _check_run(config: config_lib.Config, model: str, patients: int, seed: int) -> None:
    name = f"{model}, {patients} patients, seed {seed}"
    for key in ("train", "valid"):
        if not getattr(config.data, key):
            raise UserError(
                f"sweep, run {name}: data.{key} is empty; a sweep needs prepared training data, and held-out data that "
                f"no run trains on. Add --set data.{key}=FOLDER (made by mg3d prepare)"
            )
    try:
        checks.validate(config)
    except UserError as error:
        raise UserError(f"sweep, run {name}: {error}") from error


def _text(value: Any) -> str:
    """A value as `--config.KEY=VALUE` takes it."""
    return value if isinstance(value, str) else repr(value)


def data_fingerprint(sweep: Sweep) -> str:
    """Digest of the prepared folders by what they hold: they may be moved, but not exchanged."""
    configs = [run.config() for run in sweep.runs]
    named = {(key, folder) for config in configs for key in ("train", "valid") for folder in getattr(config.data, key)}
    contents = []
    for key, folder in named:
        manifest = read_manifest(Path(folder))
        contents.append(repr((key, manifest["patients"], [shard.get("sha256") for shard in manifest["shards"]])))
    return hashlib.sha256("\n".join(sorted(contents)).encode()).hexdigest()[:12]


def write_declaration(workdir: Path, sweep: Sweep) -> None:
    """Keeps what was declared, so that `status` and `fit` know every run, also those that never started.

    `UserError` where the sweep was started on other data: runs that are done would count for these.
    """
    path = workdir / DECLARATION_FILE
    before = read_json(path).get("data") if path.is_file() else ""
    if before and sweep.data and before != sweep.data:
        raise UserError(f"{workdir}: this sweep was started on other data.train or data.valid; use another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(sweep))


def read_declaration(workdir: Path) -> Sweep:
    path = workdir / DECLARATION_FILE
    if not path.is_file():
        raise UserError(f"{workdir}: no {DECLARATION_FILE}; start it with mg3d sweep run --config FILE --workdir DIR")
    document = read_json(path)
    runs = tuple(Run(**(run | {"overrides": tuple(run["overrides"])})) for run in document.pop("runs"))
    return Sweep(**document, runs=runs)
