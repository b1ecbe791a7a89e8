"""Embeddings of any model from files: both formats, what is wrong with them, labels of other data sets, and no JAX."""

import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from support import environment

from mg3d_jax.commands.main import main
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import embedding_files, from_files, label_tables
from mg3d_jax.evaluation.label_tables import MAPPINGS, read_labels

WIDTH, CLASSES = 12, ABNORMALITIES[:4]


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def arrays_of(count=40, seed=0):
    """Volumes of two reconstructions each, embeddings that know something of the labels."""
    rng = np.random.default_rng(seed)
    scans = np.arange(count) // 2
    labels = rng.integers(0, 2, (count // 2, len(CLASSES)))[scans].astype(np.int8)
    directions = unit(rng.normal(size=(len(CLASSES), WIDTH)))
    noise = rng.normal(size=(count, WIDTH))
    reports = unit(labels[::2] @ directions + 0.5 * rng.normal(size=(count // 2, WIDTH)))
    return {
        "volume_embeddings": unit((2 * labels - 1) @ directions + 0.7 * noise),
        "volume_ids": np.array([f"valid_{s}_a_{1 + i % 2}" for i, s in enumerate(scans)]),
        "patient_ids": np.array([f"valid_{s}" for s in scans]),
        "scan_ids": np.array([f"valid_{s}_a" for s in scans]),
        "volume_report_ids": np.array([f"r{s}" for s in scans]),
        "report_embeddings": reports,
        "report_ids": np.array([f"r{s}" for s in range(count // 2)]),
        "report_texts": np.array([f"Report {s}.\nOf two sentences." for s in range(count // 2)]),
        "prompt_embeddings": np.stack([directions, -directions]),
        "classes": np.array(CLASSES),
        "prompt_set": np.array("ct_clip"),
        "logit_scale": np.array(10.0),
    }, labels


def label_csv(path, arrays, labels, names=CLASSES, suffix=".nii.gz"):
    lines = [",".join(("VolumeName", *names))]
    for name, row in zip(arrays["volume_ids"], labels, strict=True):
        lines.append(",".join((f"{name}{suffix}", *("" if value < 0 else str(value) for value in row))))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path):
    arrays, labels = arrays_of()
    embedding_files.save(tmp_path / "model.npz", arrays)
    label_csv(tmp_path / "labels.csv", arrays, labels)
    return tmp_path


@pytest.mark.parametrize("suffix", embedding_files.FORMATS)
def test_a_file_is_read_as_it_was_written(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    arrays, labels = arrays_of()
    arrays |= {"labels": labels, "label_names": np.array(CLASSES), "about": np.array(json.dumps({"step": 3}))}
    arrays |= {"prompt_embeddings@other": arrays["prompt_embeddings"][:, :2], "classes@other": np.array(CLASSES[:2])}
    arrays |= {
        "sentence_embeddings": arrays["report_embeddings"][:3],
        "sentence_report_ids": np.array(["r0", "r0", "r1"]),
        "sentence_texts": np.array(["A.", "B.", "Ç."]),
    }
    path = tmp_path / f"model{suffix}"
    embedding_files.save(path, arrays)
    first = path.read_bytes()
    embedding_files.save(path, dict(reversed(arrays.items())))
    assert path.read_bytes() == first and list(tmp_path.iterdir()) == [path]
    found = embedding_files.load(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    embedded = embedding_files.read(path)
    assert embedded.report_texts[3] == ("Report 3.", "Of two sentences.")
    assert embedded.label_names == CLASSES and embedded.facts["about"] == {"step": 3}
    assert embedded.prompts.keys() == {"ct_clip", "other"} and embedded.prompts["other"].classes == CLASSES[:2]
    assert embedded.logit_scale == 10.0 and not embedded.facts["normalised"]


def test_embeddings_of_any_length_are_normalised_and_that_is_said(tmp_path, capsys):
    arrays, _ = arrays_of()
    embedding_files.save(tmp_path / "a.npz", arrays)
    embedding_files.save(
        tmp_path / "b.npz", arrays | {"volume_embeddings": 3 * arrays["volume_embeddings"].astype(float)}
    )
    a, b = (embedding_files.read(tmp_path / name) for name in ("a.npz", "b.npz"))
    np.testing.assert_allclose(a.volumes, b.volumes, atol=1e-6)
    assert (
        b.facts["normalised"] == ["volume_embeddings"]
        and "normalised now: volume_embeddings" in capsys.readouterr().err
    )


def wrong(**changes):
    arrays, _ = arrays_of()
    nan = arrays["volume_embeddings"].copy()
    nan[7, 2] = np.nan
    cases = {
        "nan": ({"volume_embeddings": nan}, "volume_embeddings is NaN or infinite in 1 of 40 rows, first in row 7"),
        "zero": ({"report_embeddings": 0 * arrays["report_embeddings"]}, "report_embeddings is 0 everywhere"),
        "empty": ({"volume_embeddings": nan[:0], "volume_ids": arrays["volume_ids"][:0]}, "holds no volume"),
        "flat": ({"volume_embeddings": nan[0]}, "has shape (12,)"),
        "width": ({"report_embeddings": arrays["report_embeddings"][:, :5]}, "5 numbers each, volume_embeddings 12"),
        "ids": ({"volume_ids": arrays["volume_ids"][:7]}, "volume_ids has shape (7,)"),
        "twice": ({"volume_ids": arrays["patient_ids"]}, "20 ids more than once, e.g. 'valid_0'"),
        "reports twice": ({"report_ids": np.array(["r0"] * 20)}, "report_ids has 1 ids more than once"),
        "lost": ({"volume_report_ids": np.array(["x"] * 40)}, "names 1 reports that report_ids lacks, e.g. 'x'"),
        "prompts": ({"prompt_embeddings": arrays["prompt_embeddings"][0]}, "[2, classes, numbers]"),
        "classes": ({"classes": np.array(CLASSES[:2])}, "classes has shape (2,)"),
        "scale": ({"logit_scale": np.array(-2.0)}, "one positive number"),
        "labels": ({"labels": np.full((40, 1), 2), "label_names": np.array(["a"])}, "labels holds 2"),
        "label shape": ({"labels": np.zeros((39, 1)), "label_names": np.array(["a"])}, "(40, 1) is needed"),
        "nobody": ({"patient_ids": np.array([""] * 39 + ["p"])}, "patient_ids is empty for 39 of 40 volumes"),
        "bytes": ({"patient_ids": np.array([b"\xff"] * 40)}, "patient_ids is not UTF-8"),
        "infinite": ({"volume_embeddings": 1e300 * arrays["volume_embeddings"].astype(float)}, "infinite in 40 of 40"),
        "set": ({"prompt_set": np.array(["a", "b"])}, "prompt_set has shape (2,)"),
        "second set": (
            {"prompt_embeddings@ct_clip": arrays["prompt_embeddings"], "classes@ct_clip": arrays["classes"]},
            "a second set of prompts by the name of 'ct_clip'",
        ),
        "objects": ({"volume_ids": np.array(arrays["volume_ids"], object)}, "dtype=str"),
    }
    return [pytest.param(changes, says, id=name) for name, (changes, says) in cases.items()]


@pytest.mark.parametrize(("changes", "says"), wrong())
def test_what_is_wrong_with_a_file_is_said(tmp_path, changes, says):
    arrays, _ = arrays_of()
    np.savez(tmp_path / "model.npz", **(arrays | changes))
    with pytest.raises(UserError) as error:
        embedding_files.read(tmp_path / "model.npz")
    assert says in str(error.value) and "model.npz" in str(error.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"text")
    np.savez(tmp_path / "b.npz", embeddings=np.zeros(3))
    with (tmp_path / "e.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    for name, says in (
        ("a.npz", "cannot be read"),
        ("b.npz", "has no volume_embeddings; it has embeddings"),
        ("c.npz", "does not exist"),
        ("d.pt", "ends in .npz or .parquet"),
        ("e.npz", "one array without a name"),
    ):
        with pytest.raises(UserError, match=says):
            embedding_files.read(tmp_path / name)


def table(**columns):
    """A table as pandas writes it, without our metadata."""
    arrays, labels = arrays_of()
    ids = {"kind": ["volume"] * 40, "id": arrays["volume_ids"].tolist(), "patient_id": arrays["patient_ids"].tolist()}
    return ids | {"embedding": arrays["volume_embeddings"].tolist()} | columns, labels


@pytest.mark.parametrize(
    ("columns", "header", "says"),
    [
        ({"embedding": [[1.0], [1.0, 2.0, 3.0]] * 20}, None, "different lengths"),
        ({"embedding": ["x"] * 40}, None, "lists of numbers are needed"),
        ({"kind": ["volume"] * 39 + ["prompt"]}, None, "lack the columns ['prompt_set', 'class', 'present']"),
        ({}, b'{"label_names": ["a"]}', "labels needs 1 numbers for each volume"),
        ({"labels": [[1]] * 39 + [None]}, b'{"label_names": ["a"]}', "labels needs 1 numbers for each volume"),
        ({}, b'{"label', "is no JSON"),
    ],
)
def test_what_is_wrong_with_a_parquet_table_is_said(tmp_path, columns, header, says):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    found = pyarrow.table(table(**columns)[0]).replace_schema_metadata({} if header is None else {b"mg3d": header})
    parquet.write_table(found, tmp_path / "model.parquet")
    with pytest.raises(UserError) as error:
        embedding_files.read(tmp_path / "model.parquet")
    assert says in str(error.value) and "model.parquet" in str(error.value)


def test_labels_of_a_table_that_does_not_name_them_are_not_taken_in_silence(tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns, labels = table()
    parquet.write_table(pyarrow.table(columns | {"labels": labels.tolist()}), tmp_path / "model.parquet")
    assert embedding_files.read(tmp_path / "model.parquet").label_names == ()
    assert "does not name them; give them with --labels" in capsys.readouterr().err


def test_what_is_taken_for_granted_is_said(tmp_path, capsys):
    arrays, _ = arrays_of()
    del arrays["logit_scale"]
    embedding_files.save(tmp_path / "model.npz", arrays | {"patient_ids": np.array(["p"] * 40)})
    assert embedding_files.read(tmp_path / "model.npz").logit_scale == 1.0
    said = capsys.readouterr().err
    assert "has no logit_scale, 1 is taken" in said and "one patient: there are no intervals" in said


def test_labels_find_their_volumes(tmp_path, capsys):
    arrays, labels = arrays_of()
    labels[3, 1] = -1
    table = read_labels([label_csv(tmp_path / "labels.csv", arrays, labels)])
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(table.of(arrays["volume_ids"][order]), labels[order])
    table.of(arrays["volume_ids"][:30])
    assert "10 rows are of volumes without an embedding" in capsys.readouterr().err
    with pytest.raises(UserError, match="1 of 2 volumes have no row"):
        table.of(["valid_0_a_1", "other"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,a\nx,1\ny,2\n", "row 3 (y), column 'a': '2' is no label"),
        ("id,a,note\nx,1,seen\n", "row 2 (x), column 'note': 'seen' is no label"),
        ("id,a\nx,1\nx.nii.gz,0\n", "1 volumes have more than one row, e.g. 'x'"),
        ("id,a\n", "has no rows"),
        ("id\nx\n", "no column beside 'id'"),
        ("", "not a readable csv"),
        ("id;a\nx;1\n", "separate them with commas, not ';'"),
        ("id,a,b\nx,1,0,\ny,0,1,\n", "more fields than the first line"),
        ("id,a, a\nx,1,0\n", "the column 'a' more than once"),
        (",id,a\n0,x,1\n1,y,0\n", "column 1 has no name"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, text, says):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError) as error:
        read_labels([tmp_path / "labels.csv"])
    assert says in str(error.value) and "labels.csv" in str(error.value)


def test_every_way_to_write_a_label(tmp_path):
    (tmp_path / "labels.csv").write_text("id,a\n1,1\n2,0\n3,\n4,-1\n5,nan\n6,1.0\n7,0.0\n8,NaN\n")
    assert read_labels([tmp_path / "labels.csv"]).labels[:, 0].tolist() == [1, 0, -1, -1, -1, 1, 0, -1]
    (tmp_path / "labels.csv").write_text("\ufeffnote,a,\nx.nii.gz,1,\ny, 0 ,\n", encoding="utf-8")
    table = read_labels([tmp_path / "labels.csv"])
    assert table.names == ("a",) and table.of(["y.nii.gz", "x"]).tolist() == [[0], [1]]


def rad_chestct(path, rows, seed):
    """A table of Rad-ChestCT: every abnormality of the mappings and some others, at three places."""
    names = sorted(
        {name for mapping in MAPPINGS.values() for part in mapping.values() for name in part} | {"mass", "plaque"}
    )
    columns = [f"{name}*{place}" for name in names for place in ("left_lung", "heart", "other_location")]
    values = (np.random.default_rng(seed).random((rows, len(columns))) < 0.15).astype(int)
    lines = [",".join(("NoteAcc_DEID", *columns))]
    lines += [",".join((f"tst{seed}{i:04d}", *map(str, row))) for i, row in enumerate(values)]
    path.write_text("\n".join(lines))
    return columns, values


@pytest.mark.parametrize(("mapping", "classes"), [("hlip", 15), ("radfinder_standard", 17), ("radfinder_extended", 18)])
def test_labels_of_rad_chestct(tmp_path, mapping, classes):
    columns, first = rad_chestct(tmp_path / "a.csv", 30, 1)
    _, second = rad_chestct(tmp_path / "b.csv", 20, 2)
    table = read_labels([tmp_path / "a.csv", tmp_path / "b.csv"], mapping=mapping)
    assert (
        table.names == tuple(name for name in ABNORMALITIES if name in MAPPINGS[mapping])
        and len(table.names) == classes
    )
    values = np.concatenate([first, second])
    for place, name in enumerate(table.names):
        hit = [i for i, column in enumerate(columns) if column.split("*")[0] in MAPPINGS[mapping][name]]
        np.testing.assert_array_equal(table.labels[:, place], values[:, hit].max(axis=1))
    np.testing.assert_array_equal(table.of(["tst10003.npz"])[0], table.labels[3])
    with pytest.raises(UserError, match=r"--label-mapping hlip\|radfinder_standard"):
        read_labels([tmp_path / "a.csv"])
    (tmp_path / "c.csv").write_text("NoteAcc_DEID,mass*heart\nx,1\n")
    with pytest.raises(UserError, match=r"ABNORMALITY\*PLACE for .*atelectasis"):
        read_labels([tmp_path / "c.csv"], mapping=mapping)


def test_a_mapping_is_for_the_tables_that_need_one(tmp_path):
    """An external test set with training volumes of CT-RATE, and the other way round."""
    own, plain = tmp_path / "own.csv", tmp_path / "plain.csv"
    rad_chestct(own, 3, 1)
    plain.write_text("id,Emphysema\nx,1\n")
    each = label_tables.mapping_of_each
    assert each("hlip", [own], [plain]) == ("hlip", "") and each("hlip", [plain], [own]) == ("", "hlip")
    assert each("hlip", [own], [own]) == ("hlip", "hlip") and each("hlip", [plain], []) == ("hlip", "")
    assert each("", [own], [own]) == ("", "") and each("hlip", [], [own]) == ("", "hlip")


def test_mappings_differ_where_the_field_disagrees():
    hlip, standard, extended = (MAPPINGS[name] for name in ("hlip", "radfinder_standard", "radfinder_extended"))
    assert hlip["Pulmonary fibrotic sequela"] == ("fibrosis",) and standard["Pulmonary fibrotic sequela"] == (
        "scarring",
    )
    assert hlip["Arterial wall calcification"] == hlip["Coronary artery wall calcification"] == ("calcification",)
    assert extended["Mosaic attenuation pattern"] == ("air_trapping",)
    assert "Mosaic attenuation pattern" not in hlip.keys() | standard.keys() and "Medical material" not in hlip


def test_texts_of_reports_by_report_or_by_volume(folder):
    model = folder / "model.npz"
    (folder / "by_report.csv").write_text("id,report\n" + "\n".join(f"r{i},One {i}. Two." for i in range(20)))
    found = from_files.read(model, reports=folder / "by_report.csv")
    assert found.report_texts[4] == ("One 4.", "Two.")
    rows = "\n".join(f"valid_{i}_a_1.nii.gz,Clear {i}.,Normal." for i in range(20))
    (folder / "by_volume.csv").write_text("VolumeName,Findings_EN,Impressions_EN\n" + rows)
    assert from_files.read(model, reports=folder / "by_volume.csv").report_texts[4] == ("Clear 4.", "Normal.")
    (folder / "some.csv").write_text("id,report\nr0,One.\n")
    with pytest.raises(UserError, match="no text for 19 of 20 reports"):
        from_files.read(model, reports=folder / "some.csv")
    (folder / "twice.csv").write_text("id,report\nr0,One.\nr0,One.\nr0,Two.\n")
    with pytest.raises(UserError, match="'r0' has several rows with different texts"):
        label_tables.read_reports(folder / "twice.csv")
    (folder / "none.csv").write_text("id,words\nr0,One.\n")
    with pytest.raises(UserError, match="no column with texts"):
        label_tables.read_reports(folder / "none.csv")


def test_evaluate_needs_neither_a_checkpoint_nor_jax(folder):
    """And its numbers are those of scikit-learn and of a slow count."""
    out = folder / "out"
    words = [
        "evaluate",
        "--embeddings",
        str(folder / "model.npz"),
        "--labels",
        str(folder / "labels.csv"),
        "--out",
        str(out),
    ]
    program = f"import sys; sys.modules['jax'] = None\nfrom mg3d_jax.commands.main import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document, metrics = (json.loads((out / f"{name}.json").read_text()) for name in ("evaluation", "metrics"))
    arrays, labels = arrays_of()
    difference = arrays["volume_embeddings"] @ (2 * arrays["prompt_embeddings"][0]).T
    areas = [roc_auc_score(labels[:, i], difference[:, i]) for i in range(len(CLASSES))]
    assert document["zero_shot"]["auroc_macro"] == pytest.approx(np.mean(areas))
    assert (document["volumes"], document["patients"]) == (40, 20) and "run" not in document
    similarity = arrays["report_embeddings"] @ arrays["volume_embeddings"].T
    own = arrays["report_ids"][:, None] == arrays["volume_report_ids"][None, :]
    best = np.where(own, similarity, -1).max(axis=1, keepdims=True)
    hits = ((similarity >= best) & ~own).sum(axis=1) < 5
    assert metrics["retrieval/gallery=distinct/report_to_volume/recall@5"] == pytest.approx(hits.mean())
    assert metrics["volume_retrieval/map@5"] == document["volume_retrieval"]["map@5"]
    assert "sides: left out" in done.stdout and "--workdir" in document["left_out"]["sides"]
    with np.load(out / "scores.npz") as scores:
        assert scores["retrieval/distinct/report_to_volume/ranks"].shape == (20,)
    assert "<html" in (out / "evaluation.html").read_text() and (out / "evaluation.png").stat().st_size > 10_000


def evaluate(folder, *words):
    command = ["evaluate", "--embeddings", str(folder / "model.npz"), "--labels", str(folder / "labels.csv")]
    status = main([*command, "--out", str(folder / "out"), *words])
    return json.loads((folder / "out" / "evaluation.json").read_text()) if status == 0 else status


def test_options_of_evaluations_on_the_command_line(folder, capsys):
    (folder / "no_chest.txt").write_text("valid_3_a\n")
    found = evaluate(
        folder, "--only", "retrieval", "--galleries", "chest,ct_clip", "--exclude", str(folder / "no_chest.txt")
    )
    assert list(found["retrieval"]["galleries"]) == ["chest", "ct_clip"] and "zero_shot" not in found
    assert found["retrieval"]["galleries"]["chest"]["volumes"] == 38
    found = evaluate(folder, "--only", "retrieval", "--evaluations.retrieval.galleries=all,distinct")
    assert list(found["retrieval"]["galleries"]) == ["distinct", "all"]
    capsys.readouterr()
    for words, says in (
        (["--evaluations.retrieval.galeries=all"], "did you mean --evaluations.retrieval.galleries?"),
        (["--evaluations.retreival.every=1"], "did you mean --evaluations.retrieval?"),
        (["--evaluations.retrieval.every=often"], "--evaluations.retrieval.every = 'often'"),
        (["--galleries", "al"], "choose one of distinct"),
        (["--only", "volume_retrieval", "--galleries", "all"], "none of the evaluations has such an option"),
        (["--only", "sides"], "'sides' needs the model itself"),
        (["--classes", ","], "names no class"),
        (["--prompts", "hlip"], "the embeddings have prompts by the name of ct_clip"),
        (["--train-embeddings", str(folder / "model.npz")], "has no labels, and training volumes are for probes"),
    ):
        assert evaluate(folder, *words) == 2, words
        assert says in capsys.readouterr().err, words
    for words in (["--data", "x"], ["--workdir", "x"], ["--train-labels", "x"]):
        with pytest.raises(SystemExit):
            evaluate(folder, *words)


def test_prompts_of_classes_without_labels_are_an_error(folder, capsys):
    arrays, labels = arrays_of()
    label_csv(folder / "labels.csv", arrays, labels[:, :2], CLASSES[:2])
    assert evaluate(folder) == 2
    says = capsys.readouterr().err
    assert f"2 classes without labels: {CLASSES[2]}, {CLASSES[3]}" in says and "--classes" in says


def test_a_file_without_prompts_or_reports_is_evaluated_as_far_as_it_goes(folder):
    arrays, _ = arrays_of()
    kept = ("volume_embeddings", "volume_ids", "patient_ids")
    embedding_files.save(folder / "model.npz", {name: arrays[name] for name in kept})
    found = evaluate(folder)
    assert "prompt_embeddings" in found["left_out"]["zero_shot"] and "report_ids" in found["left_out"]["retrieval"]
    assert found["volume_retrieval"]["volumes"] == 40


def test_training_embeddings_are_for_probes_and_thresholds(folder):
    arrays, labels = arrays_of(seed=1)
    arrays = {name: arrays[name] for name in ("volume_embeddings", "volume_ids", "patient_ids")}
    for name in ("volume_ids", "patient_ids"):
        arrays[name] = np.char.replace(arrays[name], "valid", "train")
    embedding_files.save(folder / "train.npz", arrays)
    label_csv(folder / "train.csv", arrays, labels)
    train = ["--train-embeddings", str(folder / "train.npz"), "--train-labels", str(folder / "train.csv")]
    found = evaluate(folder, *train, "--thresholds", "train_youden", "--only", "zero_shot", "probe")
    assert found["train"] == {"embeddings": str(folder / "train.npz"), "volumes": 40}
    assert "train_youden" in json.dumps(found["zero_shot"]["choices"]) and found["probe"]["train"]["patients"] == 20


def test_training_embeddings_must_be_of_the_same_model(folder, capsys):
    arrays, _ = arrays_of()
    embedding_files.save(folder / "train.npz", {
        "volume_embeddings": arrays["volume_embeddings"][:, :5], "volume_ids": arrays["volume_ids"],
        "patient_ids": arrays["patient_ids"],
    })  # fmt: skip
    assert evaluate(folder, "--train-embeddings", str(folder / "train.npz")) == 2
    assert "5 numbers each" in capsys.readouterr().err


def test_texts_without_embeddings_of_reports_are_an_error(folder, capsys):
    arrays, _ = arrays_of()
    kept = ("volume_embeddings", "volume_ids", "patient_ids")
    embedding_files.save(folder / "model.npz", {name: arrays[name] for name in kept})
    (folder / "reports.csv").write_text("id,report\nvalid_0_a_1,Normal.\n")
    assert evaluate(folder, "--reports", str(folder / "reports.csv")) == 2
    assert "embed the reports, too" in capsys.readouterr().err


def test_a_list_that_names_nothing_here_is_said(folder, capsys):
    (folder / "no_chest.txt").write_text("train_3_a\n")
    evaluate(folder, "--only", "retrieval", "--galleries", "chest", "--exclude", str(folder / "no_chest.txt"))
    assert capsys.readouterr().err.count("no_chest.txt: names no volume, scan or patient that is here") == 1
