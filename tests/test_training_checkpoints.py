"""Checkpoints of a small state: every kind of damage to their files, other meshes and processes, which ones are kept."""

import errno
import logging
import random
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import ROOT, environment, free_port

from mg3d_jax import config as config_lib
from mg3d_jax.errors import UserError, storage_problem
from mg3d_jax.training.checkpoints import Checkpoints, check_writable
from mg3d_jax.training.integrity import checksums

META = {"config": config_lib.to_json(config_lib.Config()), "trained_seconds": 1.25, "spacing": (1.0, 2.0, 3.0)}


def setup_on(data, fsdp):
    """What `Checkpoints` needs to know of a run: a kernel split over `fsdp`, and arrays that every device has."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp, 1), ("data", "fsdp", "tensor"))

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    params = {"kernel": array((64, 24), "float32", "fsdp"), "bias": array((24,), "bfloat16"), "s": array((), "float32")}
    return SimpleNamespace(abstract={"params": params, "step": array((), "int32")}, config=config_lib.Config())


def state_of(setup, step):
    """Random values that differ from step to step, the same on every mesh."""
    rng = np.random.default_rng(step)
    leaves, tree = jax.tree.flatten(setup.abstract)
    values = [np.asarray(rng.normal(size=x.shape) * 1000).astype(x.dtype) for x in leaves]
    placed = [
        jax.make_array_from_callback(x.shape, x.sharding, lambda index, v=v: v[index])
        for x, v in zip(leaves, values, strict=True)
    ]
    return jax.tree.unflatten(tree, placed)


def same(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


@pytest.fixture(scope="module")
def setup():
    return setup_on(2, 4)


@pytest.fixture(scope="module")
def saved(setup, tmp_path_factory):
    """A run with checkpoints of the steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir)
    for step in (2, 4):
        checkpoints.save(state_of(setup, step), META | {"step": step}, step)
    checkpoints.close()
    assert checkpoints.steps() == [2, 4]
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.parametrize("mesh", [(2, 4), (8, 1), (1, 1)])
def test_comes_back_bit_for_bit_on_any_mesh(saved, mesh):
    other = setup_on(*mesh)
    state, meta, step = Checkpoints(saved).newest(other)
    assert step == 4 and same(state, state_of(other, 4))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, other.abstract)
    assert (meta["step"], meta["trained_seconds"], meta["spacing"]) == (4, 1.25, [1.0, 2.0, 3.0])
    assert same(Checkpoints(saved).restore(other, 2)[0], state_of(other, 2))
    assert Checkpoints(saved).meta(2)["step"] == 2


def mixed_sum(array):
    """The checksum in Python's integers."""
    total = 0
    for position, bits in enumerate(array.reshape(-1).view(f"uint{8 * array.itemsize}").tolist()):
        x = (bits + position * 0x9E3779B9) % 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        total += x ^ (x >> 16)
    return total % 2**32


