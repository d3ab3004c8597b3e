"""Prompts of every shape: normalised, or a typed error with the place of what is wrong."""

import base64
import io

import numpy as np
import pytest
import transformers
from PIL import Image

from dyvte_engine import ImageError, InvalidArgumentError, PromptError
from dyvte_engine.assets import NANO
from dyvte_engine.inputs.prompts import as_batch, is_single, render

PICTURE = Image.frombytes("RGB", (4, 3), bytes(range(36)))


@pytest.fixture(scope="module")
def processor():
    return transformers.AutoProcessor.from_pretrained(NANO, trust_remote_code=False)


@pytest.fixture(scope="module")
def url():
    out = io.BytesIO()
    PICTURE.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def user(*content):
    return [{"role": "user", "content": list(content)}]


def words(text):
    return {"type": "text", "text": text}


def test_a_picture_in_a_message_may_be_written_in_many_ways(processor, url, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    parts = [
        {"type": "image", "image": PICTURE},
        {"type": "image", "image": url},
        {"type": "image", "url": url},
        {"type": "image", "path": tmp_path / "a.png"},
        {"type": "image", "url": str(tmp_path / "a.png")},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": url},
    ]
    expected = processor.apply_chat_template(user({"type": "image"}, words("why")), add_generation_prompt=True)
    for part in parts:
        message = user(part, words("why"))
        [prompt], [pictures], [clips] = as_batch(message, None)
        assert [np.asarray(p).tolist() for p in pictures] == [np.asarray(PICTURE).tolist()] and not clips
        assert render(prompt, 1, processor) == expected
        assert url not in str(prompt) and message[0]["content"][0] is part, "the user's messages stay as they are"


def test_places_of_pictures(url):
    both = user({"type": "image", "image": PICTURE}, words("a"), {"type": "image", "url": url})
    batch, pictures, _ = as_batch(["a", both, user(words("b"))], None)
    assert [len(row) for row in pictures] == [0, 2, 0] and batch[0] == "a"
    given = as_batch(["a", user({"type": "image"})], [None, [PICTURE, url]])[1]
    assert [len(row) for row in given] == [0, 2]
    for prompts, images, place in [
        ("a", "none.png", r"^images: image file"),
        ("a", [PICTURE, "none.png"], r"^images\[1\]: image file"),
        (["a", "b"], [None, "none.png"], r"^images\[1\]: image file"),
        (["a", "b"], [[], [PICTURE, 3]], r"^images\[1\]\[1\] is a int"),
        (["a", user({"type": "image", "path": "none.png"})], None, r"^content\[0\] of prompts\[1\]\[0\]: image file"),
        (
            user(words("a"), {"type": "image_url", "image_url": {"url": "http://a/b.png"}}),
            None,
            r"content\[1\].*http: URL",
        ),
        (user({"type": "image_url", "image_url": {}}), None, r"is a NoneType; accepted: a path"),
    ]:
        with pytest.raises(ImageError, match=place):
            as_batch(prompts, images)
    with pytest.raises(
        InvalidArgumentError, match=r"images\[1\] is given, and prompts\[1\] holds images; accepted: one"
    ):
        as_batch(["a", both], [None, PICTURE])
    with pytest.raises(InvalidArgumentError, match=r"content\[0\] of prompts\[0\] names its image 2 times"):
        as_batch(user({"type": "image", "path": "a", "url": "b"}), None)


@pytest.mark.parametrize(
    ("prompts", "place"),
    [
        ({}, "prompts is a dict"),
        (None, "prompts is a NoneType"),
        (7, "prompts is a int"),
        (b"a", "prompts is a bytes"),
        (np.array(["a"]), "prompts is a ndarray"),
        ((p for p in ["a"]), "prompts is a generator"),
        ([None], r"prompts\[0\] is a NoneType"),
        (["a", []], r"prompts\[1\] is an empty list"),
        ([["a"]], r"prompts\[0\]\[0\] is a str; accepted: a message"),
        ([{"content": "a"}], r"prompts\[0\] has no role"),
        ([{"role": 3, "content": "a"}], r"prompts\[0\] has no role"),
        ([{"role": "user"}], r"content of prompts\[0\] is a NoneType"),
        ([{"role": "user", "content": None}], r"content of prompts\[0\] is a NoneType"),
        ([{"role": "user", "content": 5}], r"content of prompts\[0\] is a int"),
        ([{"role": "user", "content": "a"}, "b"], r"prompts\[1\] is a str"),
        (user("a"), r"content\[0\] of prompts\[0\] is a str without a type"),
        (user({"text": "a"}), r"content\[0\] of prompts\[0\] is a dict without a type"),
        (user({"type": "text"}), r"content\[0\] of prompts\[0\] is of type 'text'"),
        (user({"type": "text", "text": 4}), r"content\[0\] of prompts\[0\] is of type 'text'"),
        (user({"type": "audio", "audio": "a.wav"}), r"content\[0\] of prompts\[0\] is of type 'audio'"),
        (user({"type": ["image"]}), r"content\[0\] of prompts\[0\] is a dict without a type"),
    ],
)
def test_odd_prompts(prompts, place):
    with pytest.raises(InvalidArgumentError, match=place):
        as_batch(prompts, None)


def test_tuples_are_lists():
    assert as_batch(("a", "b"), None)[0] == ["a", "b"]
    message = ({"role": "user", "content": (words("a"),)},)
    assert is_single(message) and as_batch(message, None)[0] == [[{"role": "user", "content": [words("a")]}]]


@pytest.mark.parametrize("images", [{"a": PICTURE}, {1}, (i for i in [PICTURE]), np.zeros((3, 4, 4)), [[PICTURE]], 3.5])
def test_odd_pictures(images):
    with pytest.raises(ImageError, match=r"^images(\[0\])? is a \w+; accepted: a path or a PIL image"):
        as_batch("a", images)


def test_text_that_is_none(processor):
    for prompt in ("a \ud800", user(words("\udfff"))):
        for chat in (True, False) if isinstance(prompt, str) else (True,):
            with pytest.raises(PromptError, match="surrogate"):
                render(prompt, 0, processor, chat)
