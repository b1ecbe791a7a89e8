"""`mg3d bench step`: the compiled program, the split of a trace, FLOPs by part of the model, the printed report."""

import json

import jax
import jax.numpy as jnp
import pytest
from support import tiny_builder

from mg3d_jax import config as config_lib
from mg3d_jax import devices
from mg3d_jax.benchmarks import hlo, op_times
from mg3d_jax.benchmarks import step as bench
from mg3d_jax.benchmarks import step_cases as bench_cases
from mg3d_jax.errors import UserError
from mg3d_jax.training.cost import of_config


def test_every_trip_of_a_loop_and_every_path_is_read():
    def loss(weights, x):
        def body(carry, weight):
            with jax.named_scope("layer"):
                return jnp.tanh(carry @ weight), None

        return jax.lax.scan(body, x, weights)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((7, 32, 32)), jnp.zeros((4, 32))).compile()
    found = hlo.instructions(compiled.as_text())
    dots = [one for one in found if one.opcode == "dot"]
    assert sum(one.times for one in dots) == 3 * 7  # forward, for the weights and for the carry
    assert all("layer" in one.path for one in dots)


def test_sizes_in_bytes():
    assert hlo.size_in_bytes("(f32[2,3]{1,0}, bf16[4]{0}, pred[5]{0}, s32[])") == 24 + 8 + 5 + 4


def test_collectives_have_the_bytes_of_their_results():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    total = jax.jit(lambda x: x.sum(axis=0), in_shardings=rows, out_shardings=whole)
    program = hlo.instructions(total.lower(jnp.zeros((8, 16))).compile().as_text())
    assert hlo.collectives(program) == {"all-reduce": (1, 16 * 4)}


def test_inner_operations_are_not_counted_twice():
    events = [(0, 10, "while"), (1, 3, "dot"), (2, 1, ""), (5, 4, "dot"), (12, 2, "add")]
    assert sorted(op_times.own_times(events)) == [("add", 2), ("dot", 2), ("dot", 4), ("while", 3)]


def test_flops_by_part_of_the_model():
    """All objectives, one of the towers frozen. The names of the model's modules are still those of the table."""
    config = tiny_builder(data__vocab_size=300, optimizer__freeze=(bench_cases.FROZEN_REPORT,))
    config_lib.use_objectives(config, "mg3d")
    cost = of_config(config_lib.typed(config), 300)
    counted = bench.count_flops(cost)
    assert set(counted["by_part"]) == {part for _, part in op_times.PARTS} - {"optimizer"}
    assert sum(counted["by_part"].values()) == pytest.approx(counted["model"])
    assert counted["model"] == pytest.approx(cost.training.products * config.data.batch_size)


@pytest.fixture
def config_file(tmp_path):
    """Alignment only, two layers per tower, all 8 fake devices."""
    path = tmp_path / "tiny.py"
    path.write_text(
        "from support import tiny_builder\n"
        "def get_config(arg=''):\n"
        "    return tiny_builder(model__volume_encoder__preset='pico', model__report_encoder__preset='pico',\n"
        "        model__remat='full', objectives__alignment__report_view='report', mesh__data=4, mesh__fsdp=2)\n"
    )
    return str(path)


def test_the_command_on_a_mesh(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(devices, "MEASURED_SIZES", (512,))
    out = tmp_path / "step.json"
    assert bench.main(["--config", config_file, "--batch", "8", "--steps", "1", "--json", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    for words in (
        "8 patients on 8 x cpu",
        "volume tower, whole volume",
        "memory of a step",
        "all-reduce",
        "matrix products of a step",
    ):
        assert words in printed
    spent = result["data_seconds"] + sum(result["phases"].values())
    assert spent == pytest.approx(result["seconds"], rel=0.2)  # medians of one step each
    assert sum(row["seconds"] for row in result["parts"].values()) == pytest.approx(sum(result["phases"].values()))
    assert {"forward", "backward", "optimizer", "collectives"} <= set(result["phases"])
    assert result["collectives"]["all-reduce"][1] > 0
    assert 0 < result["flops"]["recomputed"] < result["flops"]["model"]
    assert 0 < result["memory"]["reused"] <= result["memory"]["outputs"]


def test_options(config_file):
    args, config = bench.parse(["--case", "mg3d-b", "--report-frozen", "--config.data.max_tokens=128"])
    assert (config.data.max_tokens, config.data.batch_size, config.model.volume_encoder.preset) == (128, 2, "b")
    assert args.steps == 3
    with pytest.raises(UserError, match="not both"):
        bench.parse(["--case", "mg3d-b", "--config", config_file])
    with pytest.raises(UserError, match=r"Did you mean --config\.data\.max_tokens"):
        bench.parse(["--config.data.max_token=128"])