def test_checksums_do_not_depend_on_the_mesh_and_see_every_change(setup):
    state = state_of(setup, 1)
    found = checksums(state)
    for path, value in jax.tree_util.tree_flatten_with_path(state)[0]:
        assert found[jax.tree_util.keystr(path)] == mixed_sum(np.asarray(value))
    assert found == checksums(state_of(setup_on(8, 1), 1))
    kernel = np.asarray(state["params"]["kernel"])
    changed = (kernel, kernel[::-1].copy(), kernel.T.reshape(64, 24), -kernel, np.roll(kernel, 1, 1))
    assert len({checksums([jax.numpy.asarray(array)])["[0]"] for array in changed}) == len(changed)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
    path = largest_file(folder / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def another_number_in_the_json(folder):
    path = folder / "meta" / "metadata"
    path.write_text(path.read_text().replace('"trained_seconds": 1.25', '"trained_seconds": 9.25'))


DAMAGES = {
    "truncated": truncate,
    "empty files": empty,
    "data file deleted": lambda folder: largest_file(folder / "state").unlink(),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no meta": lambda folder: shutil.rmtree(folder / "meta"),
    "nothing left": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "wrong JSON": another_number_in_the_json,
}


# tensorstore leaves tasks of failed reads behind; pytest sees them when they are collected.
unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@unraisable
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(setup, run, capsys, damage):
    damage(run / "checkpoints" / "4")
    checkpoints = Checkpoints(run)
    state, meta, step = checkpoints.newest(setup)
    assert step == meta["step"] == 2 and same(state, state_of(setup, 2))
    assert f"{run / 'checkpoints' / '4'} is damaged and not used: " in capsys.readouterr().err
    assert (run / "checkpoints" / "4").exists()  # looking changes nothing
    with pytest.raises(UserError, match="/4 cannot be restored"):
        checkpoints.restore(setup, 4)
    # The same step can be saved again, and the damaged one is there to be looked at.
    checkpoints.save(state_of(setup, 14), META | {"step": 4}, 4)
    checkpoints.close()
    assert "damaged checkpoint of step 4 is now" in capsys.readouterr().err
    assert (run / "damaged_checkpoints" / "4").is_dir()
    state, _, step = Checkpoints(run).newest(setup)
    assert step == 4 and same(state, state_of(setup, 14)) and "damaged" not in capsys.readouterr().err


@unraisable
def test_a_flipped_bit_anywhere_never_gives_wrong_values(setup, run, capfd):
    rng, unused, folder = random.Random(0), 0, run / "checkpoints" / "4"
    expected = {step: state_of(setup, step) for step in (2, 4)}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    for path in files:
        content = path.read_bytes()
        for _ in range(8 if path == largest_file(folder / "state") else 2):
            flipped = bytearray(content)
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            state, meta, step = Checkpoints(run).newest(setup)
            assert meta["step"] == step and same(state, expected[step]), path
            unused += step == 2
        path.write_bytes(content)
    assert unused >= 10  # the others hit what nobody reads, e.g. the time of writing


@unraisable
def test_none_readable_is_an_error_that_names_all(setup, run):
    for step in (2, 4):
        empty(run / "checkpoints" / str(step))
    for call in (Checkpoints(run).newest, Checkpoints(run).restore):
        with pytest.raises(UserError, match=r"none of the checkpoints in (?s:.*)\n  - 4: .*\n  - 2: .*\nRestore"):
            call(setup)


def test_half_written_ones_are_named_and_removed_by_the_first_save(setup, run, capsys):
    half = run / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "4", half)
    checkpoints = Checkpoints(run)
    assert checkpoints.newest(setup)[2] == 4
    assert f"{half.name} was not written to its end" in capsys.readouterr().err and half.exists()
    checkpoints.save(state_of(setup, 6), META, 6)
    checkpoints.close()
    assert checkpoints.steps() == [4, 6] and not half.exists()


def test_no_checkpoint_and_another_configuration(setup, run, tmp_path):
    assert Checkpoints(tmp_path / "new").newest(setup) is None and not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "new").restore(setup)
    other = SimpleNamespace(abstract=setup.abstract, config=setup.config)
    Checkpoints(run).newest(other)
    other.config = config_lib.replace(other.config, {"optimizer.learning_rate": 0.5})
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.0001 -> 0.5"):
        Checkpoints(run).newest(other)


def reshaped(setup, **params):
    return SimpleNamespace(abstract=setup.abstract | {"params": setup.abstract["params"] | params}, config=setup.config)


