import pytest

from domainstudio.data import bundled
from domainstudio.data.captions import read_captions
from domainstudio.data.domain import load_domain
from domainstudio.errors import UserError


@pytest.fixture
def assets(tmp_path, monkeypatch):
    for folder in ("models/faces", "domains/sketches/train", "domains/emoji/train", "domains/.cache"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "domains/README.md").touch()
    monkeypatch.setattr(bundled, "ASSETS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "name"), [("bundled:sketches", "sketches"), ("bundled:", ""), ("my/bundled:x", None), ("pictures", None)]
)
def test_strip_prefix(source, name):
    assert bundled.strip_prefix(source) == name


def test_names_and_paths(assets):
    assert bundled.bundled_names("models") == ["faces"]
    assert bundled.bundled_names("domains") == ["emoji", "sketches"]
    assert bundled.bundled_model("faces") == assets / "models/faces"
    assert bundled.bundled_domain("emoji") == assets / "domains/emoji/train"
    assert bundled.bundled_heldout("emoji") == assets / "domains/emoji/heldout.zip"


def test_no_assets_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "ASSETS", tmp_path / "none")
    assert bundled.bundled_names("models") == []
    with pytest.raises(UserError, match="bundled:faces is not among the bundled models; available: none"):
        bundled.bundled_model("faces")


@pytest.mark.usefixtures("assets")
def test_unknown_names_list_what_exists():
    with pytest.raises(UserError) as error:
        bundled.bundled_domain("sketchs")
    assert "available: bundled:emoji, bundled:sketches" in str(error.value)
    assert "Did you mean bundled:sketches?" in str(error.value)
    for name in ("", ".", "..", "../models/faces", "emoji/train", "xyz"):
        with pytest.raises(UserError, match="available"):
            bundled.bundled_heldout(name)


@pytest.mark.parametrize("domain", ["sunglasses", "watercolour"])
def test_captions_say_what_is_in_each_picture_but_not_its_style(domain):
    folder = bundled.bundled_domain(domain)
    captions = read_captions(folder, load_domain(f"bundled:{domain}", 64).paths, "files")
    assert len(set(captions)) == 10
    assert all(caption is not None and caption.startswith("a portrait of a ") for caption in captions)
    assert not any(domain in caption for caption in captions if caption)
