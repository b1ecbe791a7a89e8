"""A sweep as it is declared: a grid of model sizes, unique patients and seeds over one training config.

A sweep file is Python with `get_config(arg)` returning a `ConfigDict` with the keys of `sweep.keys`. Each cell of the grid
becomes a `Run` whose id is its name and a hash of its resolved training config: the same cell keeps its id, another
setting gets another. Data sets are nested: `data.max_patients` takes the first K patients of an order, which
`subset_seeds` makes another one for every seed; else what is special about K patients looks like what K does.

A run may start from the weights of another one, of the same seed: of this sweep, so that one method is trained in stages, or of
an earlier sweep, which is then fine-tuned. Length in FLOPs gives every run the steps that it has for them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mg3d_jax import config as config_lib
from mg3d_jax.config import checks
from mg3d_jax.data.records import read_manifest
from mg3d_jax.data.tokens import load_tokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.scaling.sweep import keys
from mg3d_jax.scaling.sweep.keys import FLOPS, LENGTHS, lengths
from mg3d_jax.training import cost as step_cost
from mg3d_jax.training.schedule import part_steps, total_steps

AXES = {"data.max_patients": "patients", "data.subset_seed": "subset_seeds", "seed": "seeds"} | {
    f"training.{kind}": "length" for kind in LENGTHS
}
DECLARATION_FILE = "sweep.json"
RUNS_FOLDER = "runs"
TRAINED_HERE = "train"  # `data.tokenizer` for one that is trained on the reports, of about `data.vocab_size` tokens


@dataclass(frozen=True)
class Run:
    """A run of the grid or of a check. `overrides` are `--config.KEY=VALUE` arguments on top of `base`."""

    id: str
    model: str
    patients: int
    seed: int
    base: str
    overrides: tuple[str, ...]
    config_hash: str
    after: str = ""  # folder of the run that this one starts from
    subset: int = 0  # `data.subset_seed`
    length: float = 0.0  # of the values of `length`, the one of this run
    begins: int = 0  # the step of that run that it goes on from with all of its state; 0: not so
    factor: float = 1.0  # of the key of `check`; a run with another one than 1 is not part of the law
    check: str = ""  # of a run that a check compares: the name of its model; "" for all others

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
    checked_key: str = ""  # the training config key that `check` varies
    rule: tuple[tuple[str, float, float, float], ...] = ()  # key, value at the reference, reference size, exponent


def load(path: str, settings: Sequence[str] = (), workdir: Path = Path()) -> Sweep:
    """Loads a sweep file `FILE[:ARG]`; `settings` are `KEY=VALUE` overrides of every run's training config.

    Args:
        workdir: the sweep's folder, under which runs find the runs of this sweep that they start from. Given in other words,
            the same folder makes other configurations of those that start so.

    Raises `UserError` for a missing file, an unknown or missing key, a value out of range, or two equal cells.
    """
    declared = config_lib.load_file(path)
    keys.check(path, declared)
    base = _base_path(path, declared.base)
    for setting in settings:
        if "=" not in setting:
            raise UserError(f"--set {setting}: write KEY=VALUE, e.g. --set data.train=RUN/train")
    last = dict(setting.split("=", 1) for setting in settings)  # of one key given twice, the later counts
    starts = _Starts(path, declared, workdir)
    runs: list[Run] = []

    for cell in (*_grid(declared), *_checks(base, declared, last)):
        runs.append(_run(base, declared, cell, last, starts.of(runs, cell)))
    runs = _compared(declared, runs)
    ids = [run.id for run in runs]
    if repeated := sorted({one for one in ids if ids.count(one) > 1}):
        raise UserError(f"{path}: the grid declares {', '.join(repeated)} more than once")
    checked = declared.check[0] if declared.get("check") else ""
    return Sweep(
        declared.name, declared.loss, declared.model_size, declared.data_size, tuple(runs),
        checked_key=checked, rule=tuple(map(tuple, declared.get("rule", ()))),
    )  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A cell of the grid, and the factor of a check. `changes`: what the model of that name changes in the configuration."""

    model: str
    changes: dict[str, Any]
    patients: int
    seed: int
    subset: int
    length: float
    factor: float = 1.0

    def like(self, run: Run) -> bool:
        """Differs a run of the grid from this cell at most in its length?"""
        return (run.model, run.patients, run.seed, run.factor) == (self.model, self.patients, self.seed, 1.0)


def _grid(declared: ConfigDict) -> Iterator[Cell]:
    subsets = declared.get("subset_seeds") or (0,) * len(declared.seeds)
    # Seeds outermost: a sweep that is cut short has the whole grid for its first seeds.
    for seed, subset in zip(declared.seeds, subsets, strict=True):
        for patients in declared.patients:
            for length in sorted(lengths(declared), reverse=True) if declared.get("trunks") else lengths(declared):
                for model, changes in declared.models:
                    yield Cell(model, dict(changes), int(patients), int(seed), int(subset), length)


