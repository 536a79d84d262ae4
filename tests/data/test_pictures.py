"""Pictures are brought to the format of Fashion-MNIST, whatever they look like."""

import gzip
import os
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fmnist_jax.data import idx
from fmnist_jax.data.pictures import prepare, read_image, read_pictures
from fmnist_jax.errors import DataError, DataWarning
from tests.data.idx_files import write_idx


@pytest.fixture(scope="module")
def article(sample):
    """An ankle boot that fills the width of its image."""
    image = sample.test_images[0]
    assert image[:, 0].any()
    assert image[:, -1].any()
    return image


def enlarge(image, factor=10):
    return np.kron(image, np.ones((factor, factor), np.uint8))


def difference(found, expected):
    return np.abs(found.astype(int) - expected).mean()


def read(path):
    (picture,) = read_pictures(path)
    return picture


def framed(article, background=0, margin=40):
    """A large picture of the article on a background, light or dark."""
    picture = np.pad(enlarge(article), margin)
    return picture if background < 128 else 255 - picture


@pytest.mark.parametrize("background", [0, 255])
def test_the_article_is_found_on_a_light_and_a_dark_background(background, article):
    image, inverted = prepare(framed(article, background))
    assert inverted == (background == 255)
    assert difference(image, article) < 4
    # The test can fail: the inverted image is far away.
    assert difference(255 - image, article) > 50


def test_a_noisy_background_with_a_gradient_is_removed(article):
    picture = 255 - framed(article).astype(float) * 0.6
    picture += np.linspace(-10, 10, picture.shape[1]) - 40
    picture += np.random.default_rng(0).normal(0, 6, picture.shape)
    image, inverted = prepare(picture.clip(0, 255).astype(np.uint8))
    assert inverted
    assert np.corrcoef(image.ravel(), article.ravel())[0, 1] > 0.9


def test_a_tall_article_is_padded_to_a_square():
    picture = np.zeros((300, 200), np.uint8)
    picture[50:250, 90:140] = 200
    image, _ = prepare(picture)
    assert image.shape == (28, 28)
    assert np.flatnonzero(image.any(axis=0)).tolist() == list(range(11, 18))
    assert image.any(axis=1).all()


@pytest.mark.parametrize("size", [(30, 40), (1, 1)])
def test_a_blank_picture_is_refused(size):
    with pytest.raises(DataError, match="shows no article"):
        prepare(np.full(size, 250, np.uint8))


