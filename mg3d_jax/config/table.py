"""The table of all keys in `docs/configuration.md`, made from the declarations: `python -m mg3d_jax.config.table`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mg3d_jax import options as options_lib
from mg3d_jax.config.parts import DECLARED, Config, ReportEncoderConfig, VolumeEncoderConfig, options_of
from mg3d_jax.options import Group

_HEAD = """\
# Every key of a configuration

Made from the declarations in the code by `python -m mg3d_jax.config.table > docs/configuration.md`; a test compares the two.
Override any of them on the command line with `--config.KEY=VALUE`. Keys marked with * may differ between a run and its
resume.
"""


def markdown() -> str:
    """The whole page."""
    lines = [_HEAD]
    for title, rows in _sections():
        lines += [f"\n## {title}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key}`{star} | {kind} | `{default}` | {meaning} |" for key, kind, default, meaning, star in rows]
    return "\n".join(lines) + "\n"


Row = tuple[str, str, str, str, str]


def _sections() -> Iterator[tuple[str, list[Row]]]:
    top = [field for field in dataclasses.fields(Config) if not dataclasses.is_dataclass(_type(Config, field.name))]
    yield "The run", [_row(field.name, _type(Config, field.name), field) for field in top if field.name not in DECLARED]
    for field in dataclasses.fields(Config):
        kind = _type(Config, field.name)
        if field.name in DECLARED:
            free = field.metadata["resume_free"]
            for name, item in DECLARED[field.name].items():
                yield f"`{field.name}.{name}`", _rows(options_of(item), f"{field.name}.{name}.", free=free)
        elif dataclasses.is_dataclass(kind):
            yield f"`{field.name}`", _rows(kind, f"{field.name}.")
            if field.name == "model":
                for encoder in (VolumeEncoderConfig, ReportEncoderConfig):
                    yield from _tower_sections(encoder)


def _tower_sections(encoder: type[VolumeEncoderConfig] | type[ReportEncoderConfig]) -> Iterator[tuple[str, list[Row]]]:
    name = "volume_encoder" if encoder is VolumeEncoderConfig else "report_encoder"
    for kind, tower in encoder.towers().items():
        if rows := _rows(options_of(tower), f"model.{name}."):
            yield f'`model.{name}` of kind "{kind}"', rows


def _rows(kind: Any, prefix: str, *, free: bool = False) -> list[Row]:
    return [_row(key, wanted, field, free=free) for key, wanted, field in options_lib.walk(kind, prefix)]


def _row(key: str, wanted: Any, field: dataclasses.Field[Any], *, free: bool = False) -> Row:
    meaning = field.metadata["meaning"].replace("|", "\\|")
    name = wanted.__name__ if isinstance(wanted, type) and wanted.__name__ != "tuple" else str(wanted)
    star = "*" if free or field.metadata["resume_free"] else ""
    return key, name.replace("typing.", ""), repr(field.default).replace("|", "\\|"), meaning, star


def _type(kind: type, name: str) -> Any:
    found = options_lib.types_of(kind)[name]
    return None if found is Group else found


if __name__ == "__main__":
    print(markdown(), end="")