def test_a_checkpoint_of_another_model_is_explained_and_not_called_damaged(setup, run, capsys):
    """Parameters that are missing, superfluous, of another shape or type: by the version that wrote them, left as they are."""
    bias = setup.abstract["params"]["bias"]
    newer = reshaped(setup, extra=bias)
    with pytest.raises(
        UserError, match=r"(?s)4 is sound.* by mg3d_jax .*params/extra \[24\] bfloat16: not in .*init_from"
    ):
        Checkpoints(run).newest(newer)
    fewer = SimpleNamespace(abstract={"params": {"bias": bias}, "step": setup.abstract["step"]}, config=setup.config)
    with pytest.raises(UserError, match="params/kernel: only in the checkpoint"):
        Checkpoints(run).newest(fewer)
    wider = reshaped(setup, bias=jax.ShapeDtypeStruct((25,), "bfloat16", sharding=bias.sharding))
    with pytest.raises(UserError, match=r"params/bias: \[24\] bfloat16 in the checkpoint, \[25\] bfloat16 here"):
        Checkpoints(run).restore(wider, 4)
    retyped = reshaped(setup, bias=jax.ShapeDtypeStruct((24,), "float32", sharding=bias.sharding))
    with pytest.raises(UserError, match=r"params/bias: \[24\] bfloat16 in the checkpoint, \[24\] float32 here"):
        Checkpoints(run).newest(retyped)
    assert "damaged" not in capsys.readouterr().err and Checkpoints(run).steps() == [2, 4]
    # A damaged one of another model is damaged: the one before says what the matter is.
    another_number_in_the_json(run / "checkpoints" / "4")
    with pytest.raises(UserError, match="2 is sound"):
        Checkpoints(run).newest(newer)
    assert "4 is damaged" in capsys.readouterr().err


def test_only_one_module_uses_the_library_of_checkpoints_and_nothing_stays_patched(setup, tmp_path):
    users = [
        p.name for p in (ROOT / "mg3d_jax").rglob("*.py") if re.search(r"^\s*(import|from) orbax", p.read_text(), re.M)
    ]
    assert users == ["storage.py"]
    before = sys.unraisablehook, list(logging.getLogger("absl").filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(state_of(setup, 1), META, 1)
        checkpoints.close()
        Checkpoints(tmp_path).newest(setup)
    assert (sys.unraisablehook, list(logging.getLogger("absl").filters)) == before


@pytest.mark.parametrize(
    ("mode", "values", "kept"),
    [
        ("min", {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan"), 6: 1.5}, [2, 5, 6]),
        ("max", {1: 0.9, 2: 0.1, 3: 0.2, 4: float("inf"), 5: None}, [1, 4, 5]),
        ("min", {1: 2.0, 2: 1.0, 3: None, 4: 0.5}, [3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(setup, tmp_path, mode, values, kept):
    for part in (3, len(values)):  # in two runs: the second must know the values of the first
        checkpoints = Checkpoints(tmp_path, keep=2, best_metric="valid/loss", best_mode=mode)
        for step, value in list(values.items())[part - 3 if part > 3 else 0 : part]:
            metrics = None if value is None else {"valid/loss": value, "other": 0.0}
            checkpoints.save(state_of(setup, step), META, step, metrics=metrics)
        checkpoints.close()
    assert checkpoints.steps() == kept


def test_what_a_disk_says_is_recognised_through_causes():
    try:
        raise ValueError("commit failed") from OSError(errno.ENOSPC, "No space left on device")
    except ValueError as error:
        assert storage_problem(error) == "No space left on device"
    assert storage_problem(ValueError("ABORTED: write: Disk quota exceeded [errno]")) == "Disk quota exceeded"
    assert storage_problem(ValueError("wrong shape")) is None


def test_a_run_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run directory .*/file/run cannot be written to: Not a directory"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


PROGRAM = """
import sys
from pathlib import Path
import jax
process = int(sys.argv[1])
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, process)
import test_training_checkpoints as t
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.integrity import checksums
setup = t.setup_on(1, 4)
checkpoints = Checkpoints(Path(sys.argv[3 + process]))
state, meta, step = checkpoints.newest(setup)
print(step, checksums(state) == checksums(t.state_of(setup, step)))
"""


@pytest.mark.processes
def test_processes_agree_when_only_one_sees_the_damage(saved, run, tmp_path):
    """Each process has a copy of the run, as on disks that disagree; the second one's newest checkpoint is damaged."""
    truncate(run / "checkpoints" / "4")
    port = str(free_port())
    command = [sys.executable, "-c", PROGRAM]
    env = environment(2, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    processes = [
        subprocess.Popen(
            [*command, str(number), port, str(saved), str(run)], env=env, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            assert process.communicate(timeout=120)[0].splitlines()[-1] == "2 True"
    finally:
        for process in processes:
            process.kill()
