import os
import zlib

import numpy as np
import pytest
from folder_checks import ERROR, NOTE, WARNING, checked, expect, png
from PIL import Image

import domainstudio.data.check as check_module
from domainstudio.data.check import check_folder, natural_key, read_picture
from domainstudio.errors import UserError

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
