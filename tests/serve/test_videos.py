"""Animated pictures as videos, for families that take them."""

import random

import pytest
import torch
from PIL import Image

from dyvte_engine import Engine, EngineConfig
from dyvte_engine.models import VisionLanguageModel
from dyvte_engine.serve.options import MediaLimits, ServeOptions
from tests.families import videos, zoo

from .common import Asgi, data_url, encoded

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'video' %}VIDEO {% elif c['type'] == 'image' %}IMAGE "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module", params=["qwen2_vl", "llava_onevision"])
def app(request):
    family = request.param
    processor = videos.processor(family)
    marks = {"VIDEO": videos.MARKS.get(family, "<video>"), "IMAGE": zoo.FAMILIES[family].mark}
    processor.chat_template = TEMPLATE
    for name, mark in marks.items():
        processor.chat_template = processor.chat_template.replace(name, mark)
    config = EngineConfig(torch.device("cpu"), torch.float32, max_len=768)
    engine = Engine(VisionLanguageModel(zoo.model(family), processor, family, 768), config)
    return Asgi(engine, ServeOptions(model_name=family, media=MediaLimits(frames=8)))


def gif(frames: int) -> tuple[str, list[Image.Image]]:
    """A data: URL, and the frames that a reader sees."""
    pictures = [Image.fromarray(one) for one in videos.clip(random.Random(frames), frames)]
    data = encoded(pictures[0], "WEBP", save_all=True, append_images=pictures[1:], lossless=True)
    return data_url(data, "image/webp"), pictures


def body(app, *parts) -> dict:
    return dict(model=app.service.options.model_name, max_tokens=6, messages=[{"role": "user", "content": [*parts]}])


def video(url: str) -> dict:
    return {"type": "video_url", "video_url": {"url": url}}


def test_a_video_is_what_the_engine_makes_of_its_frames(app):
    engine, (url, frames) = app.service.engine, gif(4)
    got = app("POST", "/v1/chat/completions", json=body(app, video(url), {"type": "text", "text": "w1 w2"})).json()
    content = [{"type": "video"}, {"type": "text", "text": "w1 w2"}]
    wanted = engine.generate([[{"role": "user", "content": content}]], videos=[frames], max_new_tokens=6)[0]
    assert got["choices"][0]["message"]["content"] == wanted.text
    assert got["usage"]["visual_tokens"] == wanted.stats.visual_tokens > 0


def test_frames_are_bounded_together(app):
    five, nine = gif(5)[0], gif(9)[0]
    for parts in ([video(nine)], [video(five), video(five)]):
        refused = app("POST", "/v1/chat/completions", json=body(app, *parts))
        assert refused.status_code == 413 and "frames" in refused.text
    three = [video(gif(2)[0])] * 3
    assert app("POST", "/v1/chat/completions", json=body(app, *three)).status_code == 400


def test_marks_of_videos_as_text_are_refused(app):
    for text in ("<video>", "w1 <image>"):
        refused = app("POST", "/v1/chat/completions", json=body(app, {"type": "text", "text": text}))
        assert refused.status_code == 400, refused.text
