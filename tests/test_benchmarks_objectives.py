"""Memory of the matching loss, from the compiler: linear in the patients, and 4,096 of them fit on small devices."""

import pytest

from mg3d_jax.benchmarks.objectives import GIB, blocked_matching, bytes_per_device, dense_matching, main


def test_memory_grows_linearly_and_4096_patients_fit_in_one_gib_per_device():
    sizes = {b: bytes_per_device(blocked_matching(8), b, sentences=32, width=128, devices=8) for b in (256, 1024, 4096)}
    assert sizes[1024] < 4.4 * sizes[256] and sizes[4096] < 4.4 * sizes[1024]
    assert sizes[4096] < GIB
    assert bytes_per_device(dense_matching, 1024, sentences=32, width=128, devices=8) > 8 * sizes[1024]


def test_one_device_needs_linear_memory_too():
    small, large = (bytes_per_device(blocked_matching(4), b, sentences=8, width=32, devices=1) for b in (128, 1024))
    assert large < 8.5 * small


def test_the_command_prints_both_forms(capsys):
    assert main(["--batch-sizes", "16", "--sentences", "4", "--width", "8", "--devices", "1", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("16 ")]
    assert [row[1] for row in rows] == ["1", "2"]
    assert all(float(value) >= 0 for row in rows for value in row[2:])


def test_help_names_the_units(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "patients" in capsys.readouterr().out
