"""A report decoder that reads findings: what it is told in training, that it heeds it, that it writes by what a head finds."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import quick_variables, tiny_builder

from mg3d_jax import config as config_lib
from mg3d_jax.batch import UNKNOWN_LABEL
from mg3d_jax.config import checks
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.errors import UserError
from mg3d_jax.models.report_decoder import ReportDecoder
from mg3d_jax.objectives.base import Context
from mg3d_jax.options import Group
from mg3d_jax.tasks.generation import GenerationOptions, data_problems, draw
from mg3d_jax.training import state as state_lib

LABELS = np.random.default_rng(0).integers(-1, 2, (400, 18)).astype(np.int8)
BATCH = {"labels": jnp.asarray(LABELS), "record_index": jnp.arange(400)}


def told(train, **options):
    config = config_lib.typed(tiny_builder())
    context = Context(config.data, config.model, 100, Group({}), train=train)
    return draw(jax.random.key(0), BATCH, GenerationOptions(**options), context)


def test_in_training_some_labels_are_hidden():
    found = np.asarray(told(True, findings=True, hidden_findings=0.25)["findings"])
    known = LABELS != UNKNOWN_LABEL
    hidden = known & (found == UNKNOWN_LABEL)
    assert hidden.sum() / known.sum() == pytest.approx(0.25, abs=0.02)
    np.testing.assert_array_equal(found[~hidden], LABELS[~hidden])
    # A record's are its own, whatever the batch.
    context = Context(*[getattr(config_lib.typed(tiny_builder()), n) for n in ("data", "model")], 100, Group({}), True)
    half = {name: array[200:] for name, array in BATCH.items()}
    again = draw(jax.random.key(0), half, GenerationOptions(findings=True, hidden_findings=0.25), context)["findings"]
    np.testing.assert_array_equal(again, found[200:])


def test_elsewhere_none_is_hidden_and_without_the_option_none_is_told():
    np.testing.assert_array_equal(told(False, findings=True)["findings"], LABELS)
    np.testing.assert_array_equal(told(True, findings=True, hidden_findings=0.0)["findings"], LABELS)
    assert told(True) == {}


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"weight": 1.0, "kind": "multi_class"}])
def test_without_a_head_that_finds_them_it_is_refused(options):
    config = tiny_builder(tasks__generation__weight=1.0, tasks__generation__hidden_findings=1.0)
    config.tasks.generation.findings = True
    config.tasks.classification.update(options)
    with pytest.raises(UserError, match="needs a head that finds them") as error:
        checks.validate(config_lib.typed(config))
    assert "hidden_findings = 1.0: from 0 to below 1" in str(error.value)


def test_records_without_labels_are_refused(tiny_data):
    data = PreparedData((tiny_data["train"],))
    assert not data_problems(GenerationOptions(findings=True), data)
    unlabelled = SimpleNamespace(label_names=(), readers=data.readers)
    (problem,) = data_problems(GenerationOptions(findings=True), unlabelled)
    assert str(tiny_data["train"]) in problem and "tasks.generation.findings=False" in problem
    assert not data_problems(GenerationOptions(), unlabelled)


@pytest.fixture(scope="module")
def decoder():
    module = ReportDecoder(vocab_size=12, max_tokens=5, width=32, depth=1, num_heads=2, num_findings=3)
    ids, volume = jnp.zeros((8, 5), jnp.int32), jnp.ones((8, 2, 6))
    return module, quick_variables(module, ids, volume, jnp.zeros((8, 3), jnp.int8)), volume


def test_token_by_token_is_all_at_once(decoder):
    module, variables, volume = decoder
    table = variables["params"]["finding_embedding"]
    variables = {"params": variables["params"] | {"finding_embedding": 20 * table}}
    ids = jax.random.randint(jax.random.key(0), (8, 5), 0, 12)
    findings = jax.random.randint(jax.random.key(1), (8, 3), -1, 2)
    whole = module.apply(variables, ids, volume, findings)
    cache = module.apply(variables, volume, 1, 5, findings, method="start")
    for place in range(5):
        logits, cache = module.apply(variables, ids[:, place, None], place, cache, method="step")
        np.testing.assert_allclose(logits[:, 0], whole[:, place], atol=1e-5)
    for row in range(8):  # what is unknown adds nothing
        unknown = module.apply(variables, ids, volume, jnp.full((8, 3), UNKNOWN_LABEL))
        same = np.allclose(unknown[row], whole[row], atol=1e-6)
        assert same == bool((findings[row] == UNKNOWN_LABEL).all())


def test_it_learns_to_state_what_it_is_told(decoder):
    """The volumes are all the same: only the findings say which of two words stands for each."""
    module, variables, volume = decoder
    findings = jnp.asarray(list(itertools.product((0, 1), repeat=3)))
    texts = jnp.concatenate([jnp.zeros((8, 1), jnp.int32), 1 + 2 * jnp.arange(3) + findings, jnp.full((8, 1), 7)], 1)

    def loss(variables, findings):
        logits = module.apply(variables, texts[:, :-1], volume, findings)
        return optax.softmax_cross_entropy_with_integer_labels(logits, texts[:, 1:]).mean()

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(carry, _):
        variables, state = carry
        updates, state = optimizer.update(jax.grad(loss)(variables, findings), state)
        return (optax.apply_updates(variables, updates), state), None

    (learned, _), _ = jax.lax.scan(step, (variables, optimizer.init(variables)), length=150)
    assert loss(learned, findings) < 0.02
    assert loss(learned, jnp.full((8, 3), UNKNOWN_LABEL)) > 0.4  # three of the four words are one of two: 0.52 at best


def test_it_writes_by_what_the_head_finds():
    config = tiny_builder(
        tasks__generation__weight=1.0, tasks__generation__findings=True, objectives__alignment__weight=0.0
    )
    config.tasks.classification.update({"weight": 1.0, "num_labels": 4})
    config.model.report_decoder.update({"width": 16, "depth": 1, "num_heads": 2})
    model = state_lib.build_model(config_lib.typed(config), 100)
    typed = config_lib.typed(config)
    windowed = jax.random.normal(jax.random.key(0), (3, *typed.model.volume_size, len(typed.data.windows)))
    text = {"token_ids": jnp.zeros((3, typed.data.max_tokens), jnp.int32)}
    report = text | {"token_mask": text["token_ids"] == 0, "sentence_index": text["token_ids"]}
    inputs = {"volume": windowed, "report": report, "findings": jnp.zeros((3, 4), jnp.int8)}
    params = quick_variables(model, inputs)["params"]
    params["classification_head"] = {
        "kernel": jax.random.normal(jax.random.key(1), params["classification_head"]["kernel"].shape),
        "bias": jnp.zeros(4),
    }
    (pooled,) = model.apply({"params": params}, {"volume": windowed}, ("volume_pooled",), method="compute").values()
    found = pooled @ params["classification_head"]["kernel"] > 0
    assert found.any() and not found.all()
    cache = model.apply({"params": params}, windowed, 2, 5, method="start_report")
    table = params["report_decoder"]["finding_embedding"]
    np.testing.assert_allclose(cache["findings"][:, 0], found @ table[:4] + ~found @ table[4:], atol=1e-5)
