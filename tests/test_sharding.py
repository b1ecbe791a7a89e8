"""The mesh, the rule table, and the way from host rows to a global batch."""

import itertools
import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from golden import shardings as golden
from jax.sharding import PartitionSpec
from support import ROOT, environment, free_port, random_batch, tiny_config

from mg3d_jax import batch as batch_contract
from mg3d_jax import sharding
from mg3d_jax.config import checks
from mg3d_jax.errors import UserError
from mg3d_jax.training import state as state_lib


def mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def test_one_size_is_inferred():
    assert dict(mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1)])
def test_a_mesh_that_does_not_fit_is_an_error(sizes):
    with pytest.raises(UserError, match="8 device"):
        mesh(*sizes)


def test_global_batch_keeps_rows_and_is_sharded():
    config = tiny_config()
    host = random_batch(config)
    placed = sharding.to_global(host, mesh(2, 2, 2), config.data.batch_size)
    for name, array in placed.items():
        np.testing.assert_array_equal(jax.device_get(array), host[name])
        assert array.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert placed["volume"].addressable_shards[0].data.shape[0] == 2


def test_batch_contract_catches_wrong_batches():
    host = random_batch(tiny_config())
    batch_contract.check(host)
    with pytest.raises(ValueError, match="lacks"):
        batch_contract.check({k: v for k, v in host.items() if k != "valid"})
    with pytest.raises(ValueError, match="volume"):
        batch_contract.check(host | {"volume": host["volume"].astype(np.float32)})


def test_unknown_logical_names_are_errors():
    with pytest.raises(ValueError, match="embd"):
        sharding.check_names(["batch", None, "embd"])


def test_parameters_and_moments_follow_the_rules():
    setup = state_lib.build(tiny_config(), 400, mesh(2, 2, 2), steps=3)
    params = setup.abstract["params"]
    block = params["volume_encoder"]["stack"]["blocks"]["block"]
    assert block["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert block["attention"]["query"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert params["report_encoder"]["word_embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")
    state = state_lib.initialize(setup)
    moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.ndim]
    by_shape = {(x.shape, x.sharding.spec) for x in jax.tree.leaves(state["params"])}
    assert moments and all((m.shape, m.sharding.spec) in by_shape for m in moments)


def test_a_dimension_that_the_mesh_does_not_divide_stays_whole():
    setup = state_lib.build(tiny_config(), 401, mesh(2, 2, 2), steps=3)
    assert setup.abstract["params"]["report_encoder"]["word_embedding"].sharding.spec == PartitionSpec(None, "fsdp")


