"""Report generation from the loss to the page: a small run writes what it was taught, volume by volume."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax
from support import tiny_builder, with_plain_towers
from test_report_page import Page

from mg3d_jax import config as config_lib
from mg3d_jax.commands.main import main
from mg3d_jax.config import checks
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.bootstrap import PatientDraws
from mg3d_jax.evaluation.embed import Embedder
from mg3d_jax.evaluation.generation import Generation, GenerationEvaluationOptions
from mg3d_jax.evaluation.report_writer import ReportWriter, sampling_of
from mg3d_jax.tasks.generation import GenerationOptions, features, loss
from mg3d_jax.trainer import Trainer
from mg3d_jax.training import inputs
from mg3d_jax.training.restore import restore_run
from mg3d_jax.training.writers import read_metrics

TOKENS = 32  # of a report


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_the_tokens_that_follow(smoothing):
    """A padded report, one without a text, and a row that only pads; what the model says there may be NaN."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 5, 7))
    ids = rng.integers(0, 7, (4, 6))
    mask = np.arange(6) < np.array([6, 4, 2, 5])[:, None]
    sentences = np.where(mask & (np.arange(6) > 0), 1, 0) * np.array([1, 1, 0, 1])[:, None]
    valid = np.array([True, True, True, False])
    logits[2:], logits[1, 3:] = np.nan, np.nan
    report = {"token_ids": ids, "token_mask": mask, "sentence_index": sentences}
    options = GenerationOptions(weight=1.0, label_smoothing=smoothing)
    needed = {"next_token_logits": jnp.asarray(logits), "report": jax.tree.map(jnp.asarray, report)}
    value, metrics = loss(features({}, needed, options), {"valid": jnp.asarray(valid)}, options)
    losses, right = [], []
    for row, length in ((0, 6), (1, 4)):
        for place in range(length - 1):
            log_p, target = log_softmax(logits[row, place]), ids[row, place + 1]
            wanted = np.full(7, smoothing / 7) + (1 - smoothing) * (np.arange(7) == target)
            losses.append(-(wanted * log_p).sum())
            right.append(log_p.argmax() == target)
    assert value == pytest.approx(np.mean(losses), rel=1e-5)
    assert (metrics["tokens"], metrics["token_accuracy"]) == (8, pytest.approx(np.mean(right)))
    empty = {"valid": jnp.zeros(4, bool)}
    assert loss(features({}, needed, options), empty, options)[0] == 0


def test_what_cannot_be_is_said_before():
    config = tiny_builder(tasks__generation__weight=1.0, tasks__generation__label_smoothing=1.0)
    config.model.report_decoder.update({"width": 10, "num_heads": 4})
    config.evaluations.generation.update({"method": "beams", "labeller": "rule", "top_p": 0.0})
    with pytest.raises(UserError) as error:
        checks.validate(config_lib.typed(config))
    for words in (
        "label_smoothing = 1.0",
        "num_heads = 4 does not divide",
        "generation.method",
        "labeller",
        "top_p = 0.0",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["ctrg_generation", "ctrate_generation"])
def test_the_recipes_are_possible(name, old_run):
    for argument in ("", ":small", f":small,{old_run}"):
        config = config_lib.load(f"configs/downstream/{name}.py{argument}", ["--config.data.valid=VALID"])
        checks.validate(config)
        assert config.tasks["generation"].weight == 1.0 and config.evaluations["generation"].every == 0
        assert "report_decoder" in config.optimizer.freeze[0]


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("generation") / "run"
    config = with_plain_towers(tiny_builder(tiny_data["train"], tiny_data["valid"]), "wide")
    for objective in config.objectives.values():
        objective.weight = 0.0
    config.tasks.generation.weight = 1.0
    config.model.report_decoder.update({"width": 64, "depth": 1, "num_heads": 4})
    config.data.max_tokens = TOKENS
    config.training.update({"steps": 2, "log_every": 1, "checkpoint_every": 2, "evaluate_every": 2})
    for name, evaluation in config.evaluations.items():
        evaluation.every = 0 if name == "generation" else -1
    config.evaluations.generation.online_volumes = 4
    assert Trainer(config_lib.typed(config.lock()), folder).run() == 0
    return folder


