"""`mg3d bench step`: FLOPs through loops against closed forms and `scaling.flops`, the split of a trace, the printed report."""

import json

import jax
import jax.numpy as jnp
import pytest
from support import SPECIAL, tiny_builder

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.benchmarks import op_times
from mg3d_jax.benchmarks import step as bench
from mg3d_jax.benchmarks import step_cases as bench_cases
from mg3d_jax.benchmarks.hlo import Program, size_in_bytes
from mg3d_jax.errors import UserError
from mg3d_jax.training import state as state_lib


def test_every_trip_of_a_loop_counts():
    """7 products [4, 32] x [32, 32] forward, and two for each of them backward; before and after XLA's passes."""

    def loss(weights, x):
        def body(carry, weight):
            with jax.named_scope("layer"):
                return jnp.tanh(carry @ weight), None

        return jax.lax.scan(body, x, weights)[0].sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(jnp.zeros((7, 32, 32)), jnp.zeros((4, 32)))
    compiled = lowered.compile()
    once = 2 * 4 * 32 * 32
    assert compiled.cost_analysis()["flops"] < 7 * once  # why XLA's own figure is not enough
    for text in (compiled.as_text(), lowered.as_text("hlo", debug_info=True)):
        flops = Program.parse(text).matmul_flops()
        assert sum(flops.values()) == 3 * 7 * once
        assert all("layer" in path for path in flops)


def test_convolutions_and_sizes():
    image, kernel = jnp.zeros((2, 8, 8, 8, 3)), jnp.zeros((2, 2, 2, 3, 5))
    axes = ("NXYZC", "XYZIO", "NXYZC")
    convolve = jax.jit(lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2, 2), "VALID", dimension_numbers=axes))
    program = Program.parse(convolve.lower(image, kernel).as_text("hlo", debug_info=True))
    assert sum(program.matmul_flops().values()) == 2 * (2 * 4**3 * 5) * (2**3 * 3)
    assert size_in_bytes("(f32[2,3]{1,0}, bf16[4]{0}, pred[5]{0}, s32[])") == 24 + 8 + 5 + 4


def test_collectives_have_the_bytes_of_their_results():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    total = jax.jit(lambda x: x.sum(axis=0), in_shardings=rows, out_shardings=whole)
    program = Program.parse(total.lower(jnp.zeros((8, 16))).compile().as_text())
    assert program.collectives() == {"all-reduce": (1, 16 * 4)}


def test_inner_operations_are_not_counted_twice():
    events = [(0, 10, "while"), (1, 3, "dot"), (2, 1, ""), (5, 4, "dot"), (12, 2, "add")]
    assert sorted(op_times.own_times(events)) == [("add", 2), ("dot", 2), ("dot", 4), ("while", 3)]


def test_flops_of_the_program_equal_the_analytic_count():
    """All objectives, one of the towers frozen. Traced only."""
    config = tiny_builder(data__vocab_size=300, optimizer__freeze=(bench_cases.FROZEN_REPORT,))
    config_lib.use_objectives(config, "mg3d")
    config.mesh.update(data=1)
    mesh = sharding.make_mesh(config.lock().mesh, jax.devices()[:1])
    setup = state_lib.build(config, 300, mesh, steps=10)
    counted = bench.count_flops(setup, SPECIAL, bench.random_batch(config, 300))
    assert counted["analytic"] == pytest.approx(counted["xla"], rel=0.05)
    parts = {part for _, part in op_times.PARTS} - {"optimizer"}
    assert set(counted["by_part"]) == parts  # the names of the model's modules are still those of the table
    assert sum(counted["by_part"].values()) == pytest.approx(counted["xla"])


@pytest.fixture
def config_file(tmp_path):
    """Alignment only, two layers per tower, all 8 fake devices."""
    path = tmp_path / "tiny.py"
    path.write_text(
        "from support import tiny_config\n"
        "def get_config(arg=''):\n"
        "    return tiny_builder(model__volume_encoder__preset='pico', model__report_encoder__preset='pico',\n"
        "        model__remat='full', objectives__alignment__report_view='report', mesh__data=4, mesh__fsdp=2)\n"
    )
    return str(path)


def test_the_command_on_a_mesh(config_file, tmp_path, capsys):
    out = tmp_path / "step.json"
    assert bench.main(["--config", config_file, "--batch", "8", "--steps", "1", "--json", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    for words in (
        "8 patients on 8 x cpu",
        "volume tower, whole volume",
        "memory of a step",
        "all-reduce",
        "from the configuration",
    ):
        assert words in printed
    spent = result["data_seconds"] + sum(result["phases"].values())
    assert spent == pytest.approx(result["seconds"], rel=0.2)  # medians of one step each
    assert sum(row["seconds"] for row in result["parts"].values()) == pytest.approx(sum(result["phases"].values()))
    assert {"forward", "backward", "optimizer", "collectives"} <= set(result["phases"])
    assert result["collectives"]["all-reduce"][1] > 0
    assert result["flops"]["analytic"] == pytest.approx(result["flops"]["xla"], rel=0.05)
    assert 0 < result["flops"]["recomputed"] < result["flops"]["xla"]
    assert 0 < result["memory"]["reused"] <= result["memory"]["outputs"]


def test_options(config_file):
    args, config = bench.parse(["--case", "mg3d-b", "--report-frozen", "--config.data.max_tokens=128"])
    assert (config.data.max_tokens, config.data.batch_size, config.model.volume_encoder.preset) == (128, 2, "b")
    assert args.steps == 3
    with pytest.raises(UserError, match="not both"):
        bench.parse(["--case", "mg3d-b", "--config", config_file])
    with pytest.raises(UserError, match=r"Did you mean --config\.data\.max_tokens"):
        bench.parse(["--config.data.max_token=128"])
