"""What can be wrong about joining the processes of a run is said within seconds, and one that fails takes the others along."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import environment, free_port

from mg3d_jax.errors import TryAgainError, UserError
from mg3d_jax.training import joining


@pytest.mark.parametrize("address", ["node", "node:", ":8476", "node:0", "node:99999", "node:x"])
def test_what_is_no_address_of_a_coordinator_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"is not HOST:PORT"):
        joining.split_address(address)
    assert joining.split_address("[::1]:8476") == ("::1", 8476)


def test_a_host_without_an_address_is_named() -> None:
    with pytest.raises(UserError, match=r"'nowhere\.invalid' has no address here .*correct --coordinator"):
        joining.resolved("nowhere.invalid", 8476, seconds=0)


def test_the_coordinator_listens_where_it_is_asked_for_only(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    assert joining.free_address("localhost", port, ["127.0.0.1"]) == f"127.0.0.1:{port}"
    # A host's own name that is 127.0.1.1 here is another address elsewhere; so is one that no interface here has.
    assert joining.free_address("node1", port, ["127.0.1.1"]) == f"[::]:{port}"
    assert joining.free_address("node1", port, ["203.0.113.7"]) == f"[::]:{port}"
    monkeypatch.setattr(joining, "PORT_SECONDS", 0)
    with socket.create_server(("127.0.0.1", port)) as taken, pytest.raises(UserError, match=rf"port {port} .* in use"):
        joining.free_address("localhost", taken.getsockname()[1], ["127.0.0.1"])


def test_waiting_says_for_whom_and_where_and_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(joining, "SAY_AFTER", 0.05)
    monkeypatch.setattr(logging.getLogger("mg3d_jax"), "propagate", True)
    caplog.set_level("INFO", "mg3d_jax")
    port = free_port()
    with pytest.raises(TryAgainError, match=rf"process 1 waited .* for process 0 at localhost:{port} in vain"):
        joining.wait_for_coordinator(1, "localhost", port, 0.3)
    assert f"process 1 waits for process 0 at localhost:{port} (Connection refused)" in caplog.text
    with socket.create_server(("127.0.0.1", port)):
        joining.wait_for_coordinator(1, "127.0.0.1", port, 5)


def test_proxies_are_not_asked_for_hosts_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    with joining.without_proxies():
        assert "https_proxy" not in os.environ
    assert os.environ["https_proxy"] == "http://proxy:1"


def test_how_long_to_wait_is_checked() -> None:
    assert joining.timeout({}) == 300 and joining.timeout({joining.TIMEOUT_VARIABLE: "5"}) == 5
    for text in ("soon", "0", "nan"):
        with pytest.raises(UserError, match=f"{joining.TIMEOUT_VARIABLE}={text}"):
            joining.timeout({joining.TIMEOUT_VARIABLE: text})
    assert joining.heartbeat({}) == 100 and joining.heartbeat({joining.HEARTBEAT_VARIABLE: "20"}) == 20
    with pytest.raises(UserError, match=f"{joining.HEARTBEAT_VARIABLE}=5: give seconds, at least 10"):
        joining.heartbeat({joining.HEARTBEAT_VARIABLE: "5"})


FAILS = """
import argparse, sys, time
from mg3d_jax import log
from mg3d_jax.errors import UserError
from mg3d_jax.training import distributed

log.to_stderr()
parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
try:
    with distributed.joined(parser.parse_args()):
        if "1" in sys.argv[-1]:
            raise UserError("no such folder")
        time.sleep(100)
except UserError:
    sys.exit(2)
"""


@pytest.mark.processes
def test_one_of_two_real_processes_that_fails_ends_both(tmp_path: Path) -> None:
    """Else the one waits for the other for minutes, each in JAX's barrier at the end."""
    program = tmp_path / "fails.py"
    program.write_text(FAILS)
    place = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
    started = [
        subprocess.Popen(
            [sys.executable, str(program), *place, str(n)], env=environment(), stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    said = [process.communicate(timeout=90)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert f"process 1 on {socket.gethostname()} has ended: no such folder" in said[0]