def _checks(base: str, declared: ConfigDict, settings: dict[str, str]) -> list[Cell]:
    """Cells of the smallest and the largest model with the factors of `check` other than 1, which the grid has."""
    if not declared.get("check"):
        return []
    most = max(map(int, declared.patients)), max(lengths(declared))
    grid = [cell for cell in _grid(declared) if (cell.patients, cell.length) == most and cell.seed == declared.seeds[0]]
    sizes = [_model_size(base, declared, cell, settings) for cell in grid]
    ends = {sizes.index(min(sizes)), sizes.index(max(sizes))}
    return [replace(grid[k], factor=float(factor)) for k in sorted(ends) for factor in declared.check[1] if factor != 1]


def _compared(declared: ConfigDict, runs: Sequence[Run]) -> list[Run]:
    """The runs, those of a check with the name of its model: those with a factor, and the run of the grid that they vary."""
    varied = {(run.model, run.patients, run.seed) for run in runs if run.factor != 1}
    longest = max(lengths(declared))
    return [
        replace(run, check=run.model)
        if (run.model, run.patients, run.seed) in varied and run.length == longest
        else run
        for run in runs
    ]


def _model_size(base: str, declared: ConfigDict, cell: Cell, settings: dict[str, str]) -> int:
    """N of a cell, as `model_size` counts it."""
    steps = {f"training.{name}": int(name == "steps") for name in LENGTHS}
    config = config_lib.load(base, _arguments(dict(declared.overrides) | cell.changes | steps | settings))
    return int(getattr(step_cost.of_config(config, _vocabulary(config)).sizes, declared.model_size))


def _base_path(sweep_file: str, base: str) -> str:
    file, colon, argument = base.partition(":")
    folder = Path(sweep_file.partition(":")[0]).parent
    return os.path.normpath(folder / file) + colon + argument


class _Starts:
    """Which run another one starts from."""

    def __init__(self, path: str, declared: ConfigDict, workdir: Path):
        self._path, self._names = path, dict(declared.get("starts_from", ()))
        self._other = Path(declared.starts_in) if declared.get("starts_in") else None
        self._trunks, self._longest = declared.get("trunks", False), max(lengths(declared))
        self._folder = (workdir if self._other is None else self._other) / RUNS_FOLDER

    def of(self, before: Sequence[Run], cell: Cell) -> tuple[str, str] | None:
        """Id and folder of that run; None where it starts from nothing. `UserError` where there is not just one."""
        if self._trunks:
            if cell.length == self._longest or cell.factor != 1:
                return None
            trunk = next(run for run in before if run.length == self._longest and cell.like(run))
            return trunk.id, str(self._folder / trunk.id)
        if (wanted := self._names.get(cell.model)) is None:
            return None
        if self._other is None:
            among = [run for run in before if (run.patients, run.length) == (cell.patients, cell.length)]
        else:
            among = list(read_declaration(self._other).runs)
        found = [run.id for run in among if (run.model, run.seed, run.factor) == (wanted, cell.seed, 1.0)]
        if len(found) != 1:
            where = "earlier in this sweep" if self._other is None else f"in {self._other}"
            raise UserError(
                f"{self._path}: {cell.model} with seed {cell.seed} starts from the run of {wanted!r}, but {where} there are "
                f"{len(found)}"
            )
        return found[0], str(self._folder / found[0])


def _run(base: str, declared: ConfigDict, cell: Cell, settings: dict[str, str], first: tuple[str, str] | None) -> Run:
    """`first`: id and folder of the run that this one starts from."""
    common = dict(declared.overrides)
    if clash := sorted(AXES.keys() & {*common, *cell.changes, *settings}):
        raise UserError(f"{clash[0]} is an axis of the sweep: change {AXES[clash[0]]!r} in the sweep file")
    kind, value = declared.length[0], cell.length
    if (share := dict(declared.get("shares", ())).get(cell.model, 1)) != 1:
        value = value * share if kind in (FLOPS, "epochs") else max(1, round(value * share))
    values = common | cell.changes | {"data.max_patients": cell.patients, "seed": cell.seed} | settings
    if cell.subset:  # else not named: sweeps from before there were subsets keep their ids
        values["data.subset_seed"] = cell.subset
    values |= _by_rule(base, declared, cell, settings, values)
    if kind == FLOPS:
        one_step = _arguments(values | {f"training.{name}": int(name == "steps") for name in LENGTHS})
        kind, value = "steps", _steps_for(value, config_lib.load(base, one_step))
    values = {f"training.{name}": 0 for name in LENGTHS} | {f"training.{kind}": value} | values
    begins, at = 0, ""
    if declared.get("trunks"):
        trunk_values, begins = _trunk(base, declared, cell, values)
        values |= trunk_values
        at = f"@{begins}"
    # The id names the run that it starts from by its own, wherever the folder is.
    named, placed = ({} if first is None else {"init_from.path": where + at} for where in first or ("", ""))
    overrides = _arguments(values | placed)
    config = config_lib.load(base, overrides)
    _check_run(config, cell.model, cell.patients, cell.seed)
    digest = config_lib.config_hash(config_lib.load(base, _arguments(values | named)))
    name = f"{cell.model}-p{cell.patients}-s{cell.seed}-{digest[:8]}"
    return Run(
        name, cell.model, cell.patients, cell.seed, base, tuple(overrides), config_lib.config_hash(config),
        after="" if first is None else first[1], begins=begins, subset=cell.subset, length=cell.length, factor=cell.factor,
    )  # fmt: skip


