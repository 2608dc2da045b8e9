"""What is done with each kind of image; the rows of the table in docs/how-to/images.md."""

import io
import resource
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from datamodules import DataError, ImageFolders
from datamodules.decoding import ImageReader


def reader(size=8, **options):
    return ImageReader(size, size, "bilinear", 50_000_000, **options)


def colour(path, **options):
    """The mean colour of an image as evaluation sees it."""
    return reader(**options).read(path).float().mean((1, 2)).round().int().tolist()


def shape_in_alpha(ink=(0, 0, 0)):
    """A square that only its alpha shows."""
    drawn = Image.new("RGBA", (8, 8), (*ink, 0))
    drawn.paste((*ink, 255), (2, 2, 6, 6))
    return drawn


def palette_with_transparency():
    drawn = Image.new("P", (8, 8), 0)
    drawn.putpalette([0, 0, 0, 255, 0, 0])
    drawn.paste(1, (2, 2, 6, 6))
    drawn.info["transparency"] = 0
    return drawn


def animated(*colours):
    first, *others = (Image.new("RGB", (8, 8), each) for each in colours)
    return first, {"save_all": True, "append_images": others}


@pytest.mark.parametrize(
    ("name", "drawn", "wanted"),
    [
        ("grey.png", Image.new("L", (8, 8), 77), [77, 77, 77]),
        ("bit.png", Image.new("1", (8, 8), 1), [255, 255, 255]),
        ("cmyk.tif", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), [255, 0, 0]),
        ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), [254, 0, 0]),
        ("16.png", Image.fromarray(np.full((8, 8), 200 * 256 + 255, np.uint16)), [200, 200, 200]),
        ("16.tif", Image.fromarray(np.full((8, 8), 200 * 256, np.uint16)), [200, 200, 200]),
        ("16.pgm", Image.fromarray(np.full((8, 8), 200 * 256, np.uint16)), [200, 200, 200]),
        ("palette.gif", Image.new("RGB", (8, 8), (255, 0, 0)).convert("P"), [255, 0, 0]),
        ("alpha.png", shape_in_alpha(), [191, 191, 191]),
        ("alpha.webp", shape_in_alpha(), [191, 191, 191]),
        ("grey_alpha.png", shape_in_alpha().convert("LA"), [191, 191, 191]),
        ("palette.png", palette_with_transparency(), [255, 191, 191]),
        ("animated.gif", animated("red", "blue"), [254, 0, 0]),
        ("animated.png", animated("red", "blue"), [255, 0, 0]),
        ("animated.webp", animated("red", "blue"), [254, 0, 0]),
        ("pages.tif", animated("red", "blue"), [255, 0, 0]),
        ("ycbcr.tif", Image.new("RGB", (8, 8), (255, 0, 0)).convert("YCbCr"), [254, 0, 0]),
        ("photo.avif", Image.new("RGB", (8, 8), (255, 0, 0)), [254, 0, 0]),
        ("photo.HEIC", Image.new("RGB", (64, 64), (255, 0, 0)), [254, 0, 0]),
        ("alpha.heic", shape_in_alpha().resize((64, 64), Image.Resampling.NEAREST), [191, 191, 191]),
    ],
)
def test_kinds_of_images(name, drawn, wanted, tmp_path):
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if name.lower().endswith("heic"):
        pytest.importorskip("pillow_heif").register_heif_opener()
    image, options = drawn if isinstance(drawn, tuple) else (drawn, {})
    image.save(tmp_path / name, **options)
    found = colour(tmp_path / name)
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= 2, found


def test_heic_needs_its_plugin(tl, tmp_path, monkeypatch):
    for split in ("train", "val"):
        for label in ("a", "b"):
            for number in range(4):
                path = tmp_path / "t" / split / label / f"IMG_{number}.HEIC"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"\0\0\0\x24ftypheic")
    monkeypatch.setattr("datamodules.decoding._reads_heic", lambda: False)
    line = (
        "fit --trainer.max_epochs 1 --model Classification --model.backbone ConvNet --data ImageFolders --data.target t"
    )
    result = tl(f"{line} --data.num_workers 0")
    assert result.code == 2
    assert "HEIC: HEIC needs pillow-heif: pip install 'lightning-transfer[heic]'" in result.err


