"""The ring of the contrastive and matching losses across two real processes equals one process."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from support import environment, free_port

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
process, port = int(sys.argv[1]), sys.argv[2]
from mg3d_jax.objectives.contrastive import info_nce
from mg3d_jax.objectives.matching import sentence_matching
from mg3d_jax.training import distributed
jax.distributed.initialize(f"localhost:{port}", 2, process)

mesh = jax.make_mesh((2, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
rows, whole = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
arrays = np.load(sys.argv[3])
place = lambda a: jax.make_array_from_callback(a.shape, rows, lambda index: a[index])
x, z, s, mask = (place(arrays[name]) for name in ("x", "z", "s", "mask"))

def loss(x, z, s, mask):
    pooled = jnp.mean(z, axis=1)
    return info_nce(x, pooled, temperature=0.1)[0] + sentence_matching(z, s, mask, block_size=1)[0]

with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(whole, (whole, whole)))
    step = step.lower(x, z, s, mask).compile()
    distributed.barrier("compiled")  # the first collective gives up after half a minute
    value, gradients = jax.block_until_ready(step(x, z, s, mask))
if process == 0:
    print(json.dumps([float(value), *(np.asarray(g).tolist() for g in gradients)]))
jax.distributed.shutdown()
"""


@pytest.mark.processes
def test_two_processes_give_what_one_gives(tmp_path):
    from mg3d_jax.objectives.contrastive import info_nce
    from mg3d_jax.objectives.matching import sentence_matching

    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(8, *shape)).astype(np.float32) for name, shape in (("z", (3, 4)), ("s", (3, 4)))}
    arrays |= {"x": rng.normal(size=(8, 4)).astype(np.float32), "mask": rng.random((8, 3)) < 0.8}
    np.savez(tmp_path / "arrays.npz", **arrays)
    (tmp_path / "program.py").write_text(PROGRAM)
    port = str(free_port())
    command = [sys.executable, str(tmp_path / "program.py")]
    processes = [
        subprocess.Popen(
            [*command, str(number), port, str(tmp_path / "arrays.npz")],
            env=environment(devices=2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    value, *gradients = json.loads(outputs[0][0].splitlines()[-1])

    def loss(x, z):
        matching = sentence_matching(z, arrays["s"], arrays["mask"])[0]
        return info_nce(x, z.mean(axis=1), temperature=0.1)[0] + matching

    expected, expected_gradients = jax.value_and_grad(loss, argnums=(0, 1))(arrays["x"], arrays["z"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
