"""Order, share and seek of the training data: one integer is the whole position."""

import itertools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from support import tiny_config

from mg3d_jax import batch as batch_contract
from mg3d_jax import sharding
from mg3d_jax.data.pipeline import BatchReader, LocalBatches, PreparedData, evaluation_batches, short_id, train_batches
from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.training import inputs as step_inputs


@pytest.fixture(scope="module")
def data(tiny_data):
    return PreparedData((tiny_data["train"],))


@pytest.fixture(scope="module")
def tokenizer(data):
    return ReportTokenizer(train_wordpiece([s for r in data.records() for s in r.sentences], 400), 64, 16)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(ConfigDict({"data": -1, "fsdp": 2, "tensor": 1}))


def indices(batches):
    return [jax.device_get(b["record_index"]).tolist() for b in batches]


def test_each_epoch_is_a_different_permutation_of_all_records(data, tokenizer, mesh):
    config, epochs = tiny_config(), 3
    steps = epochs * len(data) // config.data.batch_size
    flat = list(itertools.chain(*indices(train_batches(data, tokenizer, config, mesh, start=0, stop=steps))))
    first, second = flat[: len(data)], flat[len(data) : 2 * len(data)]
    assert sorted(first) == sorted(second) == list(range(len(data)))
    assert first != second


@pytest.mark.parametrize("workers", [0, 2])
def test_seeking_gives_the_same_batches_as_reading_on(data, tokenizer, mesh, workers):
    config = tiny_config(data__workers=workers)
    whole = indices(train_batches(data, tokenizer, tiny_config(), mesh, start=0, stop=9))
    assert indices(train_batches(data, tokenizer, config, mesh, start=4, stop=9)) == whole[4:]


def test_rows_do_not_depend_on_how_processes_share_them(data, tokenizer):
    """Two processes with half of the rows each read together what one process reads."""
    reader, options = BatchReader(data, tokenizer), {"seed": 3, "start": 5, "stop": 7}
    whole = LocalBatches(reader, range(0, 8), 8, **options)
    halves = [LocalBatches(reader, rows, 8, **options) for rows in (range(0, 4), range(4, 8))]
    for step in range(2):
        parts = [half[step] for half in halves]
        for name, array in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_batch_holds_what_the_record_says(data, tokenizer, mesh):
    batch = next(train_batches(data, tokenizer, tiny_config(), mesh, start=0, stop=1))
    host = jax.device_get(batch)
    batch_contract.check(host)
    for row, index in enumerate(host["record_index"]):
        record = data.readers[0][int(index)]
        np.testing.assert_array_equal(host["volume"][row], record.volume)
        np.testing.assert_array_equal(host["labels"][row], record.labels)
        assert host["report_id"][row] == short_id(record.report_id)
        np.testing.assert_array_equal(host["token_ids"][row], tokenizer(record.sentences)["token_ids"])


def test_evaluation_reads_every_record_once_and_pads(data, tokenizer, mesh):
    batches = [jax.device_get(b) for b in evaluation_batches(data, tokenizer, mesh, 16)]
    valid = np.concatenate([b["valid"] for b in batches])
    index = np.concatenate([b["record_index"] for b in batches])
    assert index[valid].tolist() == list(range(len(data))) and len(valid) % 16 == 0


def test_subsets_are_nested_by_patient(tiny_data):
    subsets = [PreparedData((tiny_data["train"],), max_patients=n) for n in (4, 9, 24)]
    names = [[r.name for r in s.records()] for s in subsets]
    assert [s.patients for s in subsets] == [4, 9, 24]
    assert names[1][: len(names[0])] == names[0] and names[2][: len(names[1])] == names[1]
    assert len({r.patient for r in subsets[0].records()}) == 4


def test_shuffled_reports_pair_volumes_with_others(data, tokenizer, mesh):
    config = tiny_config(data__shuffle_reports=True)
    host = jax.device_get(next(train_batches(data, tokenizer, config, mesh, start=0, stop=1)))
    own = [short_id(data.readers[0][int(i)].report_id) for i in host["record_index"]]
    assert np.mean(host["report_id"] == own) < 0.5