@dataclass(frozen=True)
class FakeDevice:
    """What laying out a mesh reads of a device."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    slice_index: int = 0


def tpus(kind: str, shape: tuple[int, int, int], slices: int = 1) -> list[FakeDevice]:
    """Slices of chips on a torus; every 2 x 2 x 1 chips are a host."""
    devices, hosts = [], {}
    for number, (z, y, x) in itertools.product(range(slices), itertools.product(*map(range, reversed(shape)))):
        host = hosts.setdefault((number, x // 2, y // 2, z), len(hosts))
        devices.append(FakeDevice(len(devices), host, "tpu", kind, (x, y, z), 0, number))
    return devices


def gpus(processes: int, each: int) -> list[FakeDevice]:
    return [FakeDevice(i, i // each) for i in range(processes * each)]


def mesh_config(**changes: object) -> sharding.MeshConfig:
    return sharding.MeshConfig(**changes)


def test_only_data_crosses_tpu_slices_and_fsdp_lies_in_a_plane():
    grid = sharding.arrange(mesh_config(preset="tpu-4x4x4", slices=2), tpus("TPU v5p", (4, 4, 4), slices=2)[::-1])
    assert grid.shape == (8, 16, 1) and len({d.id for d in grid.ravel()}) == 128
    for row in range(8):
        devices = grid[row].ravel()
        assert {d.slice_index for d in devices} == {row // 4}
        planes = [len({d.coords[axis] for d in devices}) for axis in range(3)]
        assert sorted(planes) == [1, 4, 4]  # 16 chips of one 4 x 4 plane


def test_groups_of_hosts_are_slices_elsewhere():
    grid = sharding.arrange(mesh_config(preset="gpu-node", slices=2), gpus(4, 8)[::-1])
    assert [{d.process_index for d in row.ravel()} for row in grid] == [{0}, {1}, {2}, {3}]
    assert sharding.arrange(mesh_config(fsdp=16, slices=2), gpus(4, 8)).shape == (2, 16, 1)


@pytest.mark.parametrize(
    ("config", "devices", "says"),
    [
        ({"slices": 2, "fsdp": 8}, tpus("TPU v5p", (4, 4, 1)), r"lie in 1 TPU slice\(s\): set --config.mesh.slices=1"),
        ({"fsdp": 8}, tpus("TPU v5p", (4, 4, 1), slices=2), "set --config.mesh.slices=2"),
        ({"slices": 2, "fsdp": 4}, tpus("TPU v5p", (4, 4, 1), slices=3)[16:40], r"different numbers.*1: 16, 2: 8"),
        ({"fsdp": 5}, tpus("TPU v5p", (4, 4, 1))[1:], "cannot be laid on these TPUs"),  # a chip is missing
        ({"slices": 2, "fsdp": 32}, gpus(4, 8), r"does not divide the data axis, 1: .* devices of a slice \(32 / 2\)"),
        ({"slices": 4}, gpus(2, 8), "there are 2 process"),
        ({"slices": 2, "data": 8}, gpus(1, 8), "there are 1 process"),
        ({"slices": 2}, [FakeDevice(i, int(i > 1)) for i in range(8)], "different numbers of devices"),
        ({"preset": "gpu-single"}, gpus(1, 8), r"is for 1 device\(s\) per slice, here are 8"),
        ({"preset": "tpu-8x8", "slices": 2}, tpus("TPU v5 lite", (8, 8, 1)), r"is for 64 .* 64 in 2 slice"),
        ({"preset": "gpu-nodes"}, gpus(1, 8), "choose one of cpu, gpu-single, gpu-node"),
        ({"preset": "gpu-node", "fsdp": 4}, gpus(1, 8), "are both set"),
    ],
)
def test_meshes_that_contradict_the_hardware_are_errors(config, devices, says):
    with pytest.raises(UserError, match=says):
        sharding.arrange(mesh_config(**config), devices)


def test_data_alone_may_lie_on_slices_that_nobody_counted():
    assert sharding.arrange(mesh_config(), tpus("TPU v5 lite", (4, 4, 1), slices=2)).shape == (32, 1, 1)


def test_every_preset_fits_its_hardware():
    for name, preset in sharding.MESH_PRESETS.items():
        count = preset.devices or 2 * preset.fsdp * preset.tensor
        if name.startswith("tpu"):
            x, y, *z = map(int, name.removeprefix("tpu-").split("x"))
            devices = tpus("TPU v5p" if z else "TPU v5 lite", (x, y, *(z or [1])))
        else:
            devices = gpus(count // min(count, 8) or 1, min(count, 8))
        grid = sharding.arrange(mesh_config(preset=name), devices)
        assert grid.shape == (count // preset.fsdp // preset.tensor, preset.fsdp, preset.tensor)
        row = f"| `{name}` | {preset.devices or 'any'} | {preset.fsdp} | {preset.tensor} | {preset.why} |"
        assert row in (ROOT / "docs" / "scaling_out.md").read_text()


def test_config_check_knows_presets():
    checks.validate(tiny_config(mesh__preset="gpu-node"))
    for changes, says in (({"mesh__preset": "dgx"}, "choose one of"), ({"mesh__max_replicated": 1.5}, "from 0 to 1")):
        with pytest.raises(UserError, match=says):
            checks.validate(tiny_config(**changes))


def test_rows_of_a_tpu_host_are_those_of_its_chips():
    """4 x 4 chips, hosts of 2 x 2: each host has every shard of two rows and two columns, and no row is left out."""
    grid = sharding.arrange(mesh_config(fsdp=4), tpus("TPU v5p", (4, 4, 1)))
    owned = [sharding.process_rows(grid, host, 32) for host in range(4)]
    for host, rows in enumerate(owned):
        expected = {
            2 * (4 * i + j) + k for i, j in np.ndindex(4, 4) for k in (0, 1) if grid[i, j, 0].process_index == host
        }
        assert list(rows) == sorted(expected)
    assert sorted(itertools.chain(*owned)) == list(range(32))
    assert any(rows != tuple(range(rows[0], rows[0] + 8)) for rows in owned)  # not contiguous
    assert sharding.process_rows(grid.reshape(2, 1, 8), 0, 32) == tuple(range(16))  # shared over `tensor`


PROGRAM = """
import argparse, sys
import jax, numpy as np
from mg3d_jax import log, sharding
from mg3d_jax.training import distributed
log.to_stderr()
parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
distributed.initialize(parser.parse_args(sys.argv[1:]))
a, b, c, d = jax.devices()
mesh = jax.sharding.Mesh(np.array([a, c, b, d]).reshape(2, 2, 1), sharding.MESH_AXES)
whole = np.arange(16).reshape(8, 2)
rows = sharding.local_rows(mesh, 8)
placed = sharding.to_global({"x": whole[list(rows)]}, mesh, 8)["x"]
for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, whole[shard.index])
total = jax.jit(lambda x: (x * x).sum(), out_shardings=sharding.replicated(mesh))(placed)
print(rows, int(total))
"""


@pytest.mark.processes
def test_processes_read_their_rows_only_where_these_are_scattered_too(tmp_path):
    """Two processes; also the table of devices, which process 0 shows."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), "--coordinator", f"localhost:{free_port()}"]
    command += ["--num-processes", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*command, "--process-id", str(number)], env=environment(devices=2), **pipes)
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    total = sum(n * n for n in range(16))
    assert outputs[0][0].splitlines()[-1] == f"(0, 1, 4, 5) {total}"
    assert outputs[1][0].splitlines()[-1] == f"(2, 3, 6, 7) {total}"
    table = [line.split() for line in outputs[0][1].splitlines() if "not known" in line]
    assert [(line[0], line[2:6]) for line in table] == [(n, ["cpu", "2", "x", "cpu"]) for n in "01"]
    assert "memory of each" not in outputs[1][1] and "process 1 of 2: 2 x cpu, 4 in all" in outputs[1][1]


