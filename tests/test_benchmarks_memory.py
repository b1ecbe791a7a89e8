"""`mg3d bench memory`: what the compiler plans for batch after batch, and which of them fit."""

import json

import pytest
from support import ROOT

from mg3d_jax.benchmarks import memory
from mg3d_jax.errors import UserError

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from support import tiny_builder, with_plain_towers

def get_config(arg=""):
    return with_plain_towers(tiny_builder())
"""


def test_more_patients_take_more_and_nothing_is_run(tmp_path, capsys):
    config, out = tmp_path / "tiny.py", tmp_path / "memory.json"
    config.write_text(CONFIG.format(tests=str(ROOT / "tests")))
    words = ["--config", str(config), "--batch", "8", "2", "--gib", "0.000001", "16", "--json", str(out)]
    assert memory.main(words) == 0
    sizes = json.loads(out.read_text())["bytes"]
    assert list(sizes) == ["2", "8"]
    assert sizes["8"]["state"] - sizes["2"]["state"] >= 6 * 16**3 * 2  # six more volumes of int16
    assert sizes["8"]["temporaries"] > sizes["2"]["temporaries"] > 0
    text = capsys.readouterr().out
    assert "16 GiB, 8% kept free: 8 patients or more" in text and "1e-06 GiB, 8% kept free: none of these" in text


def test_the_largest_batch_that_fits():
    gib = memory.GIB
    sizes = {1: {"state": gib, "temporaries": gib}, 2: {"state": gib, "temporaries": 3 * gib}}
    assert [memory.largest(sizes, one) for one in (2, 2.2, 4.3, 4.4)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--devices", "99"), "there are 8"),
        (("--batch", "0"), "at least 1"),
        (("--topology", "no-such-chip:1x1"), "such as v5e:2x2"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, words, message):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.format(tests=str(ROOT / "tests")))
    with pytest.raises(UserError, match=message):
        memory.main(["--config", str(config), *words])
