import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import domainstudio.data.check as check_module
from domainstudio.data.check import FolderCheck, check_folder, natural_key, read_picture
from domainstudio.errors import UserError

ERROR, WARNING, NOTE = "error", "warning", "note"


def files_of(folder):
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def checked(folder, resolution=None) -> FolderCheck:
    """The check, after making sure that it changed nothing on disk."""
    before = files_of(folder)
    result = check_folder(folder, resolution)
    assert files_of(folder) == before
    return result


def only(check: FolderCheck, name: str):
    """The single finding of the folder; it must be about `name`."""
    assert [finding.path.name for finding in check.findings] == [name]
    return check.findings[0]


def expect(check: FolderCheck, name: str, severity: str, problem: str, remedy: str):
    """The single finding is about `name`, says what and what to do, and the picture is used unless it is an error."""
    found = only(check, name)
    assert found.severity == severity
    assert problem in found.problem
    assert remedy in found.remedy
    line = next(line for line in check.render().splitlines() if name in line)
    assert line == f"{severity}: {name}: {found.problem}; {found.remedy}"
    assert check.ok == (severity != ERROR)
    return found


def png(width, height, *chunks):
    """A PNG written by hand, so that its header can claim anything."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in [(b"IHDR", header), *chunks, (b"IEND", b"")])


# --- the folder itself ---


def test_good_folder_is_ok_and_in_natural_order(folder):
    check = checked(folder)
    assert check.ok
    assert check.findings == ()
    assert [path.name for path in check.images] == ["1.png", "2.png", "3.png", "10.png"]
    assert check.render() == "4 pictures usable, 0 errors, 0 warnings"


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: does not exist; give a folder"):
        check_folder(tmp_path / "nowhere")


def test_file_instead_of_folder(folder):
    with pytest.raises(UserError, match=r"1\.png: is not a folder; give the folder"):
        check_folder(folder / "1.png")


def test_unreadable_folder(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="may not be read; give yourself permission"):
        check_folder(folder)


def test_empty_folder(tmp_path):
    expect(checked(tmp_path), tmp_path.name, ERROR, "is empty", "at least 3 pictures")


def test_fewer_than_three_pictures(folder):
    (folder / "3.png").unlink()
    (folder / "10.png").unlink()
    check = checked(folder)
    expect(check, "pictures", ERROR, "has 2 usable pictures", "at least 3 pictures")
    assert check.render().endswith("2 pictures usable, 1 error, 0 warnings")


def test_natural_order_ignores_case_and_is_total():
    names = ["b1", "A10", "a2", "a02", "²", "a"]
    assert sorted(names, key=natural_key) == ["a", "a02", "a2", "A10", "b1", "²"]


def test_render_puts_errors_first(folder):
    (folder / "0.txt").write_text("a caption")
    (folder / "9.png").write_bytes(b"not a picture")
    lines = checked(folder).render().splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == [ERROR, NOTE]
    assert lines[2:] == ["4 pictures usable, 1 error, 0 warnings"]


# --- pictures that stop training ---


@pytest.mark.parametrize("content", [b"", b"hello, I am a text", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("name", ["bad.png", "bad.HEIC", "bad.svg"])
def test_picture_name_without_a_picture(folder, name, content):
    (folder / name).write_bytes(content)
    expect(checked(folder), name, ERROR, "", "download it again")
    with pytest.raises(UserError, match=rf"{name}: .*; save or download it again"):
        read_picture(folder / name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_truncated(folder, noise, kind):
    name = f"cut.{kind.lower()}"
    Image.fromarray(noise()).save(folder / name, kind)
    (folder / name).write_bytes((folder / name).read_bytes()[: -(folder / name).stat().st_size // 3])
    problem = "" if kind == "WEBP" else "truncated"  # WebP refuses as a whole, without saying why
    expect(checked(folder), name, ERROR, problem, "download it again")
    with pytest.raises(UserError, match=rf"cut\.{kind.lower()}: .*; save or download it again"):
        read_picture(folder / name)


def test_corrupt_pixels(folder):
    content = bytearray((folder / "2.png").read_bytes())
    content[content.index(b"IDAT") + 20] ^= 0x10
    (folder / "2.png").write_bytes(content)
    check = checked(folder)
    expect(check, "2.png", ERROR, "is damaged", "download it again")
    assert [path.name for path in check.images] == ["1.png", "3.png", "10.png"]


@pytest.mark.parametrize("side", [60_000, 12_000, 10_001])
def test_bomb_is_refused_by_its_header(folder, side):
    """12,000 squared is where Pillow only warns, 60,000 squared is where it refuses itself."""
    (folder / "bomb.png").write_bytes(png(side, side, (b"IDAT", zlib.compress(b"\0" * 100))))
    expect(checked(folder), "bomb.png", ERROR, "more than 100 million pixels", "save it smaller")


def test_long_text_bomb_inside_png(folder):
    text = b"Comment\0\0" + zlib.compress(b"a" * 100_000_000)
    (folder / "text.png").write_bytes(png(40, 40, (b"zTXt", text), (b"IDAT", zlib.compress(b"\0" * 121 * 40))))
    expect(checked(folder), "text.png", ERROR, "is damaged", "download it again")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_several_frames(folder, noise, kind):
    frames = [Image.fromarray(noise()) for _ in range(3)]
    name = f"moving.{kind.lower()}"
    frames[0].save(folder / name, kind, save_all=True, append_images=frames[1:])
    expect(checked(folder), name, ERROR, "holds 3 frames", "save the one that you mean")


def test_dangling_link(folder, tmp_path):
    (folder / "link.png").symlink_to(tmp_path / "gone.png")
    expect(checked(folder), "link.png", ERROR, "link to a file that does not exist", "remove the link")


def test_link_to_a_picture_is_a_picture(folder, tmp_path, noise):
    Image.fromarray(noise()).save(tmp_path / "elsewhere.png")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    check = checked(folder)
    assert check.ok
    assert len(check.images) == 5


def test_unreadable_file(folder, monkeypatch):
    real_open = check_module.Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(check_module.Path, "open", refuse)  # a chmod would not stop root
    expect(check_folder(folder), "2.png", ERROR, "Permission denied", "give yourself permission")


def test_camera_raw(folder, noise):
    Image.fromarray(noise()).save(folder / "photo.dng", "TIFF")
    expect(checked(folder), "photo.dng", ERROR, "raw file", "export it as PNG")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bits(folder, noise, dtype):
    Image.fromarray(noise(channels=1)[..., 0].astype(dtype)).save(folder / "deep.tif")
    expect(checked(folder), "deep.tif", ERROR, "32-bit", "8 or 16 bits")


# --- pictures that are used, and what is said of them ---


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


# --- files that are no pictures ---


@pytest.mark.parametrize("name", ["1.txt", "1.caption", "metadata.jsonl", "README.md"])
def test_sidecars_are_noted(folder, name):
    (folder / name).write_text("a caption")
    expect(checked(folder), name, NOTE, "text beside the pictures", "nothing to do")


def test_other_files_are_a_warning(folder):
    (folder / "sound.mp3").write_bytes(b"ID3 sound")
    expect(checked(folder), "sound.mp3", WARNING, "not a picture", "remove it")


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", "._1.jpg"])
def test_hidden_files_are_ignored(folder, name):
    (folder / name).write_bytes(b"\0\5\26\7")
    expect(checked(folder), name, NOTE, "hidden", "ignored")


def test_sub_folders_are_not_entered(folder, noise):
    (folder / "more").mkdir()
    Image.fromarray(noise()).save(folder / "more" / "5.png")
    check = checked(folder)
    expect(check, "more", WARNING, "pictures in it are not used", "move them")
    assert len(check.images) == 4


def test_pipes_are_not_opened(folder):
    os.mkfifo(folder / "pipe.png")
    expect(checked(folder), "pipe.png", WARNING, "not an ordinary file", "remove it")


# --- repeats ---


def test_exact_duplicate_under_another_format(folder):
    Image.open(folder / "2.png").save(folder / "20.bmp")
    check = checked(folder)
    expect(check, "20.bmp", ERROR, "same pixels as 2.png", "remove one")
    assert len(check.images) == 4


def test_duplicates_do_not_count_towards_three(folder):
    (folder / "10.png").unlink()
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes())
    assert [found.path.name for found in checked(folder).errors] == ["3.png", "pictures"]


@pytest.mark.parametrize("mirrored", [False, True])
def test_near_duplicates(folder, mirrored):
    picture = Image.open(folder / "2.png").convert("RGB")
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture
    picture.resize((96, 96), Image.Resampling.BICUBIC).save(folder / "20.jpg", quality=60)
    problem = "nearly the mirror image of 2.png" if mirrored else "nearly the same picture as 2.png"
    expect(checked(folder), "20.jpg", WARNING, problem, "remove one")


def test_plain_pictures_are_not_called_alike(folder):
    for colour in ("red", "blue", "white"):
        Image.new("RGB", (48, 48), colour).save(folder / f"{colour}.png")
    assert checked(folder).findings == ()
