"""Who joins whom, and whether every process has the devices that it was given. Real processes: test_sharding, test_launch."""

import argparse
from dataclasses import replace

import pytest

from mg3d_jax.errors import UserError
from mg3d_jax.training import distributed

SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
SLURM |= {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def place(*options, **environ):
    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    return distributed.find_place(parser.parse_args(options), environ)


def test_open_mpi_tasks_share_the_gpus_of_their_host():
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
    found = place(**MPI, **uri, CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert (found.cluster, found.local_device_ids, found.alone) == ("ompi", (2, 3), False)
    single = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert place(**single, **uri) == distributed.Place("ompi", alone=True)  # all GPUs: JAX alone would take one
    found = place("--coordinator", "a:1", **MPI)
    assert (found.num_processes, found.process_id) == (4, 3)


def test_what_is_said_is_not_detected_again():
    """Inside a SLURM job JAX would otherwise still narrow a process down to one GPU."""
    explicit = place("--coordinator", "a:1", "--process-id", "0", "--num-processes", "2", **SLURM)
    assert distributed._arguments(explicit)["cluster_detection_method"] == "deactivate"
    assert "cluster_detection_method" not in distributed._arguments(place(**SLURM))
    assert place(**SLURM).alone


@pytest.mark.parametrize(
    ("environ", "promised"),
    [
        (SLURM | {"SLURM_GPUS_ON_NODE": "8"}, 8),
        (SLURM | {"SLURM_GPUS_ON_NODE": "8", "JAX_PLATFORMS": "cpu"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),  # SLURM's word for none
        ({"CUDA_VISIBLE_DEVICES": "GPU-1f,GPU-2e"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1),  # CUDA stops reading there
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        (MPI | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 2),
        ({}, None),
    ],
)
def test_gpus_that_the_scheduler_promised(environ, promised):
    assert distributed.promised_gpus(environ)[0] == promised


ROW = distributed.DeviceRow(0, "node-1", "gpu", "NVIDIA H100", 8, 64 * 2**30, 8, "SLURM's allocation")


def check(monkeypatch, *rows, **options):
    monkeypatch.setattr(distributed, "gather_rows", lambda row: list(rows))
    monkeypatch.setattr(distributed, "_count_devices", lambda: [row.devices for row in rows])
    distributed.check_devices(options.pop("expected", None), {}, **options)


def test_every_process_must_have_what_it_was_given(monkeypatch, capsys):
    second = replace(ROW, process=1, host="node-2")
    check(monkeypatch, ROW, second)
    shown = capsys.readouterr().err
    assert "0        node-1  gpu       8 x NVIDIA H100  64.0 GiB" in shown and "node-2" in shown
    cpu = replace(second, platform="cpu", kinds="cpu")
    with pytest.raises(UserError, match=r"process 1 of 2 on node-2 sees 8 .*cpu.*SLURM's allocation says 8 GPU"):
        check(monkeypatch, ROW, cpu)  # the same number, but on the CPU
    with pytest.raises(UserError, match=r"process 1 of 2.*sees 1 .*says 8 GPU.*one GPU of its node"):
        check(monkeypatch, replace(ROW, devices=1), replace(second, devices=1, promised=8))
    with pytest.raises(UserError, match="8 in process 0, 1 in process 1"):
        check(monkeypatch, ROW, replace(second, devices=1))
    with pytest.raises(UserError, match=r"process 1 of 2 sees 1 .*--expected-devices says 8"):
        check(monkeypatch, ROW, replace(second, devices=1), expected=8)
    check(monkeypatch, replace(ROW, devices=4), replace(second, devices=4), expected=4)  # fewer on purpose
    with pytest.raises(UserError, match="part of a TPU slice"):
        check(monkeypatch, replace(cpu, promised=None), cluster="tpu")
