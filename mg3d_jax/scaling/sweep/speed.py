"""How fast runs train: as measured by the finished runs of a sweep, or as expected of a device that is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mg3d_jax.devices import PEAK_BFLOAT16, known_peak
from mg3d_jax.errors import UserError


@dataclass(frozen=True)
class Speed:
    """Training speed in FLOP/s, and where the figures come from.

    Args:
        run: of a run on all of its devices.
        device: of one of them; None where finished runs do not say how many they had.
        devices: that each run has; None where runs differ in it, or do not say.
    """

    run: float
    device: float | None
    devices: int | None
    source: str

    @classmethod
    def of_devices(cls, device: float, devices: int, source: str) -> Speed:
        """Of runs on so many devices of that speed."""
        return cls(device * devices, device, devices, f"{devices} x {source}")

    @classmethod
    def named(cls, device: str, utilisation: float, devices: int) -> Speed:
        """The share of a published peak (`devices.PEAK_BFLOAT16`) that is expected. `UserError` for an unknown name."""
        if (peak := known_peak(device, "bfloat16")) is None:
            raise UserError(f"--device {device}: known are {', '.join(name for name, _ in PEAK_BFLOAT16)}")
        source = f"{device} at {100 * utilisation:g} % of {peak / 1e12:g} TFLOP/s"
        return cls.of_devices(peak * utilisation, devices, source)

    @classmethod
    def measured(cls, records: Sequence[Mapping[str, Any]]) -> Speed | None:
        """Of finished runs by their `record.json`, compilation and evaluation included; None where none says its seconds.

        A run that went on from another one counts the FLOPs and the seconds of both.
        """
        timed = [one for one in records if one["trained_seconds"]]
        if not timed:
            return None
        flops, seconds = (sum(one[key] for one in timed) for key in ("training_flops", "trained_seconds"))
        devices = [one.get("devices") for one in timed]
        device = None
        if all(devices):
            device = flops / sum(one["trained_seconds"] * one["devices"] for one in timed)
        alike = devices[0] if len(set(devices)) == 1 else None
        return cls(flops / seconds, device, alike, f"{len(timed)} finished runs")
