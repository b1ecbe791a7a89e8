"""The mesh, the rule table, and the way from host rows to a global batch."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from support import random_batch, tiny_config

from mg3d_jax import batch as batch_contract
from mg3d_jax import sharding
from mg3d_jax.errors import UserError
from mg3d_jax.training import state as state_lib


def mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor}))


def test_one_size_is_inferred():
    assert dict(mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1)])
def test_a_mesh_that_does_not_fit_is_an_error(sizes):
    with pytest.raises(UserError, match="8 device"):
        mesh(*sizes)


def test_global_batch_keeps_rows_and_is_sharded():
    config = tiny_config()
    host = random_batch(config)
    placed = sharding.to_global(host, mesh(2, 2, 2), config.data.batch_size)
    for name, array in placed.items():
        np.testing.assert_array_equal(jax.device_get(array), host[name])
        assert array.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert placed["volume"].addressable_shards[0].data.shape[0] == 2


def test_batch_contract_catches_wrong_batches():
    host = random_batch(tiny_config())
    batch_contract.check(host)
    with pytest.raises(ValueError, match="lacks"):
        batch_contract.check({k: v for k, v in host.items() if k != "valid"})
    with pytest.raises(ValueError, match="volume"):
        batch_contract.check(host | {"volume": host["volume"].astype(np.float32)})


def test_unknown_logical_names_are_errors():
    with pytest.raises(ValueError, match="embd"):
        sharding.check_names(["batch", None, "embd"])


def test_parameters_and_moments_follow_the_rules():
    setup = state_lib.build(tiny_config(), 400, mesh(2, 2, 2), steps=3)
    params = setup.abstract["params"]
    block = params["volume_encoder"]["stack"]["blocks"]["block"]
    assert block["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert block["attention"]["query"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert params["report_encoder"]["word_embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")
    state = state_lib.initialize(setup)
    moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.ndim]
    by_shape = {(x.shape, x.sharding.spec) for x in jax.tree.leaves(state["params"])}
    assert moments and all((m.shape, m.sharding.spec) in by_shape for m in moments)


def test_a_dimension_that_the_mesh_does_not_divide_stays_whole():
    setup = state_lib.build(tiny_config(), 401, mesh(2, 2, 2), steps=3)
    assert setup.abstract["params"]["report_encoder"]["word_embedding"].sharding.spec == PartitionSpec(None, "fsdp")