@pytest.mark.parametrize("preset", golden.PRESETS)
def test_shardings_are_the_golden_ones(preset):
    setups = list(golden.setups(preset))
    expected = golden.path(preset).read_text()
    assert golden.text([setup.abstract for setup in setups]) == expected, (
        "if that is meant: python tests/golden/shardings.py"
    )
    for setup in setups:
        sharding.check_replication(setup.abstract["params"], 0.01)


def test_too_much_that_stays_whole_is_an_error():
    split, rows, only_data = mesh(2, 2, 2), mesh(2, 4, 1), mesh(8, 1, 1)

    def parameter(shape, *spec, on=split):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=jax.NamedSharding(on, PartitionSpec(*spec)))

    params = {"a": parameter((8, 9), "fsdp"), "b": {"c": parameter((7, 3), "data"), "d": parameter((4,))}}
    assert sharding.whole_share(params) == 25 / 97
    sharding.check_replication(params, 0.26)
    with pytest.raises(
        UserError, match=r"25\.8%.*\n.*b/c \(7, 3\): fsdp = 2 or tensor = 2 divides none.*\n.*b/d \(4,\): the lo"
    ):
        sharding.check_replication(params, 0.25)
    sharding.check_replication({"a": parameter((7, 3), on=only_data)}, 0.0)  # nothing to split over
    with pytest.raises(UserError, match=r"100\.0%"):  # "tensor" of size 1 splits nothing
        sharding.check_replication({"a": parameter((8, 8), None, "tensor", on=rows)}, 0.5)
