"""`mg3d report RUN`: writes the page."""

from __future__ import annotations

import argparse
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.base import sections
from mg3d_jax.files import write_text
from mg3d_jax.report.page import render
from mg3d_jax.report.run_files import read_run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mg3d report",
        description="Makes one HTML page of a run, finished or in progress: curves, reconstructed slices, evaluations, "
        "faults, configuration, environment. Everything is in the page; it opens without a network. Overlays of "
        "`mg3d attend --out RUN/attention/NAME` are shown too.",
    )
    parser.add_argument("run", type=Path, help="the --workdir of an `mg3d train`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: RUN/report.html)")
    args = parser.parse_args(argv)
    out = args.out or args.run / "report.html"
    run = read_run(args.run)
    document = render(run, [one for one in sections(run.evaluation) if one.on_terminal])
    try:
        write_text(out, document)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another place with --out FILE") from error
    print(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
