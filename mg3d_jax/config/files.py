"""Config files, overrides on the command line, and the `config.json` of a run."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mg3d_jax import config_files
from mg3d_jax import options as options_lib
from mg3d_jax.config import migrations
from mg3d_jax.config.parts import Config, assemble
from mg3d_jax.errors import UserError, in_code_of_users
from mg3d_jax.files import read_json
from mg3d_jax.registry import load_plugins

OVERRIDE = "--config."


def default() -> ConfigDict:
    """Every key there is, with its default: what config files start from. Locked against mistyped keys."""
    return ConfigDict(options_lib.to_dict(Config())).lock()


def typed(config: ConfigDict | Mapping[str, Any]) -> Config:
    """The typed configuration of a `ConfigDict` or nested dict with all keys. `UserError` lists what is wrong in it."""
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    load_plugins(values.get("plugins", ()))
    found, problems = assemble(values)
    if problems:
        raise UserError("the configuration is impossible:\n  - " + "\n  - ".join(problems))
    return found


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with other values for some keys: `{"data.batch_size": 8, "objectives.matching.weight": 0.1}`."""
    values = to_dict(config)
    for full, value in changes.items():
        *path, name = full.split(".")
        node = values
        for part in path:
            node = node[part]
        if name not in node:
            raise UserError(f"there is no key {full}")
        node[name] = value
    return typed(values)


def to_dict(config: Config) -> dict[str, Any]:
    """All keys as nested dicts."""
    return options_lib.to_dict(config)


def flatten(config: Config) -> dict[str, Any]:
    """`{"data.batch_size": 64, ...}`, sorted by key."""
    return options_lib.flatten(to_dict(config))


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declares `--config`; overrides `--config.KEY=VALUE` are parsed by `load`."""
    parser.add_argument(
        "--config", required=required, metavar="FILE[:ARG]", help="config file; override keys with --config.KEY=VALUE"
    )


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """Parses a command's own options and its config with overrides; anything unknown is an error."""
    overrides, own = split_overrides(argv)
    args = parser.parse_args(own)
    return args, load(args.config, overrides)


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """The overrides of a command line, and what is left of it. An override may be two words: `--config.seed 3`."""
    return options_lib.split_overrides(argv, OVERRIDE)


def load(path: str, overrides: list[str] | None = None) -> Config:
    """Loads `FILE[:ARG]` and applies `["--config.a.b=value", ...]`. `UserError` for a missing file, key or wrong type."""
    return typed(load_file(path, overrides))


def load_file(path: str, overrides: list[str] | None = None) -> ConfigDict:
    """What `get_config` of a file returns, with overrides: of a training config or of a sweep."""
    path = config_files.find(path)
    argv = ["mg3d", f"--config={path}", *(overrides or [])]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        found = values.config
    except (AttributeError, KeyError) as error:
        # Of the file itself (a wrong ARG, a mistyped group), or of an override.
        if not overrides:
            raise UserError(f"config {path}: {type(error).__name__}: {error}") from error
        raise UserError(_unknown_key(path, overrides, error)) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"config {path}: {error}") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config {path}: {in_code_of_users(error)}") from error
    if not isinstance(found, ConfigDict):
        raise UserError(
            f"config {path}: get_config returns a {type(found).__name__}, not a ConfigDict: does it `return config`?"
        )
    return found


def _unknown_key(path: str, overrides: list[str], error: Exception) -> str:
    known = sorted(options_lib.flatten(load_file(path).to_dict()))
    for override in overrides:
        key = override.removeprefix(OVERRIDE).partition("=")[0].partition(" ")[0]
        if key not in known and not any(k.startswith(key + ".") for k in known):
            close = difflib.get_close_matches(key, known, 1, 0.4)
            return f"config {path} has no key {key!r}." + (f" Did you mean --config.{close[0]}=...?" if close else "")
    return f"config {path}: {error}"


def to_json(config: Config) -> str:
    """Text that `from_json` reads, now and in later versions."""
    return json.dumps(to_dict(config), indent=1, sort_keys=True)


def from_json(text: str, where: str = "config") -> Config:
    """The config that `to_json` of this or an older version wrote. `UserError` names what this version cannot carry over.

    Args:
        where: the file, for messages.
    """
    values = json.loads(text)
    load_plugins(values.get("plugins", ()))
    values, lost = migrations.upgrade(values)
    found, problems = assemble(values)
    if problems := lost + problems:
        raise UserError(
            f"{where}: "
            + "; ".join(problems)
            + ". It was written by a newer version, or with a plug-in that is not named in "
            "`plugins`: update mg3d_jax, or name the module"
        )
    return found


def read(path: Path) -> Config:
    """The config of a run, from its `config.json`. `UserError` where it cannot be read."""
    return from_json(json.dumps(read_json(path)), where=str(path))
