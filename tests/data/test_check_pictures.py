import struct
import zlib

import numpy as np
import pytest
from folder_checks import NOTE, WARNING, checked, expect, png
from PIL import Image

from domainstudio.data.check import read_picture


def test_exif_rotation(folder, noise):
    pixels = noise(48, 48)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: upright means a quarter turn clockwise
    for suffix in ("png", "tiff"):
        Image.fromarray(pixels).save(folder / f"turned.{suffix}", exif=exif)
        expect(checked(folder), f"turned.{suffix}", NOTE, "EXIF", "turned upright")
        assert (np.asarray(read_picture(folder / f"turned.{suffix}")) == np.rot90(pixels, -1)).all()
        (folder / f"turned.{suffix}").unlink()


def test_transparency_is_composited_on_white(folder, noise):
    pixels = noise(channels=4)
    pixels[..., 3] = 255
    pixels[:8, :8, 3] = 0
    pixels[8:16, :8] = (0, 0, 0, 51)
    Image.fromarray(pixels).save(folder / "clear.png")
    expect(checked(folder), "clear.png", WARNING, "transparent", "white")
    seen = np.asarray(read_picture(folder / "clear.png"))
    assert (seen[:8, :8] == 255).all()
    assert (seen[8:16, :8] == 204).all()
    assert (seen[16:] == pixels[16:, :, :3]).all()


def test_opaque_alpha_is_not_mentioned(folder, noise):
    pixels = noise(channels=4)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(folder / "opaque.png")
    assert checked(folder).findings == ()


@pytest.mark.parametrize("transparency", [0, b"\x00\xff\x80"])
def test_palette_transparency(folder, noise, transparency):
    indices = noise(channels=1)[..., 0] % 2
    indices[0, 0] = 0
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette([0, 0, 0, 200, 100, 50])
    picture.save(folder / "palette.png", transparency=transparency)
    expect(checked(folder), "palette.png", WARNING, "transparent", "white")
    seen = np.asarray(read_picture(folder / "palette.png"))
    assert (seen[indices == 0] == 255).all()
    assert (seen[indices == 1] == (200, 100, 50)).all()


def test_palette_transparency_that_no_pixel_uses(folder, noise):
    picture = Image.fromarray(noise()).quantize(16)
    picture.save(folder / "palette.png", transparency=200)
    assert checked(folder).findings == ()


def test_greyscale(folder, noise):
    pixels = noise(channels=1)[..., 0]
    Image.fromarray(pixels).save(folder / "grey.png")
    expect(checked(folder), "grey.png", NOTE, "greyscale", "used as RGB")
    assert (np.asarray(read_picture(folder / "grey.png")) == pixels[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_not_clipped(folder, suffix):
    levels = np.random.default_rng(1).integers(0, 256, (12, 12)).repeat(4, axis=0).repeat(4, axis=1)
    path = folder / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 48 48 65535\n" + (levels * 257).astype(">u2").tobytes())
    else:
        Image.fromarray((levels * 257).astype(np.uint16)).save(path)
    assert [(found.severity, found.problem) for found in checked(folder).findings] == [
        (NOTE, "has 16 bits a channel"),
        (NOTE, "is greyscale"),
    ]
    assert (np.asarray(read_picture(path)) == levels[..., None]).all()


def test_16_bit_colour(folder):
    levels = np.random.default_rng(1).integers(0, 256, (12, 12, 3)).repeat(4, axis=0).repeat(4, axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in (levels * 257).astype(">u2"))
    content = png(48, 48, (b"IDAT", zlib.compress(rows)))
    header = content[12:24] + bytes([16]) + content[25:29]  # the byte after the size is the bit depth
    path = folder / "deep.png"
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    expect(checked(folder), "deep.png", NOTE, "16 bits", "scaled to 8 bits")
    assert (np.asarray(read_picture(path)) == levels).all()


def test_16_bits_with_a_transparent_level(folder):
    levels = np.full((48, 48), 1000, np.uint16)
    levels[:, 24:] = 257 * 80
    content = b"".join(b"\0" + row.tobytes() for row in levels.astype(">u2"))
    raw = png(48, 48, (b"tRNS", struct.pack(">H", 1000)), (b"IDAT", zlib.compress(content)))
    header = raw[12:24] + bytes([16, 0]) + raw[26:29]
    path = folder / "deep.png"
    path.write_bytes(raw[:12] + header + struct.pack(">I", zlib.crc32(header)) + raw[33:])
    assert "has transparent parts" in [found.problem for found in checked(folder).findings]
    assert (np.asarray(read_picture(path))[0, [0, 47], 0] == (255, 80)).all()


def test_cmyk(folder, noise):
    Image.fromarray(noise()).convert("CMYK").save(folder / "print.jpg", quality=95)
    expect(checked(folder), "print.jpg", NOTE, "CMYK", "RGB")
    assert read_picture(folder / "print.jpg").mode == "RGB"


def test_small_for_the_resolution(folder):
    check = checked(folder, resolution=64)
    assert {found.severity for found in check.findings} == {WARNING}
    assert all("48 x 48 px" in found.problem and "64" in found.problem for found in check.findings)
    assert all("enlarged" in found.remedy for found in check.findings)
    assert len(check.findings) == len(check.images) == 4
    assert checked(folder, resolution=48).findings == ()


def test_tiny_without_a_resolution(folder, noise):
    Image.fromarray(noise(31, 31)).save(folder / "tiny.png")
    expect(checked(folder), "tiny.png", WARNING, "is small", "soft")


@pytest.mark.parametrize(("width", "severity", "lost"), [(60, NOTE, "20%"), (72, NOTE, "33%"), (96, WARNING, "50%")])
def test_not_square(folder, noise, width, severity, lost):
    Image.fromarray(noise(48, width)).save(folder / "wide.png")
    expect(checked(folder), "wide.png", severity, f"loses {lost}", "crop it yourself")


def test_shape_is_judged_upright(folder, noise):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(48, 96)).save(folder / "tall.png", exif=exif)
    assert any("48 x 96 px" in found.problem for found in checked(folder).findings)


def test_lying_and_missing_suffixes(folder, noise):
    Image.fromarray(noise()).save(folder / "really.jpg", "PNG")
    check = checked(folder)
    expect(check, "really.jpg", NOTE, "is a PNG picture", "nothing to do")
    assert folder / "really.jpg" in check.images
    (folder / "really.jpg").rename(folder / "UPPER.PNG")
    assert checked(folder).findings == ()
    (folder / "UPPER.PNG").rename(folder / "none")
    expect(checked(folder), "none", NOTE, "is a PNG picture", "nothing to do")


def test_what_pillow_complains_of_is_passed_on(folder, noise):
    cut_exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"  # promises five entries and holds part of one
    Image.fromarray(noise()).save(folder / "odd.jpg", exif=cut_exif)
    expect(checked(folder), "odd.jpg", WARNING, "Corrupt EXIF data", "look at it")