def test_heic_trains_and_predicts(ok, tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    for split, label, number in ((s, c, i) for s in ("train", "val") for c in ("red", "blue") for i in range(4)):
        path = tmp_path / "t" / split / label / f"IMG_{number}.HEIC"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64 + number, 64), label).save(path, exif=exif(ROTATED))
    line = (
        "fit --trainer.max_epochs 1 --model Classification --model.backbone ConvNet --data ImageFolders --data.target t"
    )
    ok(f"{line} --data.image_size 32 --data.num_workers 1 --name h")
    ok("predict --run runs/h")
    assert (tmp_path / "runs/h/version_0/predictions.csv").read_text().count(".HEIC") == 8


def test_heic_is_upright(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    Image.new("RGB", (64, 32), "blue").save(tmp_path / "a.heic", exif=exif(ROTATED))
    assert reader().decode(tmp_path / "a.heic").size == (32, 64)


def test_the_background_is_the_users_to_choose(tmp_path):
    shape_in_alpha((255, 255, 255)).save(tmp_path / "white.png")
    assert colour(tmp_path / "white.png") == [255, 255, 255]  # white on white
    assert colour(tmp_path / "white.png", background="#000000") == [64, 64, 64]
    with pytest.raises(DataError, match="background: whitish is not a colour"):
        ImageFolders(tmp_path, classes=["a", "b"], background="whitish")


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_of_no_known_range_are_refused(mode, tmp_path):
    Image.new(mode, (8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif: its {mode} numbers have no known range"):
        colour(tmp_path / "a.tif")


def exif(*entries):
    """EXIF with these (tag, type, count, value) as they are."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0)


ROTATED = (0x0112, 3, 1, b"\6\0\0\0")
ODD = {
    "a text for a number": (0x011A, 2, 1, b"\xff\xff\xff\xff"),
    "a fraction for a text": (0x010F, 5, 1, b"\1\0\0\0"),
    "a negative number": (0x0100, 6, 1, b"\xff\xff\xff\xff"),
    "an offset before the file": (0x8769, 6, 1, b"\xff\xff\xff\xff"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_tag_does_not_stop_a_sound_photo(odd, tmp_path):
    picture = Image.new("RGB", (32, 16), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 16, 16))  # the left half is red
    picture.save(tmp_path / "a.jpg", exif=exif(ROTATED, ODD[odd]), quality=95)
    with pytest.raises((struct.error, AttributeError, TypeError, ValueError)):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    decoded = reader(32).decode(tmp_path / "a.jpg")
    assert decoded.size == (16, 32)
    assert decoded.getpixel((8, 4))[0] > 200  # and the camera was turned: the left is the top
    picture.save(tmp_path / "b.jpg", exif=b"Exif\0\0this is not EXIF")
    assert reader(32).decode(tmp_path / "b.jpg").size == (32, 16)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(orientation, suffix, tmp_path):
    picture = Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
    tags = Image.Exif()
    tags[0x0112] = orientation
    picture.save(tmp_path / f"a.{suffix}", exif=tags)
    wanted = ImageOps.exif_transpose(Image.open(tmp_path / f"a.{suffix}")).convert("RGB")
    assert np.array_equal(reader(32).decode(tmp_path / f"a.{suffix}"), wanted)


@pytest.mark.parametrize("size", [(65_000, 1), (1, 65_000), (4_000, 3)])
def test_a_strip_is_cropped_before_it_is_scaled(size, tmp_path):
    Image.new("RGB", size, (9, 9, 9)).save(tmp_path / "strip.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    large = reader(224)
    assert large.read(tmp_path / "strip.png").shape == (3, 224, 224)
    assert large.fit(torch.full((3, *size), 9, dtype=torch.uint8)).shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_panorama_is_scaled_as_ever(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 128, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    whole = Image.fromarray(pixels).resize((64, 16), Image.Resampling.BILINEAR).crop((24, 0, 40, 16))
    assert np.array_equal(reader(16).read(tmp_path / "a.png").permute(1, 2, 0), whole)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "WEBP"])
def test_whatever_a_broken_file_raises_is_a_sentence(kind, tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3)).astype(np.uint8)).save(whole, kind)
    data, generator = whole.getvalue(), np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for place in generator.integers(0, len(data), 8):
            broken[place] = generator.integers(256)
        (tmp_path / "a").write_bytes(broken)
        try:
            reader().read(tmp_path / "a")
        except DataError as error:
            assert str(error).startswith(f"{tmp_path}/a: ")  # noqa: PT017 - some of them are still images