def _trunk(base: str, declared: ConfigDict, cell: Cell, values: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What the config of a trunk or branch has beside, and where the branch begins (0 for a trunk). `UserError` where the runs
    of a cell would not have the same rate up to there."""

    if cell.factor != 1:
        return {}, 0
    kind, longest = declared.length[0], max(lengths(declared))
    config = config_lib.load(base, _arguments(values))
    if cell.length != longest:
        return {"init_from.whole": True}, _cools(config, kind, cell.length)
    kept = {_cools(config, kind, one) for one in lengths(declared) if one != longest}
    return {"training.keep_steps": tuple(sorted(kept))}, 0


def _cools(config: config_lib.Config, kind: str, length: float) -> int:
    """The step after which the cooldown of a run begins that is `length` long in `kind` (steps or samples), but else as
    `config` says."""
    schedule, size = config.schedule, config.data.batch_size
    given: dict[str, Any] = {kind: length}
    steps = total_steps(replace(config.training, **given), size, records=0)
    (warmup, unit), (cooldown, _) = (
        part_steps(schedule, part, steps, batch_size=size) for part in ("warmup", "cooldown")
    )
    if schedule.kind != "constant" or (unit == "schedule.warmup_percent" and warmup) or cooldown < 1:
        raise UserError(
            'trunks need schedule.kind = "constant" with a cooldown, and a warm-up in steps or samples: one in percent is '
            f"another one for each length (here {schedule.kind!r}, {unit} of {warmup} steps, {cooldown} steps of cooldown)"
        )
    if steps - cooldown <= warmup:
        raise UserError(f"length = {length}: a run of {steps} steps is over before its warm-up of {warmup} steps is")
    return steps - cooldown


def _by_rule(
    base: str, declared: ConfigDict, cell: Cell, settings: dict[str, str], values: dict[str, Any]
) -> dict[str, Any]:
    """What `rule` and the factor of `check` make of their keys."""
    found: dict[str, Any] = {}
    rules = declared.get("rule", ())
    size = _model_size(base, declared, cell, settings) if rules else 0
    for key, reference, at, exponent in rules:
        if key in values:
            raise UserError(f"{key} follows the rule of the sweep: leave it out of models, overrides and --set")
        found[key] = by_rule(reference, at, exponent, size)
    if cell.factor != 1:
        key = declared.check[0]
        before = (values | found).get(key)
        if before is None:
            steps = {f"training.{name}": int(name == "steps") for name in LENGTHS}
            before = config_lib.flatten(config_lib.load(base, _arguments(values | steps)))[key]
        scaled = float(before) * cell.factor
        found[key] = max(1, round(scaled)) if isinstance(before, int) else float(f"{scaled:.4g}")
    return found


def by_rule(reference: float, at: float, exponent: float, size: float) -> float:
    """What a rule says for a model of that size: whole numbers stay whole."""
    scaled = reference * (size / at) ** exponent
    return max(1, round(scaled)) if isinstance(reference, int) else float(f"{scaled:.4g}")


def _steps_for(wanted: float, config: config_lib.Config) -> int:
    """Whole steps of the configuration for that many FLOPs, at least 1."""
    per_step = step_cost.of_config(config, _vocabulary(config)).training.total * config.data.batch_size
    return max(1, round(wanted / per_step))


def _vocabulary(config: config_lib.Config) -> int | None:
    """Size of the tokenizer; None for one that a run trains, of about the size that it is told."""
    tokenizer = config.data.tokenizer
    return None if tokenizer == TRAINED_HERE else load_tokenizer(tokenizer).get_vocab_size()


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
    rule = tuple(map(tuple, document.pop("rule", ())))
    return Sweep(**document, runs=runs, rule=rule)
