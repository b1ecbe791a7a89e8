"""Order, share and seek of the training data: one integer is the whole position. Mixed sources, damaged records."""

import itertools
import json
import os
import shutil
import signal
from multiprocessing.context import SpawnProcess

import jax
import numpy as np
import pytest
from support import records_of, tiny_config

from mg3d_jax import batch as batch_contract
from mg3d_jax import sharding
from mg3d_jax.commands.main import main
from mg3d_jax.config.parts import AugmentConfig
from mg3d_jax.data.order import RecordOrder
from mg3d_jax.data.pipeline import (
    BatchReader,
    LocalBatches,
    PreparedData,
    cut_shares,
    evaluation_batches,
    record_names,
    short_id,
    train_batches,
)
from mg3d_jax.data.shard_reader import open_shard
from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.objectives.views import sentence_views
from mg3d_jax.training import inputs as step_inputs


@pytest.fixture(scope="module")
def data(tiny_data):
    return PreparedData((tiny_data["train"],))


@pytest.fixture(scope="module")
def tokenizer(data):
    return ReportTokenizer(train_wordpiece([s for r in records_of(data) for s in r.sentences], 400), 64, 16)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=2, tensor=1))


def indices(batches):
    return [jax.device_get(b["record_index"]).tolist() for b in batches]


def test_each_epoch_is_a_different_permutation_of_all_records(data, tokenizer, mesh):
    config, epochs = tiny_config(), 3
    steps = epochs * len(data) // config.data.batch_size
    flat = list(
        itertools.chain(*indices(train_batches(data, tokenizer, config.data, mesh, seed=0, start=0, stop=steps)))
    )
    first, second = flat[: len(data)], flat[len(data) : 2 * len(data)]
    assert sorted(first) == sorted(second) == list(range(len(data)))
    assert first != second


@pytest.mark.parametrize("workers", [0, 2])
def test_seeking_gives_the_same_batches_as_reading_on(data, tokenizer, mesh, workers):
    config = tiny_config(data__workers=workers)
    whole = indices(train_batches(data, tokenizer, tiny_config().data, mesh, seed=0, start=0, stop=9))
    assert indices(train_batches(data, tokenizer, config.data, mesh, seed=0, start=4, stop=9)) == whole[4:]


def test_workers_outlive_a_sigterm_to_the_whole_group(data, tokenizer, mesh, monkeypatch):
    """SLURM signals every process of a step; the trainer still needs its workers to finish and to save."""
    workers, start = [], SpawnProcess.start

    def start_and_signal(process):
        start(process)
        workers.append(process)
        os.kill(process.pid, signal.SIGTERM)  # before it has imported anything

    monkeypatch.setattr(SpawnProcess, "start", start_and_signal)
    batches = train_batches(data, tokenizer, tiny_config(data__workers=2).data, mesh, seed=0, start=0, stop=30)
    next(batches)
    assert len(workers) == 2
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # the trainer itself gets it
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 29
    assert all(worker.exitcode in (None, 0) for worker in workers)


def test_rows_do_not_depend_on_how_processes_share_them(data, tokenizer):
    """Two processes with half of the rows each read together what one process reads."""
    reader, order = BatchReader(data, tokenizer), RecordOrder(data.lengths, seed=3)
    whole = LocalBatches(reader, order, range(0, 8), 8, start=5, stop=7)
    halves = [LocalBatches(reader, order, rows, 8, start=5, stop=7) for rows in (range(0, 4), range(4, 8))]
    for step in range(2):
        parts = [half[step] for half in halves]
        for name, array in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_batch_holds_what_the_record_says(data, tokenizer, mesh):
    batch = next(train_batches(data, tokenizer, tiny_config().data, mesh, seed=0, start=0, stop=1))
    host = jax.device_get(batch)
    batch_contract.check(host)
    for row, index in enumerate(host["record_index"]):
        record = data.readers[0][int(index)]
        np.testing.assert_array_equal(host["volume"][row], record.volume)
        np.testing.assert_array_equal(host["labels"][row], record.labels)
        assert host["report_id"][row] == short_id(record.report_id)
        np.testing.assert_array_equal(host["token_ids"][row], tokenizer(record.sentences)["token_ids"])


