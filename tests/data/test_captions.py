"""Where captions come from, and what prompts are made of them."""

import json
import re
from pathlib import Path

import pytest

from domainstudio.data.captions import caption_table, draw_alternatives, fill, read_captions
from domainstudio.errors import UserError


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Names of three pictures; captions are read without opening any."""
    folder = tmp_path / "10_a_red chair"
    folder.mkdir()
    return [folder / name for name in ("1.png", "2.jpg", "3.png")]


def read(pictures, source="files"):
    return read_captions(pictures[0].parent, pictures, source)


def metadata(pictures, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (pictures[0].parent / "metadata.jsonl").write_text(text, encoding="utf-8")


class TestFiles:
    @pytest.mark.parametrize("name", ["2.txt", "2.caption", "2.jpg.txt", "2.jpg.caption"])
    def test_beside_a_picture(self, pictures, name):
        (pictures[0].parent / name).write_text("\n a chair, à la Bauhaus \n", encoding="utf-8")
        assert read(pictures) == [None, "a chair, à la Bauhaus", None]

    def test_a_byte_order_mark_is_not_part_of_the_caption(self, pictures):
        pictures[0].with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa chair")
        assert read(pictures)[0] == "a chair"

    def test_in_metadata(self, pictures):
        metadata(
            pictures, {"file_name": "3.png", "text": " third "}, "", {"file_name": "1.png", "text": "first", "by": "me"}
        )
        assert read(pictures) == ["first", None, "third"]

    def test_a_file_beside_a_picture_goes_before_metadata(self, pictures):
        metadata(pictures, {"file_name": "1.png", "text": "listed"}, {"file_name": "2.jpg", "text": "listed"})
        pictures[0].with_suffix(".txt").write_text("beside")
        pictures[1].with_suffix(".txt").write_text("  \n")
        assert read(pictures) == ["beside", "listed", None]

    def test_not_one_is_an_error(self, pictures):
        pictures[0].with_suffix(".txt").write_text(" \n")
        metadata(pictures, {"file_name": "other.png", "text": "of no picture here"})
        with pytest.raises(UserError, match=r"10_a_red chair: captions are expected .* not one of 3 pictures has one"):
            read(pictures)

    @pytest.mark.parametrize(
        "line", ["{", "no json", "[1]", "5", '"text"', "null", '{"text": "a"}', '{"file_name": "2.jpg"}']
    )
    def test_a_bad_line_of_metadata_is_named(self, pictures, line):
        metadata(pictures, {"file_name": "1.png", "text": "a"}, line, {"file_name": "3.png", "text": "a"})
        with pytest.raises(
            UserError, match=rf'metadata\.jsonl, line 2: not .*"file_name" and "text".*{re.escape(line)}'
        ):
            read(pictures)

    @pytest.mark.parametrize("text", [None, ["a"], {"a": 1}])
    def test_a_caption_that_is_no_text_is_named(self, pictures, text):
        metadata(pictures, {"file_name": "1.png", "text": "a chair"}, {"file_name": "2.jpg", "text": text})
        with pytest.raises(UserError, match=r"metadata\.jsonl, line 2"):
            read(pictures)

    @pytest.mark.parametrize("name", ["1.txt", "metadata.jsonl"])
    def test_text_that_is_not_utf8_is_named(self, pictures, name):
        (pictures[0].parent / name).write_bytes('{"file_name": "1.png", "text": "café"}'.encode("latin-1"))
        with pytest.raises(UserError, match=rf"{re.escape(name)}: is not UTF-8 text .*; save it as UTF-8"):
            read(pictures)


@pytest.mark.parametrize(
    ("name", "caption"), [("10_a_red chair", "a red chair"), ("a_chair", "a chair"), ("1984", "1984"), ("3_", "")]
)
def test_the_folders_name_without_its_repeat_count(tmp_path, name, caption):
    folder = tmp_path / name
    assert read_captions(folder, [folder / "1.png", folder / "2.png"], "folder") == [caption] * 2


def test_the_folders_name_of_a_relative_path(pictures, monkeypatch):
    monkeypatch.chdir(pictures[0].parent)
    assert read_captions(Path(), pictures, "folder") == ["a red chair"] * 3


def test_none_reads_no_file(pictures):
    pictures[0].with_suffix(".txt").write_bytes(b"\xff")
    assert read(pictures, "none") == [None] * 3


class TestAlternatives:
    @pytest.mark.parametrize("prompt", ["a dog", "{caption}, sks style", "{}", "a  dog ", "a | b", "{a", "b|c}"])
    def test_a_prompt_without_any_is_left_alone(self, prompt):
        assert {draw_alternatives(prompt, seed) for seed in range(5)} == {prompt}

    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("a {man|woman}", {"a man", "a woman"}),
            ("{a|b|c}{1|2}", {"a1", "a2", "b1", "b2", "c1", "c2"}),
            ("a {red|} dog", {"a red dog", "a dog"}),
            ("a dog {in ink|}, big", {"a dog in ink, big", "a dog, big"}),
            ("{|old} man{| with hair}, {|big}", {"man,", "man, big", "man with hair,", "man with hair, big"}
             | {"old man,", "old man, big", "old man with hair,", "old man with hair, big"}),
            ("a {dog|{red|blue} cat}", {"a dog", "a red cat", "a blue cat"}),
            ("{{a|b} {c|d}|e}", {"a c", "a d", "b c", "b d", "e"}),
            ("{caption} in {ink|oil}", {"{caption} in ink", "{caption} in oil"}),
        ],
    )  # fmt: skip
    def test_every_one_is_drawn_sooner_or_later_and_nothing_else(self, prompt, expected):
        assert {draw_alternatives(prompt, seed) for seed in range(200)} == expected

    def test_they_follow_from_the_seed(self):
        prompt = "{a|b|c|d} {e|f|g|h} {i|j|k|l}"
        drawn = [draw_alternatives(prompt, seed) for seed in range(50)]
        assert drawn == [draw_alternatives(prompt, seed) for seed in range(50)]
        assert len(set(drawn)) > 25, "neighbouring seeds draw different ones"

    def test_all_are_about_as_frequent(self):
        drawn = [draw_alternatives("{a|b|c|d}", seed) for seed in range(2000)]
        assert all(400 < drawn.count(letter) < 600 for letter in "abcd")


def test_every_caption_in_a_template_is_replaced():
    assert fill("{caption}, not {captions} but {caption}", "a {red|blue} dog") == (
        "a {red|blue} dog, not {captions} but a {red|blue} dog"
    )
    assert fill("a dog", "a cat") == "a dog"


def test_the_table_has_a_line_a_picture():
    paths = [Path("/somewhere/1.png"), Path("/somewhere/long name.jpg")]
    assert caption_table(paths, ["a dog", ""]) == "1.png          a dog\nlong name.jpg  "
    with pytest.raises(ValueError, match="shorter"):
        caption_table(paths, ["a dog"])
