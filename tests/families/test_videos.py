"""Videos in every family that takes them: as the engine's argument, and inside transformers' own generate."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

from dyvte_engine import (
    Engine,
    EngineConfig,
    FixedExit,
    ImageError,
    InvalidArgumentError,
    KeepAll,
    PromptError,
    Request,
    hf,
)
from dyvte_engine.commands.main import app
from dyvte_engine.inputs.images import load_video
from dyvte_engine.inputs.prompts import as_batch, render
from dyvte_engine.models import FAMILIES, VisionLanguageModel
from tests.families import oracle, videos, zoo

each_family = pytest.mark.parametrize("family", videos.FAMILIES)
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'video' %}<break> <video> <end> "
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
_built: dict[str, tuple] = {}


@pytest.fixture
def pair(family):
    """An engine, and an untouched copy of its model."""
    if family not in _built:
        config = EngineConfig(torch.device("cpu"), torch.float32, max_len=768)
        processor = videos.processor(family)
        _built[family] = (
            Engine(VisionLanguageModel(zoo.model(family), processor, family, 768), config),
            zoo.model(family),
        )
    engine, twin = _built[family]
    engine.policy = KeepAll()
    yield engine, twin
    assert engine.pool.bytes_held == 0


def test_the_families_that_take_videos():
    assert tuple(name for name, family in FAMILIES.items() if family.videos) == videos.FAMILIES


@pytest.mark.feature("videos: all frames = generate")
@each_family
def test_keep_all_is_generate(family, pair):
    """16 prompts with one or two videos, some with a picture: in batches of 8 and alone."""
    engine, twin = pair
    texts, images, clips = videos.prompts(family, seed=120, n=16)
    inputs = [videos.encode(family, *one, fps=0.8) for one in zip(texts, images, clips)]
    want = [oracle.generate(twin, one, 6) for one in inputs]
    options = dict(chat=False, max_new_tokens=6, video_fps=0.8)
    got = engine.generate(texts, images, videos=clips, **options)
    assert [r.token_ids for r in got] == want
    assert [engine.generate(t, i, videos=v, **options).token_ids for t, i, v in zip(texts, images, clips)] == want
    assert len({tuple(w) for w in want}) > 8
    for result, one in zip(got, inputs):
        assert result.stats.visual_tokens == sum(int((one["input_ids"] == i).sum()) for i in engine.model.visual_ids)


@pytest.mark.feature("videos: exit at each layer")
@each_family
@pytest.mark.parametrize("layer", range(zoo.LAYERS))
def test_exit_is_masking(family, pair, layer):
    engine, twin = pair
    engine.policy = FixedExit(layer)
    texts, images, clips = videos.prompts(family, seed=130 + layer, n=8)
    got = engine.generate(texts, images, videos=clips, chat=False, max_new_tokens=5)
    for words, pictures, frames, result in zip(texts, images, clips, got):
        entry = oracle.enter(twin, videos.encode(family, words, pictures, frames))
        oracle.assert_greedy(twin, entry, result.token_ids, oracle.fixed(layer), 5)
        assert result.stats.exit_layer == (layer if layer < zoo.LAYERS - 1 else None)


@pytest.mark.feature("videos inside transformers' generate")
@each_family
def test_inside_transformers_generate(family, pair):
    _, twin = pair
    model = zoo.model(family)
    state = hf.enable(model, max_len=768)
    texts, images, clips = videos.prompts(family, seed=140, n=3)
    for one in zip(texts, images, clips):
        inputs = videos.encode(family, *one)
        assert oracle.generate(model, inputs, 6) == oracle.generate(twin, inputs, 6)
        state.policy = FixedExit(1)
        oracle.assert_greedy(twin, oracle.enter(twin, inputs), oracle.generate(model, inputs, 5), oracle.fixed(1), 5)
        assert state.exit_layers == [1]
        state.policy = KeepAll()


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_the_rate_of_frames_reaches_the_positions(family, pair):
    engine, _ = pair
    clip, last = videos.clip(random.Random(150), 6), []
    for fps in (0.5, 2.0):
        prompts = engine.model.tokenize(["w1 <break> <video> <end> w2"], [[]], [[clip]], fps)
        assert float(prompts[0].inputs["second_per_grid_ts"][0]) == 2 / fps
        last.append(int(engine.model.prepare(prompts)[0].positions.max()))
    assert last[0] > last[1]


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_a_request_whose_positions_are_beyond_max_len_ends_alone(family, pair, monkeypatch):
    """Its rows fit. In transformers 4 the text behind a slow video has such positions. A token less is answered."""
    engine, _ = pair
    given = (["w1 <break> <video> <end> w2"], [[]], [[videos.clip(random.Random(151), 6)]])
    prepare = engine.model.prepare

    def later(*args):
        return [replace(prompt, positions=prompt.positions + 700) for prompt in prepare(*args)]

    last = int(later(engine.model.tokenize(*given))[0].positions[-1])
    monkeypatch.setattr(engine.model, "prepare", later)
    handles = [
        engine.submit(Request(*(one[0] for one in given), chat=False, options=dict(max_new_tokens=n, eos_token_id=[])))
        for n in (767 - last, 768 - last)
    ]
    with pytest.raises(PromptError, match=f"ends at position {last} and the answer has {768 - last} tokens; .* 768"):
        handles[1].result(60)
    assert handles[0].result(60).stats.new_tokens == 767 - last
    engine.check_integrity()
    assert engine.pool.claimed == 0


@pytest.mark.parametrize("family", ["qwen3_vl"])
def test_frames_in_every_form(family, pair, tmp_path):
    """A list of pictures, an array, a tensor, a folder and an animated picture are the same video."""
    engine, _ = pair
    texts, _, clips = videos.prompts(family, seed=160, n=1)
    array = (clips[0][0] > 127).astype(np.uint8) * 255  # few colours, for GIF
    pictures = [Image.fromarray(frame) for frame in array]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:])
    (tmp_path / "frames").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "frames" / f"{number:03d}.png")
    (tmp_path / "frames" / "notes.txt").write_text("no picture")
    forms = [array, pictures, torch.from_numpy(array), tmp_path / "a.png", str(tmp_path / "frames"), [array]]
    got = [engine.generate(texts[0], videos=form, chat=False, max_new_tokens=6).token_ids for form in forms]
    assert got == [got[0]] * len(forms)
    together = engine.generate(texts * 3, videos=[pictures, [array], array], chat=False, max_new_tokens=6)
    assert [r.token_ids for r in together] == [got[0]] * 3
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    assert np.array_equal(load_video(tmp_path / "a.gif"), array)


@pytest.mark.parametrize("family", ["qwen2_vl"])
def test_on_the_command_line(family, pair, tmp_path, monkeypatch):
    engine, twin = pair
    loaded = engine.model.processor
    monkeypatch.setattr(loaded, "chat_template", TEMPLATE)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name, **options: loaded)
    twin.save_pretrained(tmp_path / "model")
    clips = [videos.clip(random.Random(seed), 4) for seed in (1, 2)]
    for name, clip in zip("ab", clips):
        (tmp_path / name).mkdir()
        for number, frame in enumerate(clip):
            Image.fromarray(frame).save(tmp_path / name / f"{number}.png")
    common = ["generate", "--model", str(tmp_path / "model"), "--device", "cpu", "--dtype", "float32"]
    common += ["--max-new-tokens", "5", "--json", "--max-len", "256"]
    both = [*common, "--prompt", "w1", "--video", str(tmp_path / "a"), "--prompt", "w2", "--video", str(tmp_path / "b")]
    out = CliRunner().invoke(app, both)
    want = engine.generate(["w1", "w2"], videos=clips, max_new_tokens=5)
    assert [one["token_ids"] for one in json.loads(out.stdout)] == [r.token_ids for r in want], out.output
    alone = CliRunner().invoke(app, [*common, "--prompt", "w1", "--video", str(tmp_path / "a")])
    assert json.loads(alone.stdout)[0]["token_ids"] == want[0].token_ids
    assert json.loads(alone.stdout)[0]["stats"]["visual_tokens"] == want[0].stats.visual_tokens > 0


@pytest.mark.parametrize("family", ["internvl"])
def test_what_is_refused(family, pair, tmp_path):
    engine, _ = pair
    frames = [Image.new("RGB", (20, 20)), Image.new("RGB", (20, 30))]
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    for given, words in [
        (np.zeros((2, 20, 20, 3)), r"float64 \[2, 20, 20, 3\]; accepted: uint8 \[T, H, W, 3\]"),
        (np.zeros((2, 3, 20, 20), np.uint8), r"uint8 \[2, 3, 20, 20\]; accepted: uint8 \[T, H, W, 3\]"),
        (np.zeros((0, 20, 20, 3), np.uint8), r"uint8 \[0, 20, 20, 3\]; accepted"),
        (frames, "frames of the sizes 20 x 20 and 20 x 30; accepted: frames of one size"),
        ([np.zeros((20, 20, 3), np.uint8)], r"uint8 \[20, 20, 3\]; accepted"),
        (3, "videos is a int; accepted: a list of PIL images"),
        (tmp_path / "none.gif", "not found"),
        (tmp_path / "a.mp4", "not a readable picture"),
        (tmp_path / "empty", "videos has no frames"),
    ]:
        with pytest.raises(ImageError, match=words):
            engine.generate("w1 <video> w2", videos=given, chat=False)
    clip = np.zeros((2, 20, 20, 3), np.uint8)
    with pytest.raises(InvalidArgumentError, match="videos must be a list with one entry"):
        engine.generate(["w1 <video> w2"] * 2, videos=clip, chat=False)
    with pytest.raises(InvalidArgumentError, match="video_fps is 0; accepted: above 0"):
        engine.generate("w1 <video> w2", videos=clip, chat=False, video_fps=0)
    with pytest.raises(PromptError, match="1 <video> marks for 2 videos"):
        engine.generate("w1 <video> w2", videos=[clip, clip], chat=False)
    with pytest.raises(PromptError, match="1 <video> marks for 0 videos"):
        engine.generate("w1 <video> w2", chat=False)
    with pytest.raises(InvalidArgumentError, match="videos of one prompt have 2, 1 frames; a internvl model"):
        engine.generate("w1 <video> <video> w2", videos=[clip, clip[:1]], chat=False)


@pytest.mark.feature("videos: all frames = generate", refused=True)
@pytest.mark.feature("videos: exit at each layer", refused=True)
@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f not in videos.FAMILIES])
def test_families_without_videos(family):
    model = VisionLanguageModel(zoo.model(family), zoo.processor(family), family, 128)
    with pytest.raises(InvalidArgumentError, match=f"videos is given; this {family} model's processor takes pictures"):
        model.tokenize(["w1 w2"], [[]], [[np.zeros((2, 20, 20, 3), np.uint8)]])


@pytest.mark.parametrize("family", ["smolvlm"])
def test_smolvlm_takes_either(family, pair):
    clip = np.zeros((2, 20, 20, 3), np.uint8)
    with pytest.raises(InvalidArgumentError, match="images and videos are given; a smolvlm model's prompt"):
        pair[0].generate("w1 <image> <video> w2", Image.new("RGB", (20, 20)), videos=clip, chat=False)


class Chat:
    image_token, video_token, chat_template = "<|image_pad|>", "<|video_pad|>", "any"

    def apply_chat_template(self, messages, **options):
        marks = {"image": "[<|image_pad|>]", "video": "{<|video_pad|>}"}
        return "".join(marks.get(p["type"]) or p["text"] for m in messages for p in m["content"])


def test_marks_of_videos():
    assert render("a <video> b <image> c", 1, Chat(), n_videos=1) == "a{<|video_pad|>}b[<|image_pad|>]c"
    assert render("a <|video_pad|> b", 0, Chat(), n_videos=1) == "a{<|video_pad|>}b"
    assert render("a <video> b", 1, Chat(), n_videos=1) == "[<|image_pad|>]a{<|video_pad|>}b"
    assert render("a", 1, Chat(), n_videos=2) == "[<|image_pad|>]" + 2 * "{<|video_pad|>}" + "a"
    with pytest.raises(PromptError, match=r"1 .* marks for 2 videos"):
        render("a <video>", 0, Chat(), n_videos=2)


def test_videos_in_messages():
    frames = [Image.new("RGB", (4, 4), (t, 0, 0)) for t in range(3)]
    message = {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "w1"}]}
    _, pictures, clips = as_batch([message], None)
    assert pictures == [[]] and clips[0][0].shape == (3, 4, 4, 3) and clips[0][0][2, 0, 0, 0] == 2
