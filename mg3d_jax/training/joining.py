"""How a process joins the others of its run: what can be wrong about that is said within seconds, in one line.

JAX waits in silence for minutes for a coordinator that is not there, asks the proxy of `http_proxy` for it, listens on all
interfaces of the host, and ends the process by a crash in C++ when the coordinator dies.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax._src import distributed  # its client of the coordinator, which orbax takes from there, too

from mg3d_jax.errors import AGAIN, TryAgainError, UserError

logger = logging.getLogger(__name__)
TIMEOUT_VARIABLE = "MG3D_JOIN_SECONDS"  # how long to wait for other processes
HEARTBEAT_VARIABLE = "MG3D_HEARTBEAT_SECONDS"  # after how long a process that is not heard counts as dead
SAY_AFTER, SAY_EVERY = 3.0, 30.0  # seconds of waiting
WATCH_SECONDS, LEFT = 1.0, "mg3d/left"
PORT_SECONDS = 5.0  # for the end of a run before, which may still have the port
PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")
_kept: list[Any] = []  # callbacks that C code holds


def timeout(environment: Mapping[str, str]) -> float:
    """Seconds to wait for the others: `MG3D_JOIN_SECONDS`, or the 300 of JAX."""
    return _seconds(environment, TIMEOUT_VARIABLE, 300, least=1)


def heartbeat(environment: Mapping[str, str]) -> int:
    """Seconds after which the coordinator takes a process for dead that it does not hear: `MG3D_HEARTBEAT_SECONDS`, or the 100
    of JAX. A process that is frozen for longer, as by a machine that is moved, ends the run too: hence not fewer than 10."""
    return round(_seconds(environment, HEARTBEAT_VARIABLE, 100, least=10))


def _seconds(environment: Mapping[str, str], name: str, default: float, *, least: float) -> float:
    text = environment.get(name, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not least <= seconds < 1e6:
        raise UserError(f"{name}={text}: give seconds, at least {least:g}")
    return seconds


def join(arguments: Mapping[str, Any]) -> None:
    """`jax.distributed.initialize(**arguments)`, with what the module says.

    Raises:
        UserError: the host of the coordinator has no address, or its port belongs to somebody else.
        TryAgainError: nobody came within `MG3D_JOIN_SECONDS`.
    """
    seconds, beats, given = timeout(os.environ), heartbeat(os.environ), dict(arguments)
    address, number = given.get("coordinator_address"), given.get("process_id")
    if address is not None and number is not None:
        host, port = split_address(address)
        found = resolved(host, port)
        if number == 0:
            given["coordinator_bind_address"] = free_address(host, port, found)
        else:
            wait_for_coordinator(number, host, port, seconds)
    ends_with_code(AGAIN)
    whom = "process 0" if number else "the other processes"
    with without_proxies(), awaited(f"{whom} at {address or 'the address that the scheduler gave'}", seconds):
        jax.distributed.initialize(
            **given,
            initialization_timeout=round(seconds) + 30,  # then it would crash
            heartbeat_timeout_seconds=beats,
        )
    watch_others()


def split_address(address: str) -> tuple[str, int]:
    """`"host:port"`, `"[::1]:port"` -> both. `UserError` where it is neither."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"the coordinator {address!r} is not HOST:PORT, such as node1:8476")
    return host.strip("[]"), int(port)


def resolved(host: str, port: int, seconds: float = 15.0) -> list[str]:
    """The addresses of a host. Names of pods and nodes may appear some seconds after their processes."""
    end = time.monotonic() + seconds
    while True:
        try:
            return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"the coordinator's host {host!r} has no address here ({error.strerror or error}): correct "
                    "--coordinator (MG3D_COORDINATOR), or give its number, such as 10.0.0.1:8476"
                ) from error
            time.sleep(min(1.0, seconds / 3))