@pytest.fixture(scope="module")
def restored(run):
    return restore_run(run)


@pytest.fixture(scope="module")
def embedder(restored):
    return Embedder.of_run(restored, 8)


@pytest.fixture(scope="module")
def data(tiny_data):
    return PreparedData((tiny_data["train"],), max_patients=3)


@pytest.fixture(scope="module")
def learned(restored, embedder, data):
    """Parameters that have three patients by heart: Adam on the task's loss, on one device."""
    params, model = jax.device_get(restored.params), restored.setup.model
    texts = [embedder.tokenizer(data.text(row).sentences) for row in range(len(data))]
    report = {name: jnp.stack([text[name] for text in texts]) for name in texts[0]}
    volume = inputs.window(np.stack([data.read(row).volume for row in range(len(data))]), restored.config.data.windows)
    options, optimizer = GenerationOptions(weight=1.0), optax.adam(1e-2)

    def loss_of(params):
        needed = {"volume": volume, "report": report}
        needed = model.apply({"params": params}, needed, ("next_token_logits", "report"), method="compute")
        return loss(features({}, needed, options), {"valid": jnp.ones(len(data), bool)}, options)[0]

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(150):
        params, state, value = step(params, state)
    assert value < 0.05
    return jax.device_put(jax.device_get(params), restored.setup.shardings["params"])


def writer(embedder, **options):
    settings = GenerationEvaluationOptions(**options)
    return ReportWriter(embedder, sampling_of(embedder, settings), settings.seed)


def test_it_writes_the_reports_that_it_learned(embedder, learned, data):
    found = writer(embedder)(learned, data)
    decode = embedder.tokenizer.tokenizer.decode
    for row, text in enumerate(found.texts):
        fields = embedder.tokenizer(data.text(row).sentences)
        true = decode(fields["token_ids"][fields["token_mask"]].tolist(), skip_special_tokens=True)
        assert text.replace(" ", "") == true.replace(" ", "")
        assert found.tokens[row] == fields["token_mask"].sum() - 1
    assert found.ended.all() and found.rows.tolist() == list(range(len(data)))


def test_greedy_on_the_mesh_is_the_uncached_argmax(embedder, restored, learned, tiny_data):
    """Of volumes that it does not know, whose tokens are less sure; record by record, without batches or a cache."""
    data = PreparedData((tiny_data["valid"],))
    found = writer(embedder, max_tokens=12)(learned, data, most=2)
    params, special = jax.device_get(learned), embedder.tokenizer.special
    model, length = restored.setup.model, restored.config.data.max_tokens
    forbidden = [special[name] for name in ("[PAD]", "[CLS]", "[MASK]", "[UNK]")]

    @jax.jit
    def logits(volume, ids):
        report = {"token_ids": ids}
        values = {"volume": inputs.window(volume, restored.config.data.windows), "report": report}
        return model.apply({"params": params}, values, ("next_token_logits",), method="compute")["next_token_logits"]

    for row in range(2):
        ids = np.full((1, length), special["[PAD]"], np.int32)
        ids[0, 0] = special["[CLS]"]
        for place in range(12):
            of_next = np.array(logits(data.read(row).volume[None], ids)[0, place], np.float64)
            of_next[forbidden] = -np.inf
            ids[0, place + 1] = of_next.argmax()
            if ids[0, place + 1] == special["[SEP]"]:
                break
        text = embedder.tokenizer.tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
        assert found.texts[row].replace(" ", "") == text.replace(" ", "")


def test_a_text_belongs_to_its_record_whatever_the_batch(embedder, restored, learned, data):
    options = {"method": "nucleus", "temperature": 3.0, "top_p": 1.0, "max_tokens": 10}
    one = writer(embedder, **options)(learned, data)
    other = writer(Embedder.of_run(restored, 16), **options)(learned, data, most=2)
    assert one.texts[:2] == other.texts and len(set(one.texts)) == len(one.texts) and not one.ended.all()