@pytest.mark.parametrize(("background", "shade"), [(60, -60), (120, -90), (140, 90), (190, 65)])
def test_the_article_decides_whether_a_grey_picture_is_inverted(background, shade, article):
    picture = background + shade / 255 * framed(article).astype(float)
    image, inverted = prepare(picture.round().astype(np.uint8))
    assert inverted == (shade < 0)
    assert np.corrcoef(image.ravel(), article.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("sigma", [0, 10, 20, 30])
@pytest.mark.parametrize("background", [255, 128])
def test_noise_does_not_hide_the_article(sigma, background, article):
    noise = np.random.default_rng(0).normal(0, sigma, framed(article).shape)
    picture = background - framed(article) * 0.5 + noise
    image, _ = prepare(picture.round().clip(0, 255).astype(np.uint8))
    # 0.4 if it is not cut out.
    assert np.corrcoef(image.ravel(), article.ravel())[0, 1] > 0.75
    assert image[:3, 12:].max() < 16  # the background above the boot


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_formats_and_colours(suffix, mode, article, tmp_path):
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(framed(article, 255)).convert(mode).save(path, quality=95)
    picture = read(path)
    assert (picture.name, picture.inverted) == (str(path), True)
    assert difference(picture.image, article) < 6


def test_sixteen_bits_and_palettes(article, tmp_path):
    picture = framed(article)
    Image.fromarray(picture.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(picture).convert("P").save(tmp_path / "palette.png")
    for name in ("deep.png", "palette.png"):
        assert difference(read(tmp_path / name).image, article) < 4, name


def test_the_orientation_of_a_camera_is_followed(article, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    turned = np.rot90(framed(article, 255))
    Image.fromarray(turned).save(tmp_path / "photo.jpg", quality=95, exif=exif)
    assert difference(read(tmp_path / "photo.jpg").image, article) < 6


@pytest.mark.parametrize("is_light", [False, True])
def test_a_transparent_background_is_that_which_the_article_differs_from(
    is_light, article, tmp_path
):
    large = framed(article)
    alpha = np.where(large > 0, 255, 0).astype(np.uint8)
    grey = np.where(alpha > 0, np.maximum(large, 130), 0) if is_light else (255 - large) // 2
    pixels = np.stack([grey, grey, grey, alpha], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    picture = read(tmp_path / "cut.png")
    assert picture.inverted == (not is_light)
    assert np.corrcoef(picture.image.ravel(), article.ravel())[0, 1] > 0.8


def test_images_of_an_idx_file_are_left_as_they_are(sample, tmp_path):
    path = tmp_path / "images.gz"
    write_idx(path, sample.test_images[:3])
    pictures: list = list(read_pictures(path))
    np.testing.assert_array_equal([p.image for p in pictures], sample.test_images[:3])
    assert pictures[2].name == f"{path}[2]"


def bad_files(folder):
    Image.fromarray(np.eye(50, dtype=np.uint8) * 255).save(folder / "good.png")
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg"):
        Image.fromarray(noise).save(folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    Image.new("L", (100_000, 2)).save(folder / "wide.png")
    Image.new("1", (15_000, 15_000)).save(folder / "bomb.png")
    (folder / "no-rows").write_bytes(np.array([idx.IMAGES_MAGIC, 3, 0, 28], ">u4").tobytes())
    header = np.array([idx.IMAGES_MAGIC, 2**31, 2**31, 4], ">u4")
    (folder / "wraps").write_bytes(header.tobytes())
    content = (folder / "good.png").read_bytes()
    # A chunk of an Exif header that ends within its second number.
    exif = b"eXIfMM\x00*\x00\x00"
    chunk = len(exif[4:]).to_bytes(4, "big") + exif + zlib.crc32(exif).to_bytes(4, "big")
    (folder / "exif.png").write_bytes(content[:33] + chunk + content[33:])
    (folder / "gzip.gz").write_bytes(b"\x1f\x8bnothing")
    (folder / "folder.png").mkdir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.png", "is damaged"), ("cut.jpg", "is damaged"), ("text.png", "is not a PNG, JPEG"),
        ("empty.png", "is empty"), ("wide.png", "100,000 x 2 pixels"),
        ("bomb.png", "too many pixels"), ("gzip.gz", "damaged gzip file"),
        ("no-rows", "holds no pixel"), ("wraps", "its header says"), ("exif.png", "is damaged"),
        ("missing.png", "cannot be read"), ("folder.png", "cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_picture_is_refused(name, message, tmp_path):
    bad_files(tmp_path)
    assert read(tmp_path / "good.png")
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_every_flipped_bit_of_the_pixels_of_a_png_is_found(article, tmp_path):
    path = tmp_path / "shirt.png"
    Image.fromarray(255 - framed(article)).save(path)
    content = path.read_bytes()
    start = content.index(b"IDAT") + 4
    end = start + int.from_bytes(content[start - 8 : start - 4], "big")
    for position in range(start, end, 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is damaged: a checksum is wrong"):
            read(path)


def test_long_texts_and_profiles_of_a_png_are_no_damage(article, tmp_path):
    info = PngInfo()
    info.add_text("prompt", "x" * 3_000_000, zip=True)
    plain, noted = tmp_path / "plain.png", tmp_path / "noted.png"
    Image.fromarray(framed(article)).save(plain)
    Image.fromarray(framed(article)).save(noted, pnginfo=info, icc_profile=bytes(2_000_000))
    np.testing.assert_array_equal(read(noted).image, read(plain).image)


def test_a_warning_of_pillow_names_the_file(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\0"  # 255 entries, and none follows
    Image.fromarray(np.eye(50, dtype=np.uint8) * 255).save(tmp_path / "a.jpg", exif=exif)
    with pytest.warns(DataWarning, match=r"a\.jpg: Corrupt EXIF data"):
        read(tmp_path / "a.jpg")


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("background", [0, 255])
@pytest.mark.parametrize("margin", [0, 40])
def test_a_frame_is_removed(width, background, margin, article):
    picture = framed(article, background, margin)
    expected, inverted = prepare(picture)
    image, frame_inverted = prepare(np.pad(picture, width, constant_values=255 - background))
    assert frame_inverted == inverted
    assert difference(image, expected) < 3


@pytest.mark.parametrize(("suffix", "quality"), [("jpg", 75), ("webp", 80)])
def test_a_frame_is_removed_from_a_lossy_picture(suffix, quality, article, tmp_path):
    picture = np.pad(framed(article, 255), 2, constant_values=90)
    Image.fromarray(picture).save(tmp_path / f"a.{suffix}", quality=quality)
    assert difference(read(tmp_path / f"a.{suffix}").image, article) < 6


def test_a_plain_bag_in_a_narrow_margin_is_no_frame():
    picture = np.pad(np.full((100, 100), 90, np.uint8), 2, constant_values=255)
    image, inverted = prepare(picture)
    assert inverted
    assert (image == 165).mean() > 0.9


def test_a_blank_image_does_not_hide_the_rest_of_its_file(tmp_path):
    images = np.zeros((5, 30, 30), np.uint8)
    images[[0, 1, 3, 4], 10:20, 10:20] = 200
    write_idx(tmp_path / "five-idx3-ubyte", images)
    found = list(read_pictures(tmp_path / "five-idx3-ubyte"))
    assert [isinstance(each, DataError) for each in found] == [False, False, True, False, False]
    assert str(found[2]).startswith("image 2 shows no article")


def test_an_idx_file_is_recognised_by_its_content(sample, tmp_path):
    path = tmp_path / "images.gz"
    write_idx(path, sample.test_images[:3])
    path.write_bytes(gzip.decompress(path.read_bytes()))  # as browsers do
    np.testing.assert_array_equal(idx.read_images(tmp_path / "images.gz"), sample.test_images[:3])


def test_a_gzip_file_of_several_members_is_read_whole(sample, tmp_path):
    write_idx(tmp_path / "images.gz", sample.test_images[:3])
    content = gzip.decompress((tmp_path / "images.gz").read_bytes())
    members = gzip.compress(content[:20]) + gzip.compress(content[20:])
    (tmp_path / "images.gz").write_bytes(members)
    np.testing.assert_array_equal(idx.read_images(tmp_path / "images.gz"), sample.test_images[:3])
    (tmp_path / "images.gz").write_bytes(members + gzip.compress(content))
    with pytest.raises(DataError, match="but it holds more"):
        idx.read_images(tmp_path / "images.gz")


def test_a_gzip_file_is_not_unpacked_further_than_its_header_says(tmp_path):
    path = tmp_path / "backup.tar.gz"
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    tracemalloc.start()
    with pytest.raises(DataError, match="not an IDX file"):
        list(read_pictures(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_pipes_are_read_and_without_a_writer_empty(article, tmp_path):
    Image.fromarray(framed(article)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is empty"):
        read(tmp_path / "pipe")
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as file:
        file.write((tmp_path / "a.png").read_bytes())
    picture = read(Path(f"/dev/fd/{read_end}"))
    os.close(read_end)
    np.testing.assert_array_equal(picture.image, read(tmp_path / "a.png").image)
    with pytest.raises(DataError, match="is neither a file nor a pipe"):
        read(Path("/dev/zero"))


@pytest.fixture(scope="module")
def photo():
    """Three soft blobs, one per channel, uint8[60, 90, 3]."""
    y, x = np.mgrid[:60, :90]
    centers = ((20, 20), (40, 45), (25, 70))
    blobs = [np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 200) for cy, cx in centers]
    return (255 * np.stack(blobs, -1)).round().astype(np.uint8)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_an_image_has_the_pixels_of_its_file(channels, photo, tmp_path):
    grey = np.asarray(Image.fromarray(photo).convert("L"))
    for name, pixels in (("grey", grey), ("colour", photo)):
        path = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(path)
        expected = grey if channels == 1 else pixels
        if channels == 3 and pixels is grey:
            expected = np.stack([grey] * 3, -1)
        for source in (path, path.read_bytes()):
            np.testing.assert_array_equal(read_image(source, channels), expected)


def test_resizing_averages_over_all_pixels(photo, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    image = read_image(tmp_path / "noise.png", size=(20, 60))
    assert image.shape == (20, 60, 3)
    # Of uniform values; nearest pixels would have 74. A triangle of twice 30 x 15 pixels averages
    # as many pixels as a box of 1.5 ** 2 * 30 * 15.
    assert image.std() == pytest.approx(255 / 12**0.5 / (1.5 * 450**0.5), rel=0.1)
    # No seams beside an edge.
    Image.fromarray(np.repeat([[50, 200]], 300, 1).astype(np.uint8)).save(tmp_path / "edge.png")
    edge = read_image(tmp_path / "edge.png", size=(1, 40))
    assert (edge.min(), edge.max()) == (50, 200)
    # Enlarged and not square: the blobs stay where they are.
    Image.fromarray(photo).save(tmp_path / "photo.png")
    large = read_image(tmp_path / "photo.png", size=(240, 180))
    peaks = [np.unravel_index(large[..., k].argmax(), (240, 180)) for k in range(3)]
    np.testing.assert_allclose(peaks, [(82, 41), (162, 91), (102, 141)], atol=2)


def test_an_image_is_upright_on_white_and_of_eight_bits(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    Image.fromarray(np.rot90(photo)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), photo)
    alpha = np.random.default_rng(0).integers(0, 256, photo.shape[:2], dtype=np.uint8)
    Image.fromarray(np.dstack([photo, alpha])).save(tmp_path / "a.webp", lossless=True, exact=True)
    share = alpha[..., None] / 255
    expected = photo * share + 255 * (1 - share)
    assert np.abs(read_image(tmp_path / "a.webp") - expected).max() < 1
    Image.fromarray(np.dstack([photo[..., 0], alpha])).save(tmp_path / "b.png")
    assert np.abs(read_image(tmp_path / "b.png") - expected[..., 0]).max() < 1
    Image.fromarray(photo[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), photo[..., 0])
    Image.fromarray(photo).quantize(16).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == photo.shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.png", "is damaged"), ("cut.jpg", "is damaged"), ("text.png", "is not a PNG, JPEG"),
        ("empty.png", "is empty"), ("wide.png", "100,000 x 2 pixels"),
        ("bomb.png", "too many pixels"), ("exif.png", "is damaged"),
        ("missing.png", "cannot be read"), ("folder.png", "cannot be read"),
    ],
)  # fmt: skip
def test_an_image_that_cannot_be_read_is_refused(name, message, tmp_path):
    bad_files(tmp_path)
    with pytest.raises(DataError, match=message):
        read_image(tmp_path / name)
    if (tmp_path / name).is_file():
        with pytest.raises(DataError, match=message):
            read_image((tmp_path / name).read_bytes(), 3, (28, 28))


@pytest.mark.parametrize("image_shape", [(20, 30), (20, 30, 3)])
def test_pictures_of_other_sets_are_resized_only(image_shape, photo, tmp_path):
    alpha = np.full(photo.shape[:2], 255, np.uint8)
    alpha[:20, 60:] = 0
    Image.fromarray(np.dstack([photo, alpha])).save(tmp_path / "cut.png")
    picture: Any
    (picture,) = read_pictures(tmp_path / "cut.png", image_shape)
    channels = 1 if len(image_shape) == 2 else 3
    expected = read_image(tmp_path / "cut.png", channels, (20, 30))
    np.testing.assert_array_equal(picture.image, expected)
    assert picture.image[0, -1].min() == 255  # neither inverted nor trimmed
    assert (picture.inverted, picture.is_original) == (False, False)
    images = np.zeros((3, 20, 30), np.uint8)  # blank ones are images like others
    images[1], images[2] = 7, 255
    write_idx(tmp_path / "images-idx3-ubyte", images)
    pictures: list = list(read_pictures(tmp_path / "images-idx3-ubyte", image_shape))
    expected = images if channels == 1 else np.stack([images] * 3, -1)
    np.testing.assert_array_equal([picture.image for picture in pictures], expected)