def test_what_limits_cut_is_counted(data, tokenizer):
    reports = {record.report_id: record.sentences for record in records_of(data)}
    lengths = [[len(ids) + 2 for ids in map(text_ids(tokenizer), sentences)] for sentences in reports.values()]
    cut = [sum(length - 2 for length in row) + 2 > 64 or len(row) > 16 for row in lengths]
    long = [length > 12 for row in lengths for length in row]
    assert 0 < np.mean(long) < 1 and np.mean(cut) > 0
    assert cut_shares(data, tokenizer, 12) == (np.mean(cut), np.mean(long))


def text_ids(tokenizer):
    return lambda text: tokenizer.tokenizer.encode(f" {text.strip()}", add_special_tokens=False).ids


def test_evaluation_reads_every_record_once_and_pads(data, tokenizer, mesh):
    batches = [jax.device_get(b) for b in evaluation_batches(data, tokenizer, mesh, 16, threads=2)]
    valid = np.concatenate([b["valid"] for b in batches])
    index = np.concatenate([b["record_index"] for b in batches])
    assert index[valid].tolist() == list(range(len(data))) and len(valid) % 16 == 0


def test_subsets_are_nested_by_patient(tiny_data):
    subsets = [PreparedData((tiny_data["train"],), max_patients=n) for n in (4, 9, 24)]
    names = [[r.name for r in records_of(s)] for s in subsets]
    assert [s.patients for s in subsets] == [4, 9, 24]
    assert names[1][: len(names[0])] == names[0] and names[2][: len(names[1])] == names[1]
    assert len({r.patient for r in records_of(subsets[0])}) == 4


def test_a_seed_draws_other_patients_nested_and_whole(tiny_data):
    def names(patients, seed):
        data = PreparedData((tiny_data["train"],), max_patients=patients, subset_seed=seed)
        found = [data.text(index) for index in range(len(data))]
        assert data.patients == patients == len({one.patient for one in found})
        return {one.name for one in found}, {one.patient for one in found}

    everything = PreparedData((tiny_data["train"],))
    texts = [everything.text(index) for index in range(len(everything))]
    subsets = {seed: [names(patients, seed) for patients in (3, 6, 12, 24)] for seed in (0, 1, 2)}
    for one in subsets.values():
        for (small, few), (large, many) in itertools.pairwise(one):
            assert small < large and few < many
        for records, patients in one:  # all volumes of a patient
            assert records == {text.name for text in texts if text.patient in patients}
    assert len({frozenset(one[1][1]) for one in subsets.values()}) == 3
    assert subsets[1][3] == subsets[0][3]
    percent = PreparedData((tiny_data["train"],), percent=25.0, subset_seed=1)
    assert {percent.text(index).patient for index in range(len(percent))} == subsets[1][1][1]


def test_shuffled_reports_pair_volumes_with_other_patients(data, tokenizer, mesh):
    config = tiny_config(data__shuffle_reports=True)
    batches = [jax.device_get(b) for b in train_batches(data, tokenizer, config.data, mesh, seed=0, start=0, stop=6)]
    records = records_of(data)
    pairs = {int(i): int(r) for b in batches for i, r in zip(b["record_index"], b["report_id"], strict=True)}
    assert len(pairs) == len(records)
    assert sorted(pairs.values()) == sorted(short_id(r.report_id) for r in records)
    for index, report in pairs.items():
        owners = {r.patient for r in records if short_id(r.report_id) == report}
        assert owners != {records[index].patient}


