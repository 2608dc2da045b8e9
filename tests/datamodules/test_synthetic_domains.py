"""Shifts by hand, and one image set as several domains."""

import numpy as np
import pytest
import torch
from conftest import make_tree

import datamodules
from datamodules import (
    ClassSubset,
    Corruption,
    DataError,
    Digits,
    ImageArrays,
    ImageFolders,
    NoShift,
    Rotation,
    Shift,
    SpuriousColour,
    SyntheticDomains,
)
from datamodules.synthetic_domains import SEVERITIES


def generator():
    return np.random.default_rng(0)


def picture(channels=1, size=28):
    return np.random.default_rng(1).integers(0, 256, (channels, size, size), dtype=np.uint8)


ROTATED = {f"r{degrees}": Rotation(degrees) for degrees in (0, 30, 60)}
SHIFTS = [NoShift(), Rotation(20), SpuriousColour(0.1), *(Corruption(kind) for kind in SEVERITIES)]


def test_every_shift_has_a_case():
    exported = {c for c in vars(datamodules).values() if isinstance(c, type) and issubclass(c, Shift)}
    assert exported - {Shift} == {type(shift) for shift in SHIFTS}


@pytest.mark.parametrize("shift", SHIFTS, ids=lambda s: getattr(s, "kind", type(s).__name__))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_shift_keeps_size_and_type_and_follows_from_the_generator(shift, channels):
    image = picture(channels)
    before = image.copy()
    first, again = (shift(image, 1, generator()) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert first[0].dtype == np.uint8
    assert first[0].shape == (3 if isinstance(shift, SpuriousColour) else channels, 28, 28)
    assert np.array_equal(image, before)
    assert np.array_equal(first[0], image) == isinstance(shift, NoShift)


def test_rotation_by_a_right_angle():
    assert np.array_equal(Rotation(90)(picture(), 0, generator())[0], np.rot90(picture(), axes=(1, 2)))
    assert np.array_equal(Rotation(0)(picture(3), 0, generator())[0], picture(3))


@pytest.mark.parametrize(("flip", "noise"), [(0.0, 0.0), (1.0, 0.0), (0.1, 0.25), (0.9, 0.25)])
def test_colour_agrees_with_the_label_as_often_as_it_says(flip, noise):
    draws, image = np.random.default_rng(0), picture(1, 4)
    agree, true = [], []
    for number in range(2000):
        coloured, label = SpuriousColour(flip, noise)(image, number % 2, draws)
        (channel,) = np.flatnonzero(coloured.any((1, 2)))
        assert np.array_equal(coloured[channel], image[0])
        assert channel < 2
        agree.append(channel == label)
        true.append(label == number % 2)
    assert np.mean(agree) == pytest.approx(1 - flip, abs=0.03)
    assert np.mean(true) == pytest.approx(1 - noise, abs=0.03)


def test_colour_makes_two_classes():
    assert SpuriousColour(0.1).class_names(list("0123456789")) == ["0 to 4", "5 to 9"]
    assert SpuriousColour(0.1).class_names(list("abc")) == ["a to b", "c to c"]
    with pytest.raises(DataError, match="labels are not classes"):
        SpuriousColour(0.1).class_names(None)


@pytest.mark.parametrize("kind", SEVERITIES)
def test_corruptions_grow_with_severity(kind):
    image = picture(3, 64)
    distances = [
        np.abs(Corruption(kind, severity)(image, 0, generator())[0] - image.astype(float)).mean()
        for severity in range(1, 6)
    ]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_contrast_and_brightness_by_hand():
    image = np.array([[[0, 100], [200, 100]]], np.uint8)
    assert Corruption("contrast", 1)(image, 0, generator())[0].tolist() == [[[60, 100], [140, 100]]]
    colour = np.array([[[100]], [[50]], [[0]]], np.uint8)
    assert Corruption("brightness", 1)(colour, 0, generator())[0].ravel().tolist() == [126, 63, 0]
    assert Corruption("brightness", 1)(0 * colour, 0, generator())[0].ravel().tolist() == [26, 26, 26]


def test_noise_has_its_deviation():
    grey = np.full((1, 100, 100), 128, np.uint8)
    assert Corruption("noise", 1)(grey, 0, generator())[0].std() / 255 == pytest.approx(0.08, abs=0.003)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SpuriousColour(1.5), "flip: 1.5 is not a probability"),
        (lambda: Corruption("noise", 6), "severity: 6 must be"),
        (lambda: Corruption("nois"), r"kind: there is no corruption nois \(did you mean noise\?\)"),
        (
            lambda: SyntheticDomains(Digits(), ROTATED, target="r61"),
            r"target: there is no domain r61 \(did you mean r60\?\)",
        ),
        (
            lambda: SyntheticDomains(Digits(), ROTATED, source="r1"),
            "source: there is no domain r1 .*; there are r0, r30, r60",
        ),
        (lambda: SyntheticDomains(Digits(), ROTATED, "r0", source="r0"), "source: there is no domain r0"),
        (lambda: SyntheticDomains(Digits(), {}), "shifts: name at least one"),
        (
            lambda: SyntheticDomains(Digits(), {"a": SpuriousColour(0.1), "b": NoShift()}),
            "a and b make different classes",
        ),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(DataError, match=match):
        make()


