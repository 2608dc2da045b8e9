"""Texts from tables, folders and zip files: every layout, its splits, and what is wrong with it."""

import gzip
import json
import shutil

import numpy as np
import pytest

from datamodules import DataError, TextFiles
from datamodules.splits import ids_of

TEXTS = {"pos": ["good", "very good", "fine", "a joy", "yes"], "neg": ["bad", "very bad", "dull", "no", "never"]}


def folder_a_class(root):
    for label, texts in TEXTS.items():
        (root / "all" / label).mkdir(parents=True)
        for number, text in enumerate(texts):
            (root / "all" / label / f"{number}.txt").write_text(text + "\n")
    (root / "all" / "README.md").write_text("not a text")
    return root / "all"


def file_a_class(root, name="reviews.{}"):
    (root / "all").mkdir(parents=True)
    for label, texts in TEXTS.items():
        (root / "all" / name.format(label)).write_text("\n\n".join(texts))
    return root / "all"


def zipped(root):
    inner = root / "inner"
    file_a_class(inner, "{}.tok.txt")
    return shutil.make_archive(str(root / "texts"), "zip", inner)  # with the folder `all` in it


def rows():
    return [(text, label) for label, texts in TEXTS.items() for text in texts]


def csv(root):
    (root / "t.csv").write_text("label,text\n" + "".join(f'{label},"{text}, said"\n' for text, label in rows()))
    return root / "t.csv"


def tsv(root):
    (root / "t.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows()))
    return root / "t.tsv"


def jsonl(root):
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows()]
    (root / "t.jsonl").write_text("\n".join(lines))
    return root / "t.jsonl"


def parquet(root):
    import polars

    polars.DataFrame(rows(), schema=["text", "label"], orient="row").write_parquet(root / "t.parquet")
    return root / "t.parquet"


def frame(root):
    import polars

    return polars.DataFrame(rows(), schema=["text", "label"], orient="row")


@pytest.mark.parametrize("make", [folder_a_class, file_a_class, zipped, csv, tsv, jsonl, parquet, frame])
def test_every_layout(make, tmp_path):
    data = TextFiles(make(tmp_path))
    assert data.class_names == ["neg", "pos"]
    assert data.schema == {"x": {"text": {}}, "y": {"classes": ["neg", "pos"]}}
    splits = [data.domains(split)["target"] for split in ("train", "val", "test")]
    assert [len(part) for part in splits] == [6, 2, 2]
    found = {
        (text.removesuffix(", said"), data.class_names[y])
        for part in splits
        for text, y in map(part.__getitem__, range(len(part)))
    }
    assert found == set(rows())
    assert splits[0].fingerprint() != splits[1].fingerprint()
    assert len({name for part in splits for name in ids_of(part)}) == 10


def test_splits_by_name(tmp_path):
    for split in ("train", "validation"):
        file_a_class(tmp_path / "inner" / split).rename(tmp_path / split)
    shutil.rmtree(tmp_path / "inner")
    data = TextFiles(tmp_path)
    assert [len(data.domains(split)["target"]) for split in ("train", "val", "test")] == [10, 10, 10]
    tables = tmp_path / "tables"
    tables.mkdir()
    for split in ("train", "test"):
        csv(tables).rename(tables / f"{split}.csv")
    archive = shutil.make_archive(str(tmp_path / "tables"), "zip", tables)
    for where in (tables, archive):
        data = TextFiles(where)
        assert [len(data.domains(split)["target"]) for split in ("train", "val", "test")] == [8, 2, 10]


def test_a_group_is_not_torn_apart(tmp_path):
    lines = [f"text {n},{'ab'[n % 2]},author {n // 4}\n" for n in range(40)]
    (tmp_path / "t.csv").write_text("text,label,author\n" + "".join(lines))
    data = TextFiles(tmp_path / "t.csv", group="author")
    groups = [set(data.domains(split)["target"].groups) for split in ("train", "val", "test")]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 10


def test_values_and_few_shots(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"word,{n}.5\n" for n in range(10)))
    data = TextFiles(tmp_path / "t.csv")
    assert (data.class_names, data.schema["y"]) == (None, {"values": 1})
    assert data.domains("train")["target"][0][1].dtype == "float32"
    few = TextFiles(csv(tmp_path), shots_per_class=1)
    assert len(few.train_dataloader().flattened[0].dataset) == 2


