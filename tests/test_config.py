"""Loading, overrides and validation of configs: every mistake is one readable error before anything is built."""

import argparse
import errno
import json
import os
import re

import pytest
from support import ROOT, tiny_builder, tiny_config

from mg3d_jax import config as config_lib
from mg3d_jax.commands import main as cli
from mg3d_jax.config import checks, migrations, table
from mg3d_jax.errors import UserError

OLD_HASH = "025aef84cee5"
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def test_every_committed_config_is_valid():
    for file in sorted((ROOT / "configs").glob("*.py")):
        checks.validate(config_lib.load(str(file), ["--config.data.valid=('held_out',)"]))


def test_overrides_keep_the_type_of_the_default():
    config = config_lib.load(
        f"{QUICKSTART}:long",
        ["--config.optimizer.learning_rate=3", "--config.model.volume_size=(16, 16, 32)", "--config.data.train=a"],
    )
    assert config.optimizer.learning_rate == 3.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.model.volume_size == (16, 16, 32)
    assert config.data.train == ("a",)
    assert config.training.steps > config_lib.load(QUICKSTART).training.steps


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--config.optimizer.learning_rat=1", "learning_rate"),
        ("--config.optimiser.learning_rate=1", "optimizer.learning_rate"),
        ("--config.data.batch_size=1.5", "batch_size"),
        ("--config.data.batch_size=many", "batch_size"),
        ("--config.data=5", "data"),
    ],
)
def test_a_wrong_override_names_the_key(override, says):
    with pytest.raises(UserError, match=says):
        config_lib.load(QUICKSTART, [override])


def test_a_full_disk_is_one_line_and_other_failures_of_the_system_are_not_hidden(monkeypatch, capsys):
    def fail(number: int) -> None:
        def command(argv: list[str]) -> int:
            raise OSError(number, os.strerror(number), "RUN/metrics.jsonl")

        monkeypatch.setattr("mg3d_jax.commands.train.main", command)

    fail(errno.ENOSPC)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err.startswith("mg3d train: RUN/metrics.jsonl: No space left on device. Make room")
    fail(errno.ESRCH)
    with pytest.raises(ProcessLookupError):
        cli.main(["train"])


def test_a_missing_file_says_what_to_write():
    with pytest.raises(UserError, match="does not exist"):
        config_lib.load("configs/nothing.py")