def test_folders_mix_by_weight(tiny_data, data, tokenizer, mesh):
    """3 : 1 in every batch although the folders hold 24 and 8 patients, from wherever the run starts."""
    both = PreparedData((tiny_data["train"], tiny_data["valid"]))
    config = tiny_config(data__train=(tiny_data["train"], tiny_data["valid"]), data__weights=(1, 3))
    walked = indices(train_batches(both, tokenizer, config.data, mesh, seed=0, start=0, stop=8))
    assert [sum(i >= len(data) for i in batch) for batch in walked] == [6] * 8
    seen = [i for batch in walked for i in batch if i >= len(data)]
    held_out = len(both) - len(data)
    assert sorted(seen[:held_out]) == list(range(len(data), len(both)))  # its own epoch first, then again
    assert indices(train_batches(both, tokenizer, config.data, mesh, seed=0, start=5, stop=8)) == walked[5:]
    names = record_names(both, [0, len(both) - 1])
    assert names == [
        f"{tiny_data['train']}: {both.read(0).name}",
        f"{tiny_data['valid']}: {both.read(len(both) - 1).name}",
    ]
    with pytest.raises(IndexError):
        both.read(len(both))


@pytest.fixture(scope="module")
def damaged(tiny_data, tmp_path_factory):
    """A copy of the training folder with one flipped byte in the middle of record 5; (folder, name of that record)."""
    folder = tmp_path_factory.mktemp("damaged") / "train"
    shutil.copytree(tiny_data["train"], folder)
    reader = PreparedData((str(folder),)).readers[0]
    entry = reader.manifest["shards"][0]
    start, size = open_shard(folder / entry["file"], entry["records"]).places[5]
    with open(folder / entry["file"], "r+b") as file:
        file.seek(start + size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return str(folder), reader.name(5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_record_is_skipped_counted_and_named(damaged, data, tokenizer, mesh, tmp_path, capfd, workers):
    folder, name = damaged
    broken, config = PreparedData((folder,)), tiny_config(data__workers=workers, data__max_bad_records=1)
    steps = 3 * len(data) // config.data.batch_size
    got = list(train_batches(broken, tokenizer, config.data, mesh, seed=0, start=0, stop=steps, log_folder=tmp_path))
    sound = list(train_batches(data, tokenizer, tiny_config().data, mesh, seed=0, start=0, stop=steps))
    times = 0
    for ours, theirs in zip(map(jax.device_get, got), map(jax.device_get, sound), strict=True):
        batch_contract.check(ours)
        bad = theirs["record_index"] == 5
        times += bad.sum()
        np.testing.assert_array_equal(ours["valid"], ~bad)
        np.testing.assert_array_equal(ours["record_index"], theirs["record_index"])
        assert np.all(ours["volume"][bad] == -1024) and np.all(ours["labels"][bad] == -1)
        assert np.all(ours["token_mask"][bad].sum(axis=1) == 2) and not ours["sentence_index"][bad].any()
        for field in theirs:
            np.testing.assert_array_equal(ours[field][~bad], theirs[field][~bad])
    assert times == 3
    lines = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert {(line["folder"], line["record"], line["name"]) for line in lines} == {(folder, 5, name)}
    assert len(lines) == 1 or workers  # two workers may meet it at the same moment
    error = capfd.readouterr().err
    assert f"record 5 ({name})" in error and "checksum" in error and error.count("skipped in training") == len(lines)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_records_end_the_run(damaged, data, tokenizer, mesh, tmp_path, workers):
    broken, config = PreparedData((damaged[0],)), tiny_config(data__workers=workers, data__max_bad_records=0)
    with pytest.raises(UserError, match=r"1 damaged records.*more than data.max_bad_records = 0.*record 5"):
        list(train_batches(broken, tokenizer, config.data, mesh, seed=0, start=0, stop=12, log_folder=tmp_path))


def test_verify_and_evaluation_name_the_same_record(damaged, tokenizer, mesh, capsys):
    folder, name = damaged
    broken = PreparedData((folder,))
    with pytest.raises(UserError, match=f"record 5 .{name}. in .* is damaged"):
        list(evaluation_batches(broken, tokenizer, mesh, 8, threads=2))
    batches = [jax.device_get(b) for b in evaluation_batches(broken, tokenizer, mesh, 8, threads=2, max_bad_records=1)]
    index, valid = (np.concatenate([b[key] for b in batches]) for key in ("record_index", "valid"))
    assert set(index[~valid][:1]) == {5} and valid.sum() == len(broken) - 1
    assert main(["prepare", "--verify", "--out", folder]) == 2
    error = capsys.readouterr().err
    assert f"record 5 ({name})" in error and "sha256" in error and "record 4" not in error


def test_volumes_of_many_spacings_train_as_others(tiny_data, tokenizer, mesh, tmp_path):
    """`--policy fraction`: the manifest has no one spacing, the records keep theirs in their affines."""
    command = ["prepare", "--source", "ctrate", "--root", tiny_data["root"], "--split", "valid", "--policy", "fraction"]
    assert main([*command, "--out", str(tmp_path / "out"), "--size", "16", "16", "16", "--qa-samples", "0"]) == 0
    fraction = PreparedData((str(tmp_path / "out"),), volume_size=(16, 16, 16))
    assert fraction.spacing is None
    assert PreparedData((tiny_data["valid"], str(tmp_path / "out"))).spacing is None
    host = jax.device_get(next(train_batches(fraction, tokenizer, tiny_config().data, mesh, seed=0, start=0, stop=1)))
    batch_contract.check(host)
    affines = [record.affine for record in records_of(fraction)]
    assert all(np.linalg.norm(affine[:3, :3], axis=0).min() > 1 for affine in affines)
    assert len({tuple(np.round(np.diag(affine), 3)) for affine in affines}) > 1


def test_wrong_grids_and_sizes_are_errors(tiny_data, data, tokenizer, mesh):
    with pytest.raises(UserError, match="prepared with grid"):
        PreparedData((tiny_data["train"],), volume_size=(32, 32, 32))
    with pytest.raises(UserError, match="max_patients"):
        PreparedData((tiny_data["train"],), max_patients=1000)
    with pytest.raises(UserError, match="no prepared data"):
        PreparedData(())
    with pytest.raises(UserError, match="multiple of 8"):
        next(train_batches(data, tokenizer, tiny_config(data__batch_size=12).data, mesh, seed=0, start=0, stop=1))


def test_windows_scale_and_clip():
    hounsfield = np.array([-2000, -1000, 0, 40, 1000, 3000], np.int16).reshape(1, 6, 1, 1)
    out = np.asarray(step_inputs.window(hounsfield, ((-1000.0, 1000.0), (-160.0, 240.0))))
    assert out.shape == (1, 6, 1, 1, 2)
    np.testing.assert_allclose(out[0, :, 0, 0, 0], [0, 0, 0.5, 0.52, 1, 1])
    np.testing.assert_allclose(out[0, :, 0, 0, 1], [0, 0, 0.4, 0.5, 1, 1])


def test_augmentation_shifts_by_whole_voxels_and_fills_with_air():
    options = AugmentConfig(shift=2)
    volume = np.random.default_rng(0).integers(-900, 900, (4, 8, 8, 8)).astype(np.int16)
    moved = np.asarray(step_inputs.augment(jax.random.key(1), volume, options))
    padded = np.pad(volume, ((0, 0), (2, 2), (2, 2), (2, 2)), constant_values=-1024)
    for row in range(4):
        shifts = itertools.product(range(5), repeat=3)
        assert any(np.array_equal(moved[row], padded[row, a : a + 8, b : b + 8, c : c + 8]) for a, b, c in shifts)


def test_sentence_views_are_sentences_as_the_tokenizer_would_write_them(data, tokenizer):
    records = records_of(data)
    fields = [tokenizer(r.sentences) for r in records]
    batch = {k: np.stack([f[k] for f in fields]) for k in ("token_ids", "token_mask", "sentence_index", "word_index")}
    options = {"sentences": 3, "tokens": 16, "max_sentences": 16, "special": tokenizer.special}
    views = jax.device_get(sentence_views(jax.random.key(0), batch, **options))
    other = jax.device_get(sentence_views(jax.random.key(1), batch, **options))
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
    views = jax.device_get(sentence_views(jax.random.key(0), batch, **options))
    assert views["sentence_index"].any(axis=-1).tolist() == [[True, False, False, False]]