def test_texts_without_labels_are_for_prediction(tmp_path):
    (tmp_path / "new.txt").write_text("good\n\nbad\n" + "more\n" * 3)
    for given in ({"classes": ["neg", "pos"]}, {"label": None}):
        data = TextFiles(tmp_path / "new.txt", **given)
        assert len(list(data.predict_dataloader())) == 1
        assert data.ids()[:2] == ["new.txt:1", "new.txt:3"]
    data = TextFiles(tmp_path / "new.txt", classes=["neg", "pos"])
    with pytest.raises(DataError, match=r"new.txt has no labels for lack of a label column .* `tl predict` can use it"):
        data.train_dataloader()
    # beside a source they are a target whose labels are hidden anyway
    data = TextFiles(tmp_path / "new.txt", csv(tmp_path), val_fraction=0.3, test_fraction=0.3)
    assert set(data.domains("train")) == {"source", "target"}
    with pytest.raises(DataError, match="has no labels"):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text,label\na,x\nb,x\n", {}, "all texts have the label x"),
        ("text,label\na,x\n,y\nc,x\n", {}, "row 1 has no text"),
        ("text,label\na,x\nb,\nc,y\n", {}, "row 1: its label is missing"),
        ("txt,label\na,x\nb,y\n", {}, r"there is no column text \(did you mean txt\?\)"),
        ("text,label\na,x\nb,y\n", {"group": "author"}, "group: there is no column author"),
        ("text,label\na,x\nb,y\n", {"classes": ["x", "z"]}, "classes: there is no class y"),
        ("text,label\na,x\nb,y\n", {"kind": "values"}, "row 0: its label .x. is not a number"),
        ("text\na\nb\n", {}, "has no labels; give some, or pass --data.label null"),
    ],
)
def test_mistakes_in_a_table(content, options, message, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        TextFiles(tmp_path / "t.csv", **options)


def test_texts_are_what_their_file_says(tmp_path):
    (tmp_path / "new.txt").write_bytes("\ufeffone\u2028line\x85\x0c still\r\ntwo\rthree\n".encode())
    texts = TextFiles(tmp_path / "new.txt", label=None).whole()
    assert texts.texts == ["one\u2028line\x85\x0c still", "two", "three"]
    assert texts.ids == ["new.txt:1", "new.txt:2", "new.txt:3"]
    (tmp_path / "t.csv").write_text("text,label\n" + "007,TRUE\nTRUE,FALSE\n" * 5)
    data = TextFiles(tmp_path / "t.csv")
    texts = data.domains("train")["target"]
    assert {texts[i][0] for i in range(len(texts))} == {"007", "TRUE"}
    assert data.class_names == ["FALSE", "TRUE"]


def test_packed_tables_of_splits(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv.gz").write_bytes(gzip.compress(f"text,label\n{split},a\nb,b\n".encode()))
    for target in (tmp_path, tmp_path / "train.csv.gz"):
        assert TextFiles(target).domains("train")["target"][0][0] == "train"


@pytest.mark.parametrize("field", ["text", "label"])
def test_lists_are_neither_texts_nor_labels(field, tmp_path):
    rows = [{"text": "a", "label": "x"} | {field: ["b", "c"]}] * 4
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=f"{field}: .*t.jsonl: column {field} holds lists or objects"):
        TextFiles(tmp_path / "t.jsonl")


def test_other_mistakes(tmp_path):
    with pytest.raises(DataError, match="give a file or folder of texts"):
        TextFiles()
    (tmp_path / "bad.zip").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="cannot be read as a zip file"):
        TextFiles(tmp_path / "bad.zip")
    root = file_a_class(tmp_path)
    (root / "reviews.pos").write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"reviews.pos line 2 is not utf-8; pass --data.encoding, e.g. latin-1"):
        TextFiles(root)
    assert len(TextFiles(root, encoding="latin-1").class_names) == 2
    with pytest.raises(DataError, match="there is no column author"):
        TextFiles(root, encoding="latin-1", group="author")
    (tmp_path / "o.csv").write_text("text,label\na,pos\nb,other\n")
    with pytest.raises(DataError, match="classes differ: only the source has neg; only the target has other"):
        TextFiles(tmp_path / "o.csv", root, encoding="latin-1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no texts"):
        TextFiles(tmp_path / "empty")


def test_texts_of_like_length_make_a_batch(tmp_path):
    lengths = np.random.default_rng(0).permutation(400) + 1
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"{'a' * n},{'xy'[n % 2]}\n" for n in lengths))
    for workers in (0, 2):
        batches = list(TextFiles(tmp_path / "t.csv", batch_size=10, num_workers=workers).train_dataloader())
        found = [[len(text) for text in batch["target"][0]] for batch, *_ in batches]
        assert np.mean([max(each) - min(each) for each in found]) < 30
        assert len({length for batch in found for length in batch}) == 240
