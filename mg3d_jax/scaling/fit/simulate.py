"""How often intervals cover the truth, warnings are false and mis-tuned sizes are found: simulated sweeps of known laws.

    python -m mg3d_jax.scaling.fit.simulate --simulations 300 --draws 300 --first 1000

prints a row per design. The test suite runs a small form of it. `--noiseless 1000` looks for laws without noise instead
(`noiseless.py`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np

from mg3d_jax.progress import track
from mg3d_jax.scaling.fit import noiseless, outputs
from mg3d_jax.scaling.fit.laws import ND, SHARPNESS, Law, with_chance
from mg3d_jax.scaling.fit.table import Row

TRUTH = Law.of(ND, E=1.0, A=1.5 * 1e7**0.4, B=1.2 * 1e4**0.35, alpha=0.4, beta=0.35)


@dataclass(frozen=True)
class Design:
    """A grid of `sizes` x `data` x `seeds` runs; `run`, `cell`, `subset`: standard deviations of the log loss.

    Every seed draws its own data subset; `told`: the fit is told which. `mistuned`: log loss added to the runs of the largest
    size. `chance`: the loss of guessing, to which the law turns with the sharpness 3; 0: none.
    """

    name: str
    sizes: int = 4
    data: int = 4
    seeds: int = 2
    run: float = 0.003
    cell: float = 0.0
    subset: float = 0.0
    mistuned: float = 0.0
    told: bool = True
    chance: float = 0.0

    @property
    def truth(self) -> Law:
        return Law.of(with_chance(ND, self.chance), **TRUTH.as_dict(), **({SHARPNESS: 3.0} if self.chance else {}))

    def rows(self, seed: int, truth: Law | None = None) -> list[Row]:
        """The runs of one simulated sweep, of `truth` or the design's own."""
        truth = truth or self.truth
        rng = np.random.default_rng([seed, 5])
        n, d = np.geomspace(1e6, 1e8, self.sizes), np.geomspace(1e3, 1e5, self.data)
        i, j, s = (v.ravel() for v in np.indices((self.sizes, self.data, self.seeds)))
        noise = self.run * rng.normal(size=len(i)) + self.cell * rng.normal(size=(self.sizes, self.data))[i, j]
        noise += self.subset * rng.normal(size=(self.data, self.seeds))[j, s] + self.mistuned * (i == self.sizes - 1)
        loss = truth(n[i], d[j]) * np.exp(noise)
        return [
            Row(
                f"size {a}, data {b}, seed {c}", {"N": n[a], "D": d[b]}, float(loss[k]),
                subset=f"{b} {c}" if self.told else None,
            )
            for k, (a, b, c) in enumerate(zip(i, j, s, strict=True))
        ]  # fmt: skip


DESIGNS = (
    Design("independent noise"),
    Design("noise shared by cell", cell=0.004),
    Design("noise shared by subset", subset=0.005),
    Design("shared by cell and subset", run=0.002, cell=0.003, subset=0.004),
    Design("5 x 5 x 2", sizes=5, data=5, subset=0.004),
    Design("5 x 5, one seed", sizes=5, data=5, seeds=1),  # one subset of each data amount: no interval
    Design("5 x 5, one seed, a table", sizes=5, data=5, seeds=1, told=False),
    Design("near chance", run=0.02, chance=4.852),
    Design("largest size 2 % off", mistuned=0.02),
    Design("5 x 5, largest size 2 % off", sizes=5, data=5, seeds=1, mistuned=0.02),
)


@dataclass(frozen=True)
class Summary:
    """Shares of the simulations. `coverage`: of nominal 90 % intervals, of each parameter and of a prediction."""

    design: Design
    simulations: int
    intervals: int  # simulations that gave intervals
    coverage: dict[str, float]
    warned: float


def simulate(design: Design, simulations: int, draws: int, *, first: int = 0) -> Summary:
    """Fits simulated sweeps of `design`. The prediction is at 10 times the largest N and D."""
    truth = design.truth
    hits = dict.fromkeys((*truth.form.parameters, "prediction"), 0)
    given = warned = 0
    point = {"N": np.array([1e9]), "D": np.array([1e6])}
    for seed in track(range(first, first + simulations), design.name, simulations, unit="sweeps"):
        result = outputs.fit_rows(design.rows(seed), outputs.Options(truth.form, draws=draws, seed=seed))
        warned += any(warning.startswith("lack of fit") for warning in result.fit.warnings)
        if result.drawn is None:
            continue
        given += 1
        for name in truth.form.parameters:
            low, high = result.drawn.interval(name, 90)
            hits[name] += low <= truth[name] <= high
        low, high = (float(end[0]) for end in result.drawn.band(point, 90))
        hits["prediction"] += low <= float(truth(1e9, 1e6)) <= high
    return Summary(
        design, simulations, given, {name: count / max(given, 1) for name, count in hits.items()}, warned / simulations
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=300)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="seed of the first simulation; the others follow")
    parser.add_argument("--design", action="append", help="a name of the table; may be repeated (default: all)")
    parser.add_argument("--noiseless", type=int, metavar="LAWS", help="instead: tables without noise of so many laws")
    args = parser.parse_args(argv)
    if args.noiseless:
        sys.stdout.write("\n".join(noiseless.search(args.noiseless, first=args.first).lines()) + "\n")
        return 0
    chosen = [design for design in DESIGNS if not args.design or design.name in args.design]
    head = ["design", *ND.parameters, "prediction", "intervals", "lack of fit said"]
    sys.stdout.write(f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n")
    for design in chosen:
        found = simulate(design, args.simulations, args.draws, first=args.first)
        # A law that the runs do not follow has no truth to cover.
        shown = found.intervals and not design.mistuned
        cells = [
            design.name,
            *(f"{found.coverage[name]:.3f}" if shown else "" for name in (*ND.parameters, "prediction")),
        ]
        cells += [f"{found.intervals / found.simulations:.2f}", f"{found.warned:.3f}"]
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
