"""For nano_picture.yaml."""

from PIL import Image


def of(doc):
    return [Image.open(doc["picture"]).convert("RGB")]
