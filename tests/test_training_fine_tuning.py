"""Fine-tuning of the volume encoder: layer-wise decay against factors written by hand, and classification losses against
PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_config

from mg3d_jax import sharding
from mg3d_jax.config import checks
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.errors import UserError
from mg3d_jax.tasks.classification import CLASSIFICATION, ClassificationOptions
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.optimizer import parameter_names

VIT = {  # nano: four layers
    "patch_embedding/kernel": 0.5**5,
    "patch_embedding/bias": 0.5**5,
    "positions": 0.5**5,
    "stack/blocks/block/mlp/up/kernel": [0.5**4, 0.5**3, 0.5**2, 0.5],
    "stack/blocks/block/mlp/up/bias": [0.5**4, 0.5**3, 0.5**2, 0.5],
    "norm/scale": 1.0,
    "pool/query": 1.0,
}
SWIN = {  # swin-nano: a first stage of two blocks, a second of one
    "patch_embedding/kernel": 0.5**4,
    "stage_0_block_0/mlp/up/kernel": 0.5**3,
    "stage_0_block_1/attention/position_bias": 0.5**2,
    "merging_0/reduction/kernel": 0.5**2,
    "stage_1_block_0/mlp/up/kernel": 0.5,
    "merging_1/reduction/kernel": 0.5,
    "pool/query": 1.0,
}


def factors_of(config):
    setup = state_lib.build(config, 400, sharding.make_mesh(config.mesh, jax.devices()[:1]), steps=3)
    names = jax.tree.leaves(parameter_names(setup.factors))
    return dict(zip(names, jax.tree.leaves(setup.factors), strict=True)), setup


def test_layer_wise_decay_of_a_vit():
    rows = {"optimizer__layer_decay": 0.5, "model__volume_encoder__positions": "learned"}
    found, setup = factors_of(tiny_config(**rows, tasks__classification__weight=1.0))
    for name, expected in VIT.items():
        np.testing.assert_array_equal(np.ravel(found[f"volume_encoder/{name}"]), expected, err_msg=name)
    assert found["report_encoder/word_embedding"] == 0.5**3  # its nano has two layers
    assert found["classification_head/kernel"] == found["volume_projection/out/kernel"] == found["logit_scale"] == 1.0
    assert set(setup.groups) == {"x1"}


def test_layer_wise_decay_of_a_swin():
    encoder = {"kind": "swin", "preset": "swin-nano", "patch_size": (16, 16, 16)}
    rows = {f"model__volume_encoder__{key}": value for key, value in encoder.items()}
    found, _ = factors_of(tiny_config(**rows, optimizer__layer_decay=0.5))
    for name, expected in SWIN.items():
        assert found[f"volume_encoder/{name}"] == expected, name


def test_layer_wise_decay_multiplies_what_the_tables_and_freezing_say():
    rows = (("volume_encoder/.*", 2.0), (".*", 1.0))
    found, _ = factors_of(
        tiny_config(
            optimizer__layer_decay=0.5,
            optimizer__learning_rate_multipliers=rows,
            model__volume_encoder__frozen_layers=1,
            model__report_encoder__frozen_layers=-1,
        )
    )
    kernel = np.ravel(found["volume_encoder/stack/blocks/block/mlp/up/kernel"])
    np.testing.assert_array_equal(kernel, [0, 2 * 0.5**3, 2 * 0.5**2, 2 * 0.5])
    assert found["volume_encoder/patch_embedding/kernel"] == 0 and found["volume_encoder/norm/scale"] == 2
    assert not any(np.any(factor) for name, factor in found.items() if name.startswith("report_encoder"))


def test_without_decay_factors_are_plain():
    assert set(factors_of(tiny_config())[0].values()) == {1.0}


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_decay_out_of_range(value):
    with pytest.raises(UserError, match=r"optimizer\.layer_decay"):
        checks.validate(tiny_config(optimizer__layer_decay=value))


def test_multi_class_loss_is_that_of_pytorch():
    """Rows without one class, and padding, do not count, even where their logits are not numbers."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, classes = rng.normal(size=(8, 4)).astype("f"), rng.integers(0, 4, 8)
    labels = np.eye(4, dtype=np.int8)[classes]
    labels[1], labels[2, :], labels[3] = 0, 1, np.where(labels[3] == 1, 1, -1)
    valid = np.arange(8) != 7
    logits[7] = np.nan
    counted = np.array([0, 3, 4, 5, 6])
    batch = {"labels": jnp.asarray(labels), "valid": jnp.asarray(valid)}

    options = ClassificationOptions(weight=1.0, num_labels=4, kind="multi_class")

    def loss(x):
        return CLASSIFICATION.loss({"classification_logits": x}, batch, options)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    theirs = torch.tensor(logits[counted], requires_grad=True)
    expected = torch.nn.functional.cross_entropy(theirs, torch.tensor(classes[counted]))
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(grads[counted], theirs.grad, rtol=1e-5, atol=1e-7)
    assert not np.any(grads[np.setdiff1d(np.arange(8), counted)])
    assert float(metrics["known"]) == 5
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(logits[counted].argmax(1) == classes[counted]))


