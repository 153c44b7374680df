from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from llava_kit.errors import SampleError
from llava_kit.images import decode_image, load_image, resolve_image


@dataclass(frozen=True)
class Limits:
    max_pixels: int = 50_000_000
    max_aspect: float = 200.0


LIMITS = Limits()


def save(folder: Path, image: Image.Image, name: str = "image.png", **options: object) -> Path:
    path = folder / name
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def claiming_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff", "ppm"])
def test_ordinary_pictures(suffix: str, tmp_path: Path) -> None:
    image = load_image(save(tmp_path, Image.new("RGB", (8, 6), (255, 0, 0)), f"a.{suffix}"), LIMITS)
    assert (image.mode, image.size) == ("RGB", (8, 6))
    red, green, blue = image.getpixel((4, 3))  # type: ignore[misc]
    assert red > 250 and green < 5 and blue < 5


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    path = save(tmp_path, Image.new("RGB", (2, 2)), "a.png").rename(tmp_path / "a.jpg")
    assert load_image(path, LIMITS).size == (2, 2)


def test_a_picture_lying_on_its_side_is_turned(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), (0, 0, 255))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90° clockwise: left becomes top
    upright = load_image(save(tmp_path, image, exif=exif), LIMITS)
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == (255, 0, 0)


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    for copy in (image, image.convert("LA")):
        assert load_image(save(tmp_path, copy), LIMITS).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(save(tmp_path, image), LIMITS).getpixel((1, 0)) == (200, 0, 0)
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert load_image(save(tmp_path, half), LIMITS).getpixel((0, 0)) == (127, 127, 127)


def test_a_transparent_colour_of_a_palette_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([9, 9, 9, 0, 200, 0])
    image.putpixel((1, 0), 1)
    loaded = load_image(save(tmp_path, image, transparency=0), LIMITS)
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 200, 0)]


def test_print_colours(tmp_path: Path) -> None:
    loaded = load_image(save(tmp_path, Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "a.jpg"), LIMITS)
    assert loaded.mode == "RGB" and min(loaded.getpixel((4, 4))) > 250  # type: ignore[type-var, arg-type]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_16_bits_is_scaled_and_not_cut_off(suffix: str, tmp_path: Path) -> None:
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    loaded = load_image(save(tmp_path, Image.fromarray(grey), f"a.{suffix}"), LIMITS)
    assert [loaded.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_grey_of_floating_point_is_scaled(tmp_path: Path) -> None:
    grey = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    loaded = load_image(save(tmp_path, Image.fromarray(grey), "a.tiff"), LIMITS)
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in (0, 128, 255)]


def test_the_first_picture_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    path = save(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(path, LIMITS).getpixel((0, 0)) == (255, 0, 0)


def test_a_single_pixel(tmp_path: Path) -> None:
    assert load_image(save(tmp_path, Image.new("1", (1, 1), 1)), LIMITS).getpixel((0, 0)) == (255, 255, 255)


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(path: Path, limits: Limits = LIMITS) -> str:
    with pytest.raises(SampleError) as error:
        load_image(path, limits)
    problem = error.value.problems[0]
    assert problem.where == str(path)
    return problem.what


def test_a_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone.png") == "there is no such image"
    assert "cannot be opened" in refusal(tmp_path / ("x" * 300))


def test_a_picture_cut_in_half_is_refused_even_if_somebody_allowed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    path = save(tmp_path, Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)), "a.jpg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(path).startswith("the image is broken: ")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert refusal(path).startswith("the image is broken: ")


@pytest.mark.parametrize("content", [b"", b"<html>no picture</html>", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_pictures(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert refusal(tmp_path / "a.png").startswith(("this is no picture", "the image is broken"))


def test_formats_that_start_other_programs_are_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, Image.new("RGB", (4, 4)), "a.eps")
    assert refusal(path) == "this is no picture in a format that is read"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_that_claims_to_be_huge_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(claiming_png(10_000, 10_000))
    assert refusal(path) == "the image is too large: 10000×10000 pixels, where 50,000,000 are allowed"
    path.write_bytes(claiming_png(60_000, 60_000))  # Pillow itself refuses this one
    assert refusal(path).startswith("the image is too large: ")


def test_a_thin_picture_is_refused_by_its_header(tmp_path: Path) -> None:
    path = save(tmp_path, Image.new("L", (1, 201)))
    assert refusal(path) == "the image is too thin: 1×201, where 1 to 200 is allowed"
    assert load_image(path, Limits(max_aspect=201)).size == (1, 201)


def test_grey_beyond_its_range(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(np.array([[0.0, 300.0]], dtype=np.float32)), "a.tiff")
    assert refusal(path) == "the grey values are out of range: 0 to 300, where 0 to 1 is allowed"
    path = save(tmp_path, Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)), "b.tiff")
    assert refusal(path).startswith("the grey values are out of range")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(20))
def test_damaged_files_are_loaded_or_refused_and_never_crash(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    suffix = ["png", "jpg", "gif", "tiff", "webp", "bmp"][seed % 6]
    path = save(tmp_path, Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)), f"a.{suffix}")
    data = bytearray(path.read_bytes())
    for place in rng.integers(0, len(data), 12):
        data[place] = int(rng.integers(0, 256))
    try:
        assert decode_image(io.BytesIO(bytes(data)), "upload", LIMITS).mode == "RGB"
    except SampleError as error:
        assert error.problems[0].where == "upload"


def test_a_pipe_that_poses_as_an_image_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert refusal(tmp_path / "a.png") == "this is no regular file"
    assert refusal(tmp_path) == "this is no regular file"


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_path_inside_the_folder(tmp_path: Path) -> None:
    assert resolve_image(tmp_path, "train/0001.jpg") == tmp_path / "train" / "0001.jpg"
    (tmp_path / "link").symlink_to(tmp_path / "train")
    assert resolve_image(tmp_path, "link/a.jpg") == tmp_path / "link" / "a.jpg"


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "real")
    assert resolve_image(tmp_path / "images", "a.jpg") == tmp_path / "images" / "a.jpg"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("/etc/passwd", "an image's path must be relative"),
        ("C:\\a.jpg", "an image's path must be relative"),
        ("../a.jpg", "the path leads out of the image folder"),
        ("a/../../b.jpg", "the path leads out of the image folder"),
        ("..\\a.jpg", "the path leads out of the image folder"),
        ("https://example.com/a.jpg", "images are read from files, not from addresses"),
        ("file:///a.jpg", "images are read from files, not from addresses"),
        ("data:image/png;base64,AAAA", "images are read from files, not from addresses"),
        ("", "this is no file name"),
        ("a\0.jpg", "this is no file name"),
    ],
)
def test_paths_that_are_refused(name: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=complaint):
        resolve_image(tmp_path, name)


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").symlink_to("/etc/passwd")
    with pytest.raises(SampleError, match="a link leads out of the image folder"):
        resolve_image(tmp_path / "images", "a.jpg")


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="this is no file name"):
        resolve_image(tmp_path, "\ud800.png")