def free_address(host: str, port: int, addresses: list[str]) -> str:
    """Where process 0 listens: on the interface that `host` names, or on all where the others know it by another address.

    A name that means this host alone here (Debian has its own name at 127.0.1.1) may mean another interface elsewhere.
    """
    only_here = all(ipaddress.ip_address(address).is_loopback for address in addresses)
    named = host == "localhost" or host in addresses
    candidates = [addresses[0]] if named or not only_here else []
    end = time.monotonic() + PORT_SECONDS
    for address in [*candidates, ""]:
        while (problem := _cannot_listen(address, port)) == errno.EADDRINUSE:
            if time.monotonic() > end:
                raise UserError(
                    f"port {port} of {host} is in use by another program, or by a run before that has not ended: stop it, "
                    "or choose another port in --coordinator (MG3D_COORDINATOR), the same for all processes"
                )
            time.sleep(0.2)
        if problem is None:
            return f"[{address or '::'}]:{port}" if ":" in (address or "::") else f"{address}:{port}"
    raise UserError(f"nothing can listen on port {port} of {host} ({os.strerror(problem or 0)}): choose another one")


def _cannot_listen(address: str, port: int) -> int | None:
    """The number of the error, None if it can. Without SO_REUSEPORT, by which two coordinators would share a port."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((address, port))
            one.listen(1)
        except OSError as error:
            return error.errno
    return None


def wait_for_coordinator(number: int, host: str, port: int, seconds: float) -> None:
    """Until somebody listens there. `TryAgainError` after so many seconds."""
    began, said = time.monotonic(), SAY_AFTER
    while True:
        try:
            socket.create_connection((host, port), timeout=min(5.0, seconds)).close()
            return
        except OSError as error:
            waited, why = time.monotonic() - began, error.strerror or str(error)
        if waited > seconds:
            raise TryAgainError(
                f"process {number} waited {waited:.0f} s for process 0 at {host}:{port} in vain ({why}): has it ended, or may "
                f"this host not reach that port? {TIMEOUT_VARIABLE} says how long to wait"
            )
        if waited > said:
            said = waited + SAY_EVERY
            logger.info("process %d waits for process 0 at %s:%d (%s), %.0f s so far", number, host, port, why, waited)
        time.sleep(min(0.5, seconds / 10))


@contextmanager
def without_proxies() -> Iterator[None]:
    """gRPC would ask the proxy of a company for a host of its own cluster, for minutes."""
    names = [name for name in os.environ if name.lower() in PROXIES]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def awaited(whom: str, seconds: float) -> Iterator[None]:
    """Says for whom the block waits, and ends the process with `AGAIN` when that takes so many seconds."""
    over, end = threading.Event(), time.monotonic() + seconds

    def say() -> None:
        wait = min(SAY_AFTER, seconds)
        while not over.wait(wait):
            if (left := end - time.monotonic()) <= 0:
                logger.error(
                    "waited %.0f s for %s in vain: not all processes run; start all of them again", seconds, whom
                )
                go(AGAIN)
            logger.info("waiting for %s, for %.0f s at most", whom, left)
            wait = min(SAY_EVERY, left)

    threading.Thread(target=say, name="joining", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def ends_with_code(code: int) -> None:
    """When JAX's client ends this process because the coordinator is gone (it aborts, from a thread of its own), one line
    says so and the exit code is `code`, not that of a crash."""

    def aborted(_: int) -> None:
        with suppress(OSError):
            os.write(2, b"mg3d: the coordinator or another process of this run has ended; run all of them again\n")
        os._exit(code)

    _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted))
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _kept[-1])


def watch_others() -> None:
    """From here on this process ends within seconds of another one that says, by `leave`, that it has failed."""

    def watch() -> None:
        while (text := _left()) is None:
            time.sleep(WATCH_SECONDS)
        host, number, code, what = json.loads(text)
        time.sleep(2 * WATCH_SECONDS)  # it may be an end that all come to, each with its own words
        logger.error("process %d on %s has ended: %s", number, host, what)
        go(code if code in (2, AGAIN) else AGAIN)

    threading.Thread(target=watch, name="others", daemon=True).start()


def leave(code: int, what: str) -> None:
    """This program has failed, by `what`: the others are told, and at its end it goes at once. JAX would wait minutes for
    the others, and they for this one."""
    with suppress(Exception):
        known = [socket.gethostname(), jax.process_index(), code, what]
        _client().key_value_set(LEFT, json.dumps(known), allow_overwrite=True)
        if jax.process_index() == 0:
            time.sleep(4 * WATCH_SECONDS)  # what it said goes with it
    atexit.register(go, code)


def _client() -> Any:
    return distributed.global_state.client


def _left() -> str | None:
    """What a process said when it left; None where all are there."""
    try:
        return str(_client().key_value_try_get(LEFT))
    except Exception:  # not found
        return None


def go(code: int) -> None:
    """Ends this process now, with this exit code."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
