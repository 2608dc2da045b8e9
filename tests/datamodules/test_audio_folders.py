"""Recordings: what is known of a file, splits, groups, domains, bad files, rates, augmentation."""

import os
import time

import numpy as np
import pytest
import torch

from datamodules import AudioFolders, BackgroundNoise, DataError, RandomGain, RandomTimeShift
from datamodules.audio import AudioReader
from datamodules.listing import list_files
from datamodules.loaders import seeded

soundfile = pytest.importorskip("soundfile")
PATTERN = "{label}_{speaker}_{index}.wav"


def write(path, hertz=100.0, seconds=0.1, rate=800, channels=1, **options):
    """A tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    soundfile.write(path, np.stack([wave] * channels, 1) if channels > 1 else wave, rate, **options)
    return path


def digits(root, count=4):
    """Two digits of three speakers."""
    for label in (0, 1):
        for speaker in ("ann", "bob", "cid"):
            for index in range(count):
                write(root / f"{label}_{speaker}_{index}.wav", 60 + 100 * label, 0.05 + 0.01 * index)
    return root


def data(target, **options):
    return AudioFolders(target, num_workers=0, **options)


def sizes(found, split):
    return {name: len(dataset) for name, dataset in found.split_domains(split).items()}


def test_folders_with_and_without_splits(tmp_path):
    for label in ("no", "yes"):
        for i in range(10):
            write(tmp_path / "a" / label / f"{i}.wav")
            write(tmp_path / "b" / ("train" if i < 6 else "valid" if i < 8 else "test") / label / f"{i}.flac")
    write(tmp_path / "a" / "_background_noise_" / "x.wav")
    one, two = data(tmp_path / "a"), data(tmp_path / "b")
    assert one.schema == {"x": {"audio": {"rate": 800}}, "y": {"classes": ["no", "yes"]}}
    assert [sizes(one, split)["target"] for split in ("train", "val", "test")] == [12, 4, 4]
    assert [sizes(two, split)["target"] for split in ("train", "val", "test")] == [12, 4, 4]
    (tmp_path / "a" / "testing_list.txt").write_text("no/0.wav\nyes/1.wav\n")
    (tmp_path / "a" / "validation_list.txt").write_text("no/2.wav\nyes/3.wav\n")
    listed = data(tmp_path / "a")
    assert sizes(listed, "train") == {"target": 16}
    assert [path[-8:] for path in listed.split_domains("test")["target"].ids] == ["no/0.wav", "es/1.wav"]


def test_a_pattern_says_label_split_group_and_domain(tmp_path):
    root = digits(tmp_path)
    (root / "notes.wav").write_bytes(b"")
    official = data(root, pattern=PATTERN, where={"test": "index<1"}, val_fraction=0.25)
    assert official.class_names == ["0", "1"]
    assert sizes(official, "test") == {"target": 6}
    assert all(path.endswith("_0.wav") for path in official.split_domains("test")["target"].ids)
    both = data(root, pattern=PATTERN, where={"train": "index<3", "test": "index<1"}, val_fraction=0.25)
    assert [sizes(both, split)["target"] for split in ("train", "val", "test")] == [8, 4, 6]  # no test in training
    grouped = data(root, pattern=PATTERN, group="speaker")
    speakers = [set(grouped.split_domains(split)["target"].groups) for split in ("train", "val", "test")]
    assert sorted(map(len, speakers)) == [1, 1, 1]
    assert len(set.union(*speakers)) == 3
    where = {"target": "speaker=cid", "source": "speaker!=cid", "test": "index>=3"}
    apart = data(root, source=root, pattern=PATTERN, where=where, val_fraction=0.25)
    assert sizes(apart, "test") == {"source": 4, "target": 2}
    assert "cid" not in "".join(apart.split_domains("train")["source"].ids)


def test_a_table_lists_paths_labels_and_splits(tmp_path):
    pytest.importorskip("polars")
    digits(tmp_path / "wav")
    lines = [f"wav/{n}_{s}_{i}.wav,{['FALSE', 'TRUE'][n]},{s},{'test' if i == 3 else 'train'},{n + 0.5}" for n in (0, 1)
             for s in ("ann", "bob") for i in range(4)]  # fmt: skip
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["file,word,speaker,split,score", *lines]))
    classes = data(table, label="word", group="speaker", val_fraction=0.3)
    assert classes.class_names == ["FALSE", "TRUE"]
    assert sizes(classes, "test") == {"target": 4}
    wave, label = classes.split_domains("test")["target"][0]
    assert (wave.shape, wave.dtype, label) == ((64,), torch.float32, 0)
    values = data(table, label="score", kind="values")
    assert values.schema["y"] == {"values": 1}
    assert values.split_domains("test")["target"][3][1] == np.float32(1.5)


def test_files_are_opened_when_they_are_needed(tmp_path, monkeypatch):
    digits(tmp_path)
    opened, real = [], soundfile.SoundFile
    monkeypatch.setattr(soundfile, "SoundFile", lambda path: opened.append(path) or real(path))
    found = data(tmp_path, pattern=PATTERN)
    assert sizes(found, "train") == {"target": 16}
    assert len(opened) == 1  # for the rate
    found.split_domains("train")["target"][3]
    assert len(opened) == 2


@pytest.mark.slow
def test_a_hundred_thousand_files_are_listed_in_seconds(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(50_000):
            (tmp_path / label / f"{i}.wav").touch()
    start = time.process_time()
    found = data(tmp_path, rate=8000)
    assert sizes(found, "train") == {"target": 60_000}
    assert time.process_time() - start < 10


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_formats_channels_and_rates(suffix, tmp_path):
    pytest.importorskip("soxr")
    path = write(tmp_path / f"x.{suffix}", 440, 0.5, 16000, channels=2)
    wave = AudioReader(8000, 30.0, False).read(path)
    wanted = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(4000) / 8000)
    assert wave.shape == (4000,)
    assert (wave - wanted)[200:-200].abs().max() < 0.05
    assert len(AudioReader(16000, 0.25, False).read(path)) == 4000  # the middle


def test_bad_files_are_named_or_left_out(tmp_path, caplog):
    root = digits(tmp_path)
    (root / "0_dan_0.wav").write_bytes(b"this is not a recording")
    (root / "0_dan_1.wav").write_bytes(b"")
    soundfile.write(root / "1_dan_2.wav", np.zeros(0), 800)
    soundfile.write(root / "1_dan_3.wav", np.zeros(80), 800)
    reasons = {0: "cannot be decoded as audio", 1: "cannot be decoded as audio", 2: "it is empty", 3: "it is silent"}
    reader = AudioReader(800, 30.0, False)
    for index, reason in reasons.items():
        with pytest.raises(DataError, match=f"_dan_{index}.wav: .*{reason}"):
            reader.read(next(root.glob(f"*_dan_{index}.wav")))
    assert AudioReader(800, 30.0, True).read(root / "1_dan_3.wav").tolist() == [0.0] * 80
    soundfile.write(root / "1_dan_4.flac", np.random.default_rng(0).normal(0, 0.1, 8000), 800)
    flac = (root / "1_dan_4.flac").read_bytes()
    (root / "1_dan_4.flac").write_bytes(flac[: len(flac) // 2])
    with pytest.raises(DataError, match=r"_dan_4.flac: it (is cut off|cannot be decoded)"):
        reader.read(root / "1_dan_4.flac")
    raising = data(root, pattern=PATTERN).split_domains("train")["target"]
    bad = next(i for i, path in enumerate(raising.ids) if "dan" in path)
    with pytest.raises(DataError, match=r"pass --data\.on_bad_file skip"):
        raising[bad]
    skipping = data(root, pattern=PATTERN, on_bad_file="skip")
    assert sum(sizes(skipping, split)["target"] for split in ("train", "val", "test")) == 24
    assert "skipped 4 of 28 recordings" in caplog.text


def test_what_a_table_names_is_named_where_it_is_missing(tmp_path):
    names = sorted(path.name for path in digits(tmp_path).iterdir())
    for number, name in enumerate(names):
        (tmp_path / name).rename(tmp_path / f"{number:03}")  # a name that looks like a number
    table = tmp_path / "t.csv"
    table.write_text("file,label\n" + "".join(f"{i:03},{name[0]}\n" for i, name in enumerate(names)))
    data(table).warn_of_copies()
    (tmp_path / "001").unlink()
    with pytest.raises(DataError, match=r"001: it cannot be read \(No such file or directory\)"):
        data(table).warn_of_copies()


def test_channels_that_cancel_are_not_called_silent(tmp_path):
    wave = np.random.default_rng(0).normal(0, 0.1, 80)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, -wave], 1), 800, subtype="FLOAT")
    with pytest.raises(DataError, match=r"a.wav: its channels cancel each other out \(if that is meant"):
        AudioReader(800, 30.0, False).read(tmp_path / "a.wav")


def test_a_class_without_recordings_is_refused(tmp_path):
    for label in ("no", "yes"):
        write(tmp_path / label / "0.wav")
    (tmp_path / "maybe").mkdir()
    (tmp_path / "maybe" / "0.m4a").touch()
    with pytest.raises(DataError, match=r"class maybe is empty: none of its files is a recording, e.g. maybe/0.m4a"):
        data(tmp_path)


def test_a_run_predicts_recordings_without_labels(tmp_path):
    root = digits(tmp_path / "a")
    for i in range(3):
        write(tmp_path / "new" / f"rec {i}.wav", rate=1600)
    new = data(tmp_path / "new", pattern=PATTERN, classes=["0", "1"], rate=800)
    loader = new.predict_dataloader()
    assert [path[-9:] for path in new.ids()] == ["rec 0.wav", "rec 1.wav", "rec 2.wav"]
    assert loader.dataset[0][0].shape == (80,)
    assert len(data(root, pattern=PATTERN).predict_dataloader().dataset) == 24
    assert len(data(root, pattern=PATTERN, where={"test": "index<1"}).predict_dataloader().dataset) == 6


def test_names_of_contents_change_with_a_file(tmp_path):
    root = digits(tmp_path)
    before = data(root, pattern=PATTERN).split_domains("test")["target"].fingerprint()
    assert data(root, pattern=PATTERN).split_domains("test")["target"].fingerprint() == before
    for path in root.iterdir():
        write(path, 70, 0.2)
    assert data(root, pattern=PATTERN).split_domains("test")["target"].fingerprint() != before


@pytest.mark.parametrize(("options", "message"), [
    ({"pattern": "{word}.wav"}, "label: there is no field label"),
    ({"pattern": "{label"}, "pattern: {label is not like"),
    ({"pattern": "{label}-{x}.wav"}, "label: no file name matches"),
    ({}, "has no class folders"),
    ({"pattern": PATTERN, "where": {"test": "index~5"}}, "where.test: index~5 is not a condition"),
    ({"pattern": PATTERN, "where": {"test": "speaker<5"}}, "compares numbers"),
    ({"pattern": PATTERN, "where": {"test": "index<0"}}, "has no file for test"),
    ({"pattern": PATTERN, "where": {"exam": "index<0"}}, "where: there is no domain or split exam"),
    ({"pattern": PATTERN, "where": {"target": "speaker=zoe"}}, "where.target: no file of .* fulfils speaker=zoe"),
    ({"pattern": PATTERN, "group": "spaeker"}, r"group: there is no field spaeker \(did you mean speaker\?\)"),
    ({"pattern": PATTERN, "rate": 0}, "rate, max_seconds: 0"),
    ({"pattern": PATTERN, "kind": "values", "label": "speaker"}, "pass --data.kind classes"),
])  # fmt: skip
def test_mistakes_are_said(options, message, tmp_path):
    with pytest.raises(DataError, match=message):
        data(digits(tmp_path, 1), **options).split_domains("train")


def test_augmentation_follows_from_the_seed(tmp_path):
    write(tmp_path / "noise" / "hum.wav", 50, 0.03)
    wave = torch.randn(400, generator=torch.Generator().manual_seed(0))
    noise = BackgroundNoise(tmp_path / "noise", softest=10, loudest=10, probability=1)
    for transform in (RandomGain(), RandomTimeShift(0.5), noise):
        found = []
        for seed in (1, 1, 2):
            with seeded(seed):
                found.append(transform(wave))
        assert found[0].shape == wave.shape
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
    added = noise(wave) - wave
    assert (wave.square().mean() / added.square().mean()).log10() == pytest.approx(1, abs=1e-3)  # 10 dB
    with seeded(3):
        moved = RandomTimeShift(1.0)(torch.ones(100))
    assert set(moved.tolist()) == {0.0, 1.0}
    assert (RandomGain(6)(wave).abs().sum() / wave.abs().sum()).log10().abs() <= 0.3 + 1e-6


def test_noise_of_an_empty_folder_is_said(tmp_path):
    with pytest.raises(DataError, match=r"has no files ending in \.wav"):
        BackgroundNoise(tmp_path)


def test_names_of_files_are_sorted_and_hidden_ones_left_out(tmp_path):
    for name in ("b/2.wav", "a/1.WAV", ".x/3.wav", "_noise_/4.wav", "a/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listing = list_files(tmp_path, (".wav",), None, "file")
    assert [os.path.relpath(path, tmp_path) for path in listing.paths] == ["a/1.WAV", "b/2.wav"]
    assert listing.fields["label"].tolist() == ["a", "b"]


def test_recordings_of_like_length_make_a_batch(tmp_path):
    lengths = np.random.default_rng(0).permutation(80) + 20
    for number, length in enumerate(lengths):
        write(tmp_path / "ab"[number % 2] / f"{number}.wav", seconds=length / 800)
    found = data(tmp_path, batch_size=6)
    found.collate = lambda samples: [len(x) for x, *_ in samples]
    batches = [batch["target"] for batch, *_ in found.train_dataloader()]
    assert np.mean([np.ptp(batch) for batch in batches]) < 15
    assert sum(map(len, batches)) == 48
    soundfile.write(tmp_path / "a" / "0.flac", np.ones(9) / 2, 800)  # how long it is takes opening it
    assert data(tmp_path).predict_dataloader().dataset.lengths() is None
