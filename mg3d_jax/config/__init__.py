"""The configuration: files and overrides for the user, frozen dataclasses for the code.

A config file is Python with `get_config(arg)` returning an `ml_collections.ConfigDict`; it starts from `default()` and
changes what it must. On the command line `--config FILE[:arg] --config.optimizer.learning_rate=1e-4` overrides any key.
`load` gives the typed `Config`; `checks.validate` says what is impossible before anything is built. `docs/configuration.md`
lists all keys.
"""

from mg3d_jax.config.files import (
    add_arguments,
    default,
    flatten,
    from_json,
    load,
    load_file,
    parse,
    read,
    replace,
    split_overrides,
    to_dict,
    to_json,
    typed,
)
from mg3d_jax.config.identity import config_hash, relevant, resume_differences
from mg3d_jax.config.objectives import use_frozen_report_encoder, use_objectives
from mg3d_jax.config.parts import Config
from mg3d_jax.config.small_model import use_small_model

__all__ = [
    "Config",
    "add_arguments",
    "config_hash",
    "default",
    "flatten",
    "from_json",
    "load",
    "load_file",
    "parse",
    "read",
    "relevant",
    "replace",
    "resume_differences",
    "split_overrides",
    "to_dict",
    "to_json",
    "typed",
    "use_frozen_report_encoder",
    "use_objectives",
    "use_small_model",
]
