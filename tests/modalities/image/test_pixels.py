"""Pictures in every format, built here with known values, must come out as a person would see them."""

import struct
import threading
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from provq.errors import UserError
from provq.modalities.image.pixels import (
    UnreadableImage,
    contact_sheet,
    read_image,
    to_image,
    to_png,
    to_tensor,
)

# Four colours that every lossless format and a palette can hold; 3 rows of 4 so that no axis hides a swap.
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 200, 90]], dtype=np.uint8)
UPRIGHT = COLOURS[np.array([[0, 1, 2, 3], [3, 3, 0, 1], [2, 0, 1, 1]])]


def saved(image, file_format, **options):
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def raw_png(width, height, bits, colour_type, pixels):
    """A PNG file written from its specification, for the kinds that Pillow cannot write."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = len(pixels) // height
    scanlines = b"".join(b"\0" + pixels[start : start + row] for start in range(0, len(pixels), row))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")
    )


def read_pixels(data):
    image = read_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("JPEG2000", {}),
    ],
)
def test_lossless_rgb_is_read_exactly(file_format, options):
    assert np.array_equal(read_pixels(saved(Image.fromarray(UPRIGHT), file_format, **options)), UPRIGHT)


def test_jpeg_is_read_closely():
    smooth = np.broadcast_to(np.linspace(20, 220, 32).astype(np.uint8)[:, None, None], (32, 24, 3))
    read = read_pixels(saved(Image.fromarray(smooth), "JPEG", quality=95))
    assert np.abs(read.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM", "BMP"])
def test_grey_becomes_three_equal_channels(file_format):
    grey = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    assert np.array_equal(read_pixels(saved(Image.fromarray(grey), file_format)), np.stack([grey] * 3, axis=-1))


def test_one_bit_pictures_are_black_and_white():
    bits = Image.fromarray(np.array([[0, 255, 0]], dtype=np.uint8)).convert("1")
    assert read_pixels(saved(bits, "PNG"))[0, :, 0].tolist() == [0, 255, 0]


def test_grey_with_alpha_is_laid_over_white():
    values = np.array([[[100, 0], [100, 255], [100, 51]]], dtype=np.uint8)
    read = read_pixels(saved(Image.fromarray(values), "PNG"))
    # 51 is a fifth of 255, so the last pixel is a fifth of 100 and four fifths of 255.
    assert read[0, :, 1].tolist() == [255, 100, 224]


@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_rgba_is_laid_over_white(file_format, options):
    values = np.array([[[200, 0, 100, 255], [200, 0, 100, 0], [200, 0, 100, 51]]], dtype=np.uint8)
    read = read_pixels(saved(Image.fromarray(values), file_format, **options))
    expected = [[200, 0, 100], [255, 255, 255], [244, 204, 224]]
    assert np.abs(read[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("file_format", "transparency", "expected"),
    [
        ("PNG", 1, [[250, 0, 0], [255, 255, 255], [0, 0, 250]]),
        ("GIF", 1, [[250, 0, 0], [255, 255, 255], [0, 0, 250]]),
        ("PNG", b"\x00\xff\x33", [[255, 255, 255], [0, 250, 0], [204, 204, 254]]),
    ],
)
def test_transparent_palette_entries_are_laid_over_white(file_format, transparency, expected):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    image.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    read = read_pixels(saved(image, file_format, transparency=transparency))
    assert np.abs(read[0].astype(int) - expected).max() <= 1


def test_a_transparent_colour_of_an_rgb_png_is_white():
    image = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8))
    read = read_pixels(saved(image, "PNG", transparency=(1, 2, 3)))
    assert read[0].tolist() == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize(("file_format", "tolerance"), [("TIFF", 0), ("JPEG", 3)])
def test_cmyk_colours(file_format, tolerance):
    inks = {(0, 255, 255, 0): (255, 0, 0), (255, 255, 0, 0): (0, 0, 255), (0, 0, 0, 255): (0, 0, 0)}
    for ink, colour in inks.items():
        image = Image.new("CMYK", (8, 8), ink)
        read = read_pixels(saved(image, file_format))
        assert np.abs(read.astype(int) - colour).max() <= tolerance


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_grey_keeps_the_high_byte(file_format):
    values = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    read = read_pixels(saved(Image.fromarray(values), file_format))
    assert read[0].tolist() == [[level] * 3 for level in (0, 0, 1, 0x12, 0x80, 0xFF)]


def test_sixteen_bit_grey_big_endian_tiff():
    big = Image.frombytes("I;16B", (2, 1), b"\x12\x34\xfe\xdc")
    read = read_pixels(saved(big, "TIFF"))
    assert read[0, :, 0].tolist() == [0x12, 0xFE]


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (3, 2)])
def test_sixteen_bit_png_written_from_the_specification(channels, colour_type):
    values = np.array([0x0000, 0x12FF, 0x8001, 0xFFFF, 0x00FF, 0x7F80], dtype=">u2")
    data = raw_png(6 // channels, 1, 16, colour_type, values.tobytes())
    high = np.array([0x00, 0x12, 0x80, 0xFF, 0x00, 0x7F])
    expected = high.reshape(1, -1, channels).repeat(3 // channels, axis=-1)
    assert np.array_equal(read_pixels(data), expected)


# What the first stored row and column show of the upright picture, as the EXIF standard defines it.
STORED = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright.swapaxes(0, 1)[::-1],  # right, top
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_exif_orientation_is_undone(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    assert np.array_equal(read_pixels(saved(stored, file_format, exif=exif)), UPRIGHT)


def test_exif_orientation_of_a_jpeg_and_of_sixteen_bits():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(saved(Image.new("RGB", (24, 16)), "JPEG", exif=exif)).size == (16, 24)
    deep = np.array([[0x1000, 0x2000, 0x3000]], dtype=np.uint16)
    turned = read_pixels(saved(Image.fromarray(deep), "PNG", exif=exif))
    assert turned[:, :, 0].tolist() == [[0x10], [0x20], [0x30]]


def test_a_picture_with_broken_exif_stays_as_it_lies():
    data = saved(Image.fromarray(UPRIGHT), "PNG", exif=b"Exif\0\0no such thing")
    assert np.array_equal(read_pixels(data), UPRIGHT)


FRAMES = [Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 0, 255))]


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_no_picture(file_format):
    with pytest.raises(UnreadableImage, match="it is an animation"):
        read_image(saved(FRAMES[0], file_format, save_all=True, append_images=FRAMES[1:]))
    assert read_pixels(saved(FRAMES[0], file_format, save_all=True)).shape == (2, 2, 3)


def test_the_first_page_of_several_is_taken():
    data = saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:])
    assert read_pixels(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"])
def test_truncated_files_are_unreadable(file_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), file_format)
    assert read_image(data).size == (64, 64)
    with pytest.raises(UnreadableImage) as caught:
        read_image(data[: len(data) // 2])
    assert caught.value.reason


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"P6 2 2"])
def test_other_bytes_are_unreadable(data):
    with pytest.raises(UnreadableImage):
        read_image(data)


def test_damage_inside_a_file_is_unreadable():
    data = bytearray(saved(Image.fromarray(UPRIGHT), "PNG"))
    data[data.index(b"IDAT") + 6] ^= 0xFF
    with pytest.raises(UnreadableImage, match="damaged"):
        read_image(bytes(data))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_a_range_are_unreadable(dtype):
    data = saved(Image.fromarray(np.array([[0, 70_000]], dtype=dtype)), "TIFF")
    with pytest.raises(UnreadableImage, match="no defined range"):
        read_image(data)


@pytest.mark.parametrize("side", [11, 20])  # Pillow only warns up to twice its limit, and fails beyond it.
def test_a_decompression_bomb_is_unreadable_and_nothing_is_warned(monkeypatch, side):
    data = saved(Image.new("RGB", (side, side)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(UnreadableImage, match=f"too large.*{side * side}"):
            read_image(data)
    assert seen == []


def test_decoder_warnings_do_not_leak():
    # A TIFF directory that claims more entries than it has makes Pillow warn about metadata.
    data = saved(Image.fromarray(UPRIGHT), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01\x03\0\x01")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Image.open(BytesIO(data)).getexif()
        assert seen, "the picture must make Pillow warn, or this test shows nothing"
        seen.clear()
        assert read_image(data).size == (4, 3)
        assert seen == []


def test_threads_leave_the_warning_filters_as_they_were():
    data = saved(Image.fromarray(UPRIGHT), "PNG")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [read_image(data) for _ in range(30)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_unreadable_image_is_a_data_error():
    assert issubclass(UnreadableImage, UserError)
    assert UnreadableImage("why").exit_code == 1


pictures = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)))


@settings(deadline=None)
@given(pictures)
def test_to_image_undoes_to_tensor(pixels):
    values = to_tensor(Image.fromarray(pixels))
    assert values.shape == (3, *pixels.shape[:2])
    assert values.dtype == torch.float32
    assert np.array_equal(np.asarray(to_image(values)), pixels)


def test_all_levels_are_evenly_spread_over_the_range():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = to_tensor(Image.fromarray(np.stack([levels] * 3, axis=-1)))
    assert values[0].flatten().numpy() == pytest.approx(np.linspace(-1, 1, 256), abs=1e-6)


def test_to_tensor_puts_channels_first():
    values = to_tensor(Image.new("RGB", (5, 2), (255, 0, 255)))
    assert values.shape == (3, 2, 5)
    assert values[:, 0, 0].tolist() == [1.0, -1.0, 1.0]


def test_to_image_clamps_and_rounds():
    values = torch.tensor([-7.0, 7.0, 0.4 / 127.5, 0.6 / 127.5]).view(1, 1, 4).expand(3, 1, 4)
    assert np.asarray(to_image(values.requires_grad_()))[0, :, 0].tolist() == [0, 255, 128, 128]
    assert np.asarray(to_image(torch.full((3, 1, 1), -0.6 / 127.5)))[0, 0, 0] == 127


@settings(deadline=None)
@given(pictures)
def test_to_png_is_lossless(pixels):
    assert np.array_equal(read_pixels(to_png(Image.fromarray(pixels))), pixels)


def test_contact_sheet_centres_pictures_in_equal_cells():
    red, blue = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (2, 6), "blue")
    sheet = contact_sheet([[red, blue], [blue]], gap=1)
    # Cells of 4 x 6, a pixel around each.
    assert sheet.size == (1 + 2 * 5, 1 + 2 * 7)
    expected = np.full((15, 11, 3), 255, dtype=np.uint8)
    expected[3:5, 1:5] = (255, 0, 0)
    expected[1:7, 7:9] = (0, 0, 255)
    expected[8:14, 2:4] = (0, 0, 255)
    assert np.array_equal(np.asarray(sheet), expected)


def test_contact_sheet_of_nothing():
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([[], []])