@pytest.mark.parametrize(
    ("path", "overrides", "says"),
    [
        (f"{QUICKSTART}:lnog", [], r"\['lnog'\] are no arguments"),
        (f"{QUICKSTART}:lnog", ["--config.seed=1"], r"\['lnog'\] are no arguments"),
        ("mistyped", [], "volume_encodr"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path, path, overrides, says):
    file = tmp_path / "mistyped"
    file.write_text(
        "from mg3d_jax import config\n\n\ndef get_config(arg=''):\n"
        "    c = config.default().unlock()\n    c.model.volume_encodr.preset = 's'\n    return c\n"
    )
    with pytest.raises(UserError, match=says):
        config_lib.load(str(file) if path == "mistyped" else path, overrides)


def test_keys_that_a_file_or_an_older_run_has_and_this_code_has_not_are_named(tmp_path):
    config = tiny_builder()
    config.optimizer.learning_rat = 1e-3
    del config.data.windows
    mistyped = "no key optimizer.learning_rat: did you mean optimizer.learning_rate"
    with pytest.raises(UserError, match=re.compile(f"data.windows is missing.*{mistyped}", re.DOTALL)):
        config_lib.typed(config)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(UserError, match=f"config.json: .*{mistyped}.*newer version"):
        config_lib.read(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(config_lib.to_json(tiny_config()))
    assert config_lib.read(tmp_path / "config.json") == tiny_config()


def test_a_key_that_an_older_run_lacks_gets_its_neutral_value():
    values = config_lib.to_dict(tiny_config())
    del values["data"]["windows"], values["model"]["report_encoder"]["kind"], values["objectives"]["matching"]
    del values["init_from"], values["tasks"], values["plugins"]
    again = config_lib.from_json(json.dumps(values))
    assert again == tiny_config() and again.objectives["matching"].weight == 0.0


def test_renamed_and_removed_keys_are_rows_of_a_table(monkeypatch):
    monkeypatch.setitem(migrations.RENAMED, "training.old_steps", "training.steps")
    monkeypatch.setitem(migrations.REMOVED, "training.turbo", (False, "train without it"))
    values = config_lib.to_dict(tiny_config())
    values["training"] |= {"old_steps": values["training"].pop("steps"), "turbo": False}
    assert config_lib.from_json(json.dumps(values)) == tiny_config()
    values["training"]["turbo"] = True
    with pytest.raises(UserError, match=r"run: training.turbo = True: this version knows only False; train without it"):
        config_lib.from_json(json.dumps(values), where="run")


def test_hashes_of_version_0_1_0_stay():
    """Of the run in the fixtures, as its checkpoint says it; another key, at its neutral value, changes nothing."""
    folder = ROOT / "tests" / "fixtures" / "v0.1.0"
    assert config_lib.config_hash(config_lib.read(folder / "run" / "config.json")) == OLD_HASH
    assert config_lib.config_hash(config_lib.load(str(folder / "config.py"))) == OLD_HASH


def test_values_of_another_type_are_named():
    values = config_lib.to_dict(tiny_config())
    values["data"]["batch_size"], values["optimizer"]["learning_rate"] = "many", 1
    with pytest.raises(UserError, match=r"data.batch_size = 'many': a int is needed"):
        config_lib.typed(values)
    values["data"]["batch_size"] = 8
    assert config_lib.typed(values).optimizer.learning_rate == 1.0


def test_options_of_another_kind_of_tower_are_refused():
    says = "model.volume_encoder.stem = 'conv': means nothing with kind = 'swin'"
    with pytest.raises(UserError, match=says):
        tiny_config(model__volume_encoder__kind="swin", model__volume_encoder__stem="conv")
    with pytest.raises(UserError, match=r"model.volume_encoder.kind = 'cnn': choose one of vit, swin"):
        tiny_config(model__volume_encoder__kind="cnn")


def test_parse_takes_overrides_in_both_spellings():
    parser = argparse.ArgumentParser()
    config_lib.add_arguments(parser)
    parser.add_argument("--workdir")
    argv = ["--config", QUICKSTART, "--config.seed", "3", "--workdir", "x", "--config.data.batch_size=4"]
    args, config = config_lib.parse(parser, argv)
    assert (args.workdir, config.seed, config.data.batch_size) == ("x", 3, 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__volume_size": (16, 20, 16)}, "volume_size Y = 20 is not divisible"),
        ({"model__volume_encoder__preset": "huge"}, "choose one of"),
        ({"model__dtype": "float16"}, "float32, bfloat16"),
        ({"data__batch_size": 0}, "data.batch_size = 0"),
        ({"data__batch_size": 6, "optimizer__accumulation": 4}, "not divisible by optimizer.accumulation"),
        ({"data__windows": ((400.0, -400.0),)}, "lower < upper"),
        ({"data__max_tokens": 1000}, "max_positions"),
        ({"training__epochs": 2.0}, "exactly one"),
        ({"training__steps": 0}, "exactly one"),
        ({"mesh__fsdp": -1}, "at most one of them -1"),
        ({"training__best_metric": "evaluation/auroc_macro", "training__evaluate_every": 2}, "best_mode = 'max'"),
        (
            {"training__best_metric": "valid/loss", "training__best_mode": "max", "training__validate_every": 2},
            "best_mode = 'min'",
        ),
        ({"training__best_metric": "valid/loss"}, "measured only at the end"),
        ({"objectives__alignment__weight": 0.0}, "no objective"),
    ],
)
def test_impossible_settings_are_listed(changes, says):
    with pytest.raises(UserError, match=says):
        checks.validate(tiny_config(**changes))


def test_json_round_trip_and_hash():
    config = tiny_config("a", "b")
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.flatten(again) == config_lib.flatten(config)
    assert config_lib.config_hash(again) == config_lib.config_hash(config)


def test_only_what_matters_for_the_result_changes_the_hash():
    config = tiny_config("a")
    assert config_lib.config_hash(tiny_config("elsewhere", mesh__fsdp=2)) == config_lib.config_hash(config)
    other = tiny_config("a", optimizer__learning_rate=0.5)
    assert config_lib.config_hash(other) != config_lib.config_hash(config)
    (difference,) = config_lib.resume_differences(config, other)
    assert difference == "optimizer.learning_rate: 0.0001 -> 0.5"


def test_the_table_of_all_keys_is_that_of_the_code():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == table.markdown(), "run: python -m mg3d_jax.config.table > docs/configuration.md"
    keys = config_lib.flatten(config_lib.Config())
    assert not [key for key in keys if f"`{key}`" not in page]