def test_sources_and_target():
    data = SyntheticDomains(Digits(), ROTATED, target="r60")
    assert set(data.domains("val")) == {"source/r0", "source/r30", "target"}
    assert set(SyntheticDomains(Digits(), ROTATED, "r60", source="r0").domains("val")) == {"source", "target"}
    assert set(SyntheticDomains(Digits(), ROTATED).domains("val")) == {"source/r0", "source/r30", "source/r60"}
    assert set(SyntheticDomains(Digits(), {"a": NoShift()}, target="a").domains("val")) == {"target"}
    assert data.class_names == Digits().class_names
    batch, *_ = next(iter(data.train_dataloader()))
    assert batch["target"][1] is None
    assert batch["source/r0"][0].shape[1:] == (3, 28, 28)
    assert len(data.val_dataloader()) == 3


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_domains_share_no_sample(split):
    whole = Digits().domains(split)["target"]
    parts = SyntheticDomains(Digits(), ROTATED).domains(split)
    ids = [name for part in parts.values() for name in part.ids]
    assert sorted(map(int, ids)) == list(range(len(whole)))
    upright = parts["source/r0"]
    for row in range(5):
        assert torch.equal(upright[row][0], whole[int(upright.ids[row])][0])
        assert upright[row][1] == whole[int(upright.ids[row])][1]
    every = SyntheticDomains(Digits(), ROTATED, split_samples=False).domains(split)
    assert {len(part) for part in every.values()} == {len(whole)}


def test_images_follow_from_the_seed_and_not_from_order_or_the_other_roles():
    shifts = {"a": Corruption("noise"), "b": Corruption("blur")}
    one, two, other = (SyntheticDomains(Digits(), shifts, target=t, seed=s) for t, s in (("a", 0), ("b", 0), ("a", 1)))
    two.domains("test")
    first, second = one.domains("train")["target"], two.domains("train")["source"]
    assert first.fingerprint() == second.fingerprint()
    assert one.domains("train")["target"] is first
    assert first.fingerprint() != one.domains("train")["source"].fingerprint()
    assert first.fingerprint() != other.domains("train")["target"].fingerprint()


@pytest.fixture
def without_test(tmp_path):
    return make_tree(tmp_path / "tree", (("train", 10), ("val", 8)))


@pytest.mark.parametrize("order", [("train", "val", "test"), ("test", "val", "train")])
def test_a_test_split_that_is_the_validation_split_has_its_images(order, without_test):
    """Whichever is asked for first: `tl fit` chooses on what `tl test` measures, and no source sample is tested on."""
    data = ImageFolders(without_test, image_size=16, num_workers=0)
    synthetic = SyntheticDomains(data, {"clean": NoShift(), "noisy": Corruption("noise")}, target="noisy")
    splits = {split: synthetic.domains(split) for split in order}
    assert splits["test"]["target"].ids == splits["val"]["target"].ids
    assert splits["test"]["target"].fingerprint() == splits["val"]["target"].fingerprint()
    again = SyntheticDomains(ImageFolders(without_test, image_size=16, num_workers=0), synthetic.shifts, target="noisy")
    assert again.domains("test")["target"].fingerprint() == splits["val"]["target"].fingerprint()
    assert not set(splits["val"]["source"].ids) & set(splits["test"]["target"].ids)


