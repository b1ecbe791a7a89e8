"""What a sweep file may say, and whether what it says can be."""

from __future__ import annotations

from ml_collections import ConfigDict

from mg3d_jax.errors import UserError

KEYS = {
    "name": "of the sweep",
    "base": "training config FILE[:ARG]; a relative path starts at the sweep file",
    "models": "((name, {training config key: value, ...}), ...): the model sizes",
    "patients": "(K, ...): numbers of unique patients, nested",
    "seeds": "(seed, ...)",
    "overrides": "((training config key, value), ...) for every run",
    "length": "(kind, value): kind is epochs, steps, samples or flops; how long each run trains. Several values are an axis",
    "loss": "metric of summary.json that the law describes, e.g. valid/alignment",
    "model_size": "what N is: n_active, n_total, n_vision or n_text",
    "data_size": "what D is: unique_patients, unique_records or samples_seen",
}
OPTIONAL_KEYS = {
    "subset_seeds": "(data.subset_seed, ...), one for each of the seeds: which patients are drawn; without it all seeds share "
    "the first ones",
    "rule": "((training config key, value at the reference, reference size, exponent), ...): the value of that key for a model "
    "of another model_size N is value * (N / reference) ** exponent",
    "check": "(training config key, (factor, ...)): further runs of the smallest and the largest model, with the most patients "
    "and the first seed, with that key times each factor; no law where the largest is best at an end of them",
    "trunks": "True: with several lengths in steps or samples, and a constant rate with a cooldown, the runs of a cell share "
    "the constant part: the longest is trained first, and the others go on from it with their cooldown",
    "shares": "((name of a model, share), ...): of the length, where a run does not train for all of it",
    "starts_from": "((name of a model, name of the one whose runs its runs start from), ...)",
    "starts_in": "folder of an earlier sweep, which the latter names are of; without it they are earlier models of this one",
}
LENGTHS = ("epochs", "steps", "samples")
FLOPS = "flops"
TRUNK_LENGTHS = ("steps", "samples")  # that are known before the data are prepared
MODEL_SIZES = ("n_active", "n_total", "n_vision", "n_text")
DATA_SIZES = ("unique_patients", "unique_records", "samples_seen")


def lengths(declared: ConfigDict) -> tuple[float, ...]:
    """The values of `length`, one for each run of a cell."""
    value = declared.length[1]
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def check(path: str, declared: ConfigDict) -> None:
    """`UserError` for an unknown or missing key, or a value out of range."""
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
    if len(declared.length) != 2 or declared.length[0] not in kinds or min(lengths(declared), default=0) <= 0:
        raise UserError(f"{path}: length = {declared.length}; write (kind, value), kind one of {', '.join(kinds)}")
    if declared.get("trunks") and (declared.length[0] not in TRUNK_LENGTHS or declared.get("starts_from")):
        raise UserError(f"{path}: trunks need a length in {' or '.join(TRUNK_LENGTHS)}, and no 'starts_from'")
    names = {name for name, _ in declared.models}
    for key in ("shares", "starts_from"):
        if strangers := sorted({name for name, _ in declared.get(key, ())} - names):
            raise UserError(f"{path}: {key!r} names {', '.join(strangers)}, which 'models' does not declare")
    if wrong := [share for _, share in declared.get("shares", ()) if not 0 < share <= 1]:
        raise UserError(f"{path}: shares = {wrong[0]}; a share of the length is above 0 and up to 1")
    _check_rule_and_check(path, declared)
    if (subsets := declared.get("subset_seeds")) and len(subsets) != len(declared.seeds):
        raise UserError(f"{path}: subset_seeds = {subsets}: give one for each of the seeds {declared.seeds}")
    if any(patients < 1 for patients in declared.patients):
        raise UserError(f"{path}: patients = {declared.patients}; each must be at least 1")


def _check_rule_and_check(path: str, declared: ConfigDict) -> None:
    for one in declared.get("rule", ()):
        if len(one) != 4 or not isinstance(one[0], str) or min(one[1], one[2]) <= 0:
            raise UserError(f"{path}: rule = {one}; write (key, value, reference size, exponent), e.g. "
                            '("optimizer.learning_rate", 1e-3, 5e6, -0.3)')  # fmt: skip
    if not (check := declared.get("check")):
        return
    factors = check[1] if len(check) == 2 and isinstance(check[1], tuple | list) else ()
    if len(set(factors)) < 3 or 1 not in factors or min(factors) >= 1 or max(factors) <= 1:
        raise UserError(f"{path}: check = {check}; write (key, factors) with 1 among them, some below and some above it, e.g. "
                        '("optimizer.learning_rate", (0.5, 1, 2))')  # fmt: skip