def test_options_of_a_multi_class_head():
    checks.validate(tiny_config(tasks__classification__weight=1.0, tasks__classification__kind="multi_class"))
    for key, value, says in (
        ("kind", "regression", "choose one of multi_label, multi_class"),
        ("num_labels", 1, "must be at least 2"),
        ("positive_weight", 2.0, "means nothing with kind = 'multi_class'"),
    ):
        rows = {"tasks__classification__weight": 1.0, "tasks__classification__kind": "multi_class"}
        with pytest.raises(UserError, match=says):
            checks.validate(tiny_config(**rows | {f"tasks__classification__{key}": value}))


def test_balanced_losses_weigh_every_class_the_same():
    """Against means by class, written out: each class that the batch has counts once."""
    rng = np.random.default_rng(0)
    logits, classes = rng.normal(size=(12, 4)), np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2])  # no volume of class 3
    labels, valid = np.eye(4, dtype=np.int8)[classes], np.arange(12) != 6
    batch = {"labels": jnp.asarray(labels), "valid": jnp.asarray(valid)}
    features = {"classification_logits": jnp.asarray(logits, jnp.float32)}

    def balanced(**options):
        return float(CLASSIFICATION.loss(features, batch, ClassificationOptions(1.0, 4, balance=True, **options))[0])

    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(12), classes]
    expected = np.mean([losses[valid & (classes == one)].mean() for one in range(3)])
    assert balanced(kind="multi_class") == pytest.approx(expected, rel=1e-5)
    by_label = []
    for column in range(4):
        rows = [np.logaddexp(0, -s * logits[valid & (labels[:, column] == v), column]) for v, s in ((1, 1), (0, -1))]
        by_label.append(np.mean([part.mean() for part in rows if len(part)]))
    assert balanced() == pytest.approx(np.mean(by_label), rel=1e-5)
    with pytest.raises(UserError, match="balance or a positive_weight, not both"):
        options = {"weight": 1.0, "balance": True, "positive_weight": 2.0}
        checks.validate(tiny_config(**{f"tasks__classification__{key}": value for key, value in options.items()}))


def test_shares_of_the_patients_are_nested(tiny_data):
    folders = (tiny_data["train"],)
    names = [
        [data.read(index).patient for index in range(len(data))]
        for data in (PreparedData(folders, percent=percent) for percent in (1, 25, 50))
    ]
    assert [len(set(one)) for one in names] == [1, 6, 12]
    assert names[1] == names[2][: len(names[1])] and names[0] == names[1][: len(names[0])]
    for value, other in ((-1.0, 0), (101.0, 0), (10.0, 5)):
        with pytest.raises(UserError, match=r"data\.patients_percent"):
            checks.validate(tiny_config(data__patients_percent=value, data__max_patients=other))
