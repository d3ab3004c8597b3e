"""For nano_picture.yaml."""

from PIL import Image


def of(doc, options=None):
    return [Image.open(doc["picture"]).convert("RGB")]


def question(doc, options=None):
    return doc["question"]
