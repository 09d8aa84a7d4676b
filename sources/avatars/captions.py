"""What is in a rendered picture, in words: the attributes of DiceBear's `toJson().extra` and captions made of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Attributes = dict[str, str]
"""Attribute -> its words in a caption, such as "hair colour": "red"; an absent attribute is not in the picture."""
KIND = "robot"
"""The attribute that tells a robot from a portrait; every caption names it."""


def _by_value(groups: dict[str, str]) -> dict[str, str]:
    """{"red": "ff5c5c ff0000"} -> {"ff5c5c": "red", "ff0000": "red"}."""
    return {value: words for words, values in groups.items() for value in values.split()}


HAIR_COLOURS = _by_value(
    {
        "black": "2c1b18",
        "brown": "4a312c 724133",
        "auburn": "a55728",
        "red": "c93305",
        "blond": "b58143 d6b370",
        "white": "ecdcbf e8e1e1",
    }
)
HAIR_STYLES = _by_value(
    {
        "long": "longButNotTooLong shavedSides straight01 straight02 straightAndStrand",
        "long wavy": "bigHair curvy dreads",
        "bobbed": "bob miaWallace",
        "big curly": "curly fro froBand",
        "spiky": "dreads02",
        "short": "dreads01 frizzle shaggy shaggyMullet shortCurly shortFlat shortRound shortWaved theCaesar "
        "theCaesarAndSidePart",
    }
)
OTHER_TOPS = _by_value(
    {
        "hair in a bun": "bun",
        "flowers in the hair": "frida",
        "a bald head": "sides",
        "a hat": "hat",
        "a headscarf": "hijab",
        "a turban": "turban",
        "a winter hat": "winterHat1 winterHat02 winterHat03 winterHat04",
    }
)
HEADWEAR = ("a hat", "a headscarf", "a turban", "a winter hat")
SKINS = _by_value({"dark": "614335 8d5524", "brown": "ae5d29 d08b5b", "light": "edb98a ffdbb4"})
GLASSES = _by_value(
    {"round glasses": "round", "glasses": "prescription01 prescription02", "sunglasses": "sunglasses wayfarers"}
)
BEARDS = _by_value(
    {
        "a beard": "beardLight beardMedium",
        "a long beard": "beardMajestic",
        "a moustache": "moustacheFancy moustacheMagnum",
    }
)
MOUTHS = _by_value(
    {
        "smiling": "default smile twinkle",
        "sad": "sad disbelief",
        "serious": "serious",
        "shouting": "screamOpen concerned",
        "tongue out": "tongue",
    }
)
EYES = _by_value({"eyes closed": "closed happy", "winking": "wink", "wide eyes": "surprised squint"})
CLOTHES = _by_value(
    {
        "hoodie": "hoodie",
        "overalls": "overall",
        "blazer": "blazerAndShirt blazerAndSweater",
        "sweater": "collarAndSweater",
        "shirt": "shirtCrewNeck shirtScoopNeck shirtVNeck",
    }
)
CLOTHES_COLOURS = _by_value(
    {
        "black": "262e33",
        "blue": "65c9ff 5199e4 25557c",
        "pale blue": "b1e2ff",
        "white": "e6e6e6 ffffff",
        "grey": "929598 3c4f5c",
        "green": "a7ffc4",
        "pink": "ffafb9 ff488e",
        "yellow": "ffffb1 ffdeb5",
        "red": "ff5c5c",
    }
)
BACKGROUNDS = _by_value(
    {
        "blue": "b6e3f4",
        "purple": "c0aede d1d4f9",
        "pink": "ffd5dc",
        "orange": "ffdfbf",
        "green": "c9e4c5",
        "cream": "f4e1c1 faf3e3",
        "grey": "dfe3e8",
    }
)
ROBOT_COLOURS = _by_value(
    {
        "orange": "ffb300 fb8c00 f4511e",
        "blue": "1e88e5 039be5 3949ab",
        "grey": "546e7a 757575",
        "brown": "6d4c41",
        "turquoise": "00acc1 00897b",
        "purple": "5e35b1 8e24aa",
        "green": "43a047 7cb342",
        "yellow": "c0ca33 fdd835",
        "pink": "d81b60",
        "red": "e53935",
    }
)
ROBOT_TOPS = _by_value(
    {
        "an antenna": "antenna antennaCrooked",
        "a light bulb": "bulb01 glowingBulb01 glowingBulb02",
        "horns": "horns",
        "lights": "lights",
        "a pyramid": "pyramid",
        "a radar": "radar",
    }
)
ROBOT_FACES = _by_value({"round": "round01 round02", "square": "square01 square02 square03 square04"})


def portrait_attributes(extra: dict[str, Any]) -> Attributes:
    """Of an avataaars picture. `gender` is how such a hair style is usually drawn; a beard decides first."""
    colour = _colours(extra)
    top = extra["top"]
    found = {
        "skin": SKINS[colour["skinColor"]],
        "hair": HAIR_STYLES.get(top),
        "headwear": OTHER_TOPS.get(top),
        "glasses": GLASSES.get(extra.get("accessories", "")),
        "beard": BEARDS.get(extra.get("facialHair", "")),
        "mouth": MOUTHS[extra["mouth"]],
        "eyes": EYES.get(extra["eyes"]),
        "clothes": CLOTHES[extra["clothing"]],
        "clothes colour": CLOTHES_COLOURS[colour["clothesColor"]],
        "background": BACKGROUNDS[colour["primaryBackgroundColor"]],
    }
    if top in HAIR_STYLES or top in ("bun", "sides"):
        found["hair colour"] = HAIR_COLOURS[colour["hairColor"]]
    masculine = found["beard"] or found["hair"] == "short" or found["headwear"] in ("a turban", "a bald head")
    feminine = found["hair"] in ("long", "long wavy", "bobbed") or found["headwear"] in (
        "hair in a bun",
        "flowers in the hair",
        "a headscarf",
    )
    found["gender"] = "man" if masculine else "woman" if feminine else None
    return {name: words for name, words in found.items() if words}


def robot_attributes(extra: dict[str, Any]) -> Attributes:
    """Of a bottts picture."""
    colour = _colours(extra)
    return {
        KIND: "robot",
        "robot colour": ROBOT_COLOURS[colour["baseColor"]],
        "robot top": ROBOT_TOPS[extra["top"]],
        "robot face": ROBOT_FACES[extra["face"]],
        "background": BACKGROUNDS[colour["primaryBackgroundColor"]],
    }


def read_attributes(path: Path) -> list[Attributes]:
    """Of a file of `render.mjs` with 0 pixels."""
    read: Callable[[dict[str, Any]], Attributes] = robot_attributes if "robots" in path.name else portrait_attributes
    return [read(json.loads(line)) for line in path.read_text().splitlines()]


def part_of(attributes: Attributes, named: Sequence[bool]) -> Attributes:
    """What is to be named, and what it is."""
    chosen = zip(attributes.items(), named, strict=True)
    return {name: words for (name, words), keep in chosen if keep or name == KIND}


def caption(attributes: Attributes) -> str:
    """ "a portrait of a woman with light skin, long red hair and round glasses, smiling, wearing a blue hoodie, ...".

    Names the attributes it is given and no others, so that a caption of a few of them is a caption of the picture too.
    """
    if KIND in attributes:
        return _robot_caption(attributes)
    a = attributes
    hair = " ".join(word for word in (a.get("hair"), a.get("hair colour")) if word)
    top = a.get("headwear")
    has = [f"{a['skin']} skin" if "skin" in a else None]
    if top == "hair in a bun" and "hair colour" in a:
        has.append(f"{a['hair colour']} hair in a bun")
    elif top == "a bald head" or not hair:
        has.append(top)
    else:
        has += [f"{hair} hair", top]
    has += [a.get("beard"), a.get("glasses"), a.get("eyes") if a.get("eyes") != "winking" else None]
    has.append("the tongue out" if a.get("mouth") == "tongue out" else None)
    parts = [f"a portrait of a {a.get('gender', 'person')}"]
    if listed := _listed([word for word in has if word]):
        parts[0] += f" with {listed}"
    parts += [
        word for word in (a.get("mouth"), a.get("eyes")) if word in ("smiling", "sad", "serious", "shouting", "winking")
    ]
    if "clothes" in a or "clothes colour" in a:
        clothes = a.get("clothes", "clothes")
        words = " ".join(word for word in (a.get("clothes colour"), clothes) if word)
        parts.append("wearing " + (words if clothes in ("overalls", "clothes") else f"{_article(words)} {words}"))
    if "background" in a:
        parts.append(_on_background(a["background"]))
    return ", ".join(parts)


def _colours(extra: dict[str, Any]) -> dict[str, str]:
    return {name: value.removeprefix("#") for name, value in extra.items() if name.endswith("Color")}


def _robot_caption(a: Attributes) -> str:
    words = " ".join(word for word in (a.get("robot colour"), "robot") if word)
    has = [f"a {a['robot face']} face" if "robot face" in a else None, a.get("robot top")]
    listed = _listed([word for word in has if word])
    text = f"a picture of {_article(words)} {words}" + (f" with {listed}" if listed else "")
    return text + (f", {_on_background(a['background'])}" if "background" in a else "")


def _on_background(colour: str) -> str:
    return f"on {_article(colour)} {colour} background"


def _article(words: str) -> str:
    return "an" if words[0] in "aeio" else "a"


def _listed(words: list[str]) -> str:
    """ "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