def test_it_is_measured_while_it_trains(run):
    (row,) = [row for row in read_metrics(run) if "generation/f1_macro" in row and row["split"] == "evaluation"]
    assert row["step"] == 2 and {"generation/bleu_4", "generation/rouge_l", "generation/f1_micro"} <= row.keys()
    assert 1 <= row["generation/tokens"] < TOKENS
    vocabulary = restore_run(run).tokenizer.get_vocab_size()
    assert read_metrics(run, "train")[0]["generation"] == pytest.approx(np.log(vocabulary), rel=0.05)


@pytest.fixture(scope="module")
def evaluated(run, tiny_data):
    command = ["evaluate", "--workdir", str(run), "--data", tiny_data["valid"], "--train-data", tiny_data["train"]]
    assert main([*command, "--only", "generation", "--evaluations.generation.draws=20", "--batch-size", "8"]) == 0
    return run / "evaluation"


def test_the_document_has_the_texts_to_compare_with(evaluated, tiny_data):
    result = json.loads((evaluated / "evaluation.json").read_text())["generation"]
    assert list(result["texts"]) == [
        "written", "template of the labels", "most frequent report", "template of probed labels", "report",
    ]  # fmt: skip
    texts = result["texts"]
    assert texts["template of the labels"]["f1_micro"] == 1.0 and texts["report"]["f1_micro"] > 0.95
    assert "bleu_1" not in texts["report"] and texts["template of the labels"]["bleu_1"] > 0.1
    low, high = texts["written"]["f1_macro_95"]
    assert low <= texts["written"]["f1_macro"] <= high
    flat = json.loads((evaluated / "metrics.json").read_text())
    assert flat["generation/text=greedy/bleu_4"] == texts["written"]["bleu_4"]
    assert (
        flat["generation/text=most_frequent_report/labeller=rules/f1_macro"]
        == texts["most frequent report"]["f1_macro"]
    )
    with np.load(evaluated / "scores.npz") as file:
        arrays = {name.removeprefix("generation/"): file[name] for name in file}
    drawn = Generation.resampled(arrays, PatientDraws(arrays["patients"], 20))
    for name, values in drawn.items():
        assert values[0] == pytest.approx(flat[name], nan_ok=True), name
    assert arrays["hit"].shape == (len(PreparedData((tiny_data["valid"],))), 18)
    rows = list(csv.DictReader((evaluated / "classes.csv").open()))
    assert len(rows) == 18 and {"precision", "recall", "f1", "present", "stated"} <= rows[0].keys()


def test_the_page_shows_slices_beside_both_reports(evaluated, tiny_data):
    page = (evaluated / "evaluation.html").read_text()
    found = Page(page)
    result = json.loads((evaluated / "evaluation.json").read_text())["generation"]
    assert page.count('class="slices"') == len(result["examples"]) == 4
    for one in result["examples"]:
        assert one["volume"] in found.text and one["report"][0] in found.text and one["written"][0] in found.text
    rows = list(csv.DictReader((evaluated / "reports.csv").open()))
    data = PreparedData((tiny_data["valid"],))
    assert [row["report"] for row in rows] == [" ".join(data.text(i).sentences) for i in range(len(data))]
    assert all(row["written"] for row in rows)


def test_without_training_data_the_baselines_are_named_as_missing(restored, embedder, tiny_data):
    from support import embedded

    from mg3d_jax.evaluation.base import Model

    model = Model(embedder, restored.params, PreparedData((tiny_data["valid"],)))
    evaluation = Generation(GenerationEvaluationOptions(draws=5, max_tokens=8))
    result = evaluation.full(embedded(np.zeros((0, 16), np.float32), model=model))
    assert set(result["left_out"]) == {"most frequent report", "template of probed labels"}
    summary = evaluation.sections(result)[0]
    assert "needs training data" in summary.table.more and any("were cut" in one for one in summary.warnings)
