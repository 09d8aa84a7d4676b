import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from domainstudio.data import bundled
from domainstudio.data.domain import heldout_pictures, load_domain, read_pictures, to_pil, to_tensor
from domainstudio.errors import UserError


def zipped(folder, file):
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_all_8_bit_values_survive_the_round_trip():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    tensor = to_tensor(Image.fromarray(pixels), 16)
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1)
    (back,) = to_pil(tensor[None])
    assert (np.asarray(back) == pixels).all()


def test_to_pil_rounds_and_clamps():
    values = torch.tensor([-7.0, -1.0, 0.0, 1 / 127.5 * 0.4, 1.0, 7.0]).expand(1, 3, 1, 6)
    (image,) = to_pil(values.requires_grad_())
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


def test_centre_crop_without_resampling(noise):
    for pixels in (noise(20, 31), noise(31, 20)):
        top, left = ((side - 20) // 2 for side in pixels.shape[:2])
        (image,) = to_pil(to_tensor(Image.fromarray(pixels), 20)[None])
        assert (np.asarray(image) == pixels[top : top + 20, left : left + 20]).all()


def test_resize_is_antialiased():
    """A one-pixel checkerboard shrinks to grey; taking every fourth pixel would give black or white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    tensor = to_tensor(Image.fromarray(board), 16)
    assert tensor.shape == (3, 16, 16)
    assert tensor.abs().max() < 0.1


def test_folder_in_natural_order(folder):
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "2.txt").write_text("a caption")
    (folder / "more").mkdir()
    tensor = read_pictures(folder)
    assert tensor.shape == (4, 3, 48, 48)
    for image, name in zip(to_pil(tensor), (1, 2, 3, 10), strict=True):
        assert (np.asarray(image) == pixels_of(folder / f"{name}.png")).all()


def test_zip_is_read_like_the_folder(folder, tmp_path):
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._1.png").write_bytes(b"x")
    (folder / "note.txt").write_text("x")
    file = zipped(folder, tmp_path / "set.zip")
    assert torch.equal(read_pictures(file), read_pictures(folder))
    assert torch.equal(read_pictures(file, 24), read_pictures(folder, 24))


def test_one_picture_and_duplicates_are_fine(folder, tmp_path):
    for name in ("2.png", "3.png"):
        (folder / name).write_bytes((folder / "1.png").read_bytes())
    (folder / "10.png").unlink()
    assert len(read_pictures(folder)) == 3
    assert len(read_pictures(zipped(folder, tmp_path / "set.zip"))) == 3
    (folder / "2.png").unlink()
    (folder / "3.png").unlink()
    assert read_pictures(folder, 16).shape == (1, 3, 16, 16)


def test_resolution_follows_the_first_picture(folder, noise):
    Image.fromarray(noise(20, 30)).save(folder / "0.png")
    assert read_pictures(folder).shape == (5, 3, 20, 20)


@pytest.mark.parametrize("content", [b"not a picture", None])
def test_unreadable_pictures_stop_the_reading(folder, tmp_path, content):
    """None: cut in the middle."""
    path = folder / "2.png"
    path.write_bytes(content or path.read_bytes()[:-60])
    for source in (folder, zipped(folder, tmp_path / "set.zip")):
        with pytest.raises(UserError, match=rf"{source.name}/2\.png: .*; save or download it again"):
            read_pictures(source)


def test_sources_that_are_none(tmp_path, folder):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        read_pictures(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"1\.png: is not a readable \.zip .*; give a folder or a \.zip"):
        read_pictures(folder / "1.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no pictures"):
        read_pictures(tmp_path / "empty")


def test_damaged_zip_member(folder, tmp_path):
    file = zipped(folder, tmp_path / "set.zip")
    content = file.read_bytes()
    middle = content.index(b"IDAT") + 30
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError, match=r"set\.zip/1\.png: is damaged"):
        read_pictures(file)


def test_load_domain(folder):
    domain = load_domain(folder, 32)
    assert domain.name == "pictures"
    assert domain.images.shape == (4, 3, 32, 32)
    assert [path.name for path in domain.paths] == ["1.png", "2.png", "3.png", "10.png"]
    assert torch.equal(domain.images, read_pictures(folder, 32))
    assert torch.equal(load_domain(str(folder), 32).images, domain.images)
    assert heldout_pictures(folder, 32) is None


def test_load_domain_tells_every_error_at_once(folder):
    (folder / "1.png").write_bytes(b"broken")
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes())
    (folder / "note.txt").write_text("x")
    with pytest.raises(UserError) as error:
        load_domain(folder, 32)
    first, *lines = str(error.value).splitlines()
    assert str(folder) in first
    assert [line.split(":")[:2] for line in lines] == [
        ["  error", " 1.png"],
        ["  error", " 3.png"],
        ["  error", " pictures"],
    ]


def test_bundled_domain_and_its_heldout_pictures(folder, tmp_path, monkeypatch):
    home = tmp_path / "assets" / "domains" / "sketches"
    home.mkdir(parents=True)
    zipped(folder, home / "heldout.zip")
    folder.rename(home / "train")
    monkeypatch.setattr(bundled, "ASSETS", tmp_path / "assets")
    domain = load_domain("bundled:sketches", 48)
    assert domain.name == "sketches"
    heldout = heldout_pictures("bundled:sketches", 48)
    assert heldout is not None
    assert torch.equal(heldout, domain.images)
    with pytest.raises(UserError, match="Did you mean bundled:sketches"):
        load_domain("bundled:sketch", 48)