def test_wrong_grids_and_sizes_are_errors(tiny_data, data, tokenizer, mesh):
    with pytest.raises(UserError, match="prepared with grid"):
        PreparedData((tiny_data["train"],), volume_size=(32, 32, 32))
    with pytest.raises(UserError, match="max_patients"):
        PreparedData((tiny_data["train"],), max_patients=1000)
    with pytest.raises(UserError, match="no prepared data"):
        PreparedData(())
    with pytest.raises(UserError, match="multiple of 8"):
        next(train_batches(data, tokenizer, tiny_config(data__batch_size=12), mesh, start=0, stop=1))


def test_windows_scale_and_clip():
    hounsfield = np.array([-2000, -1000, 0, 40, 1000, 3000], np.int16).reshape(1, 6, 1, 1)
    out = np.asarray(step_inputs.window(hounsfield, ((-1000.0, 1000.0), (-160.0, 240.0))))
    assert out.shape == (1, 6, 1, 1, 2)
    np.testing.assert_allclose(out[0, :, 0, 0, 0], [0, 0, 0.5, 0.52, 1, 1])
    np.testing.assert_allclose(out[0, :, 0, 0, 1], [0, 0, 0.4, 0.5, 1, 1])


def test_augmentation_shifts_by_whole_voxels_and_fills_with_air():
    options = ConfigDict({"shift": 2, "scale": 0.0, "offset": 0.0, "noise": 0.0})
    volume = np.random.default_rng(0).integers(-900, 900, (4, 8, 8, 8)).astype(np.int16)
    moved = np.asarray(step_inputs.augment(jax.random.key(1), volume, options))
    padded = np.pad(volume, ((0, 0), (2, 2), (2, 2), (2, 2)), constant_values=-1024)
    for row in range(4):
        shifts = itertools.product(range(5), repeat=3)
        assert any(np.array_equal(moved[row], padded[row, a : a + 8, b : b + 8, c : c + 8]) for a, b, c in shifts)


def test_sentence_views_are_sentences_as_the_tokenizer_would_write_them(data, tokenizer):
    records = list(data.records())
    fields = [tokenizer(r.sentences) for r in records]
    batch = {k: np.stack([f[k] for f in fields]) for k in ("token_ids", "token_mask", "sentence_index", "word_index")}
    options = {"sentences": 3, "tokens": 16, "max_sentences": 16, "special": tokenizer.special}
    views = jax.device_get(step_inputs.sentence_views(jax.random.key(0), batch, **options))
    other = jax.device_get(step_inputs.sentence_views(jax.random.key(1), batch, **options))
    assert np.any(views["token_ids"] != other["token_ids"])
    alone = ReportTokenizer(tokenizer.tokenizer, 16, 1)
    ids = {}
    for row, record in enumerate(records):
        whole = int(fields[row]["sentence_index"].max())  # the last one may be cut by the report's own limit
        expected = [alone([s]) for s in record.sentences[: whole - 1]]
        drawn = views["token_ids"][row]
        assert len({tuple(d) for d in drawn}) == 3  # without replacement
        for view in range(3):
            same = [e for e in expected if np.array_equal(e["token_ids"], drawn[view])]
            if not same:
                continue
            np.testing.assert_array_equal(views["token_mask"][row, view], same[0]["token_mask"])
            np.testing.assert_array_equal(views["sentence_index"][row, view], same[0]["sentence_index"])
            ids.setdefault(int(views["view_id"][row, view]), set()).add(tuple(drawn[view]))
    assert len(ids) > len(records) and all(len(texts) == 1 for texts in ids.values())


def test_short_reports_leave_views_empty(tokenizer):
    fields = tokenizer(["No nodule."])
    batch = {k: v[None] for k, v in fields.items()}
    options = {"sentences": 4, "tokens": 16, "max_sentences": 16, "special": tokenizer.special}
    views = jax.device_get(step_inputs.sentence_views(jax.random.key(0), batch, **options))
    assert views["sentence_index"].any(axis=-1).tolist() == [[True, False, False, False]]
