"""Stands in for `mg3d train` in tests of sweeps: writes the same files, resumes by the step, trains nothing.

Usage: fake_trainer.py --workdir DIR --outcome JSON. The outcome holds the summary to end with, the number of steps, the
seconds per step, and what goes wrong: `fail` (exit code 3 at the half, once), `broken` (exit code 3 at the start),
`again` (exit code 75 at the half, once), `stuck` (exit code 75 at the start), `silent` (ends without a summary). `beside` names
a folder whose run it waits for to start. SIGTERM saves and exits with 75, and the folder is locked, as with the real one.
"""

import argparse
import fcntl
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--outcome", type=json.loads, required=True)
    args = parser.parse_args()
    outcome, checkpoint = args.outcome, args.workdir / "checkpoint"
    stopped = []
    args.workdir.mkdir(parents=True, exist_ok=True)
    lock = (args.workdir / "run.lock").open("a+")
    if "MG3D_LOCK_DESCRIPTOR" not in os.environ:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("it is being trained already", flush=True)
            return 2
    lock.truncate(0)
    lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    lock.flush()
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    alone = (args.workdir / "alone").open("a")  # whatever the locks say: never two at a time
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (args.workdir / "clash").touch()
        return 9
    with (args.workdir / "starts").open("a") as file:
        file.write(f"{first}\n")
    if outcome.get("broken") or outcome.get("stuck"):
        print("ValueError: the loss is nan", flush=True)
        return 3 if outcome.get("broken") else 75
    while not stopped and outcome.get("beside") and not (Path(outcome["beside"]) / "starts").exists():
        time.sleep(0.01)
    for step in range(first + 1, outcome["steps"] + 1):
        time.sleep(outcome["seconds"])
        with (args.workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "split": "train", "loss": 1.0 / step}) + "\n")
        partial = checkpoint.with_suffix(".partial")
        partial.write_text(str(step))
        os.replace(partial, checkpoint)
        if stopped:
            return 75
        if step == outcome["steps"] // 2 and (outcome.get("fail") or (outcome.get("again") and first == 0)):
            print("ValueError: the loss is nan", flush=True)
            return 3 if outcome.get("fail") else 75
    with (args.workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": outcome["steps"], "split": "valid", **outcome["valid"]}) + "\n")
    if not outcome.get("silent"):
        (args.workdir / "summary.json").write_text(json.dumps(outcome["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