@pytest.mark.parametrize("wrap", [
    lambda data, **kwargs: SyntheticDomains(data, {"a": NoShift(), "b": Rotation(30)}, target="b", **kwargs),
    lambda data, **kwargs: ClassSubset(data, **kwargs),
    lambda data, **kwargs: ClassSubset(SyntheticDomains(data, {"a": NoShift()}), **kwargs),
], ids=["SyntheticDomains", "ClassSubset", "both"])  # fmt: skip
def test_the_seed_reaches_the_wrapped_data_and_is_its_own_by_default(wrap, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(60) % 3)

    def contents(seed, inner):
        data = wrap(ImageArrays(tmp_path / "a.npz", seed=inner), **({} if seed is None else {"seed": seed}))
        return [d.fingerprint() for d in data.domains("val").values()]

    assert contents(None, 3) == contents(3, 0)
    assert contents(3, 0) != contents(4, 0)


def test_the_labels_of_a_hidden_target_decide_no_split(tmp_path):
    """Not of `SyntheticDomains`, which hides what it wraps, nor of a source that becomes the target."""
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    found = []
    for name, labels in (("a", np.arange(60) % 3), ("b", np.random.default_rng(1).permutation(60) % 3)):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
        shifts = {"a": NoShift(), "b": Rotation(30)}
        data = SyntheticDomains(ImageArrays(source=tmp_path / f"{name}.npz"), shifts, target="b")
        found.append([data.domains(split)["target"].images for split in ("train", "val", "test")])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_coloured_labels():
    data = SyntheticDomains(Digits(), {"a": SpuriousColour(0.1, 0.0)}, split_samples=False)
    whole, coloured = Digits().domains("train")["target"], data.domains("train")["source"]
    assert len(data.class_names) == 2
    assert np.array_equal(coloured.targets, whole.targets // 5)


def test_folders_with_one_split_for_two(tree):
    data = SyntheticDomains(ImageFolders(tree, image_size=20), ROTATED, target="r60", num_workers=0)
    parts = data.domains("train")
    assert parts["target"][0][0].shape == (3, 20, 20)
    assert parts["target"].ids[0].endswith(".png")
    assert data.domains("val")["target"] is data.domains("test")["target"]  # there is no test folder


def test_float_grey_images_and_too_few_samples(tmp_path):
    images = np.linspace(0, 1, 8 * 16).reshape(8, 4, 4)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(8) % 2)
    data = SyntheticDomains(ImageArrays(source=tmp_path / "a.npz"), {"a": NoShift()})
    x, _ = data.domains("train")["source"][0]
    assert x.shape == (1, 4, 4)
    assert x.dtype == torch.uint8
    assert x.max() > 10
    with pytest.raises(DataError, match="2 val samples are too few for 3 domains"):
        SyntheticDomains(ImageArrays(tmp_path / "a.npz"), ROTATED).domains("val")


def test_data_without_images(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.zeros((9, 2)), labels=np.arange(9) % 2)
    with pytest.raises(DataError, match="data: TabularData gives"):
        SyntheticDomains(datamodules.TabularData(tmp_path / "a.npz"), {"a": NoShift()}).domains("train")


CONFIG = """
data:
  class_path: SyntheticDomains
  init_args:
    data: {class_path: ImageFolders, init_args: {target: tree, image_size: 28}}
    target: blurred
    shifts:
      plain: {class_path: NoShift}
      blurred: {class_path: Corruption, init_args: {kind: blur}}
"""


def test_fit_and_test_from_yaml(ok, tmp_path):
    make_tree(tmp_path / "tree", (("train", 8), ("val", 4), ("test", 4)))
    (tmp_path / "shifted.yaml").write_text(CONFIG)
    ok("fit -c shifted.yaml --trainer.max_epochs 1 --model.backbone ConvNet --model.backbone.width 4 --name a")
    assert "test/accuracy" in ok("test --run runs/a")
