"""What the server needs of the engine: processors of a request, log-probabilities, its load, pictures as bytes."""

import math
import random

import pytest
import torch
import transformers

from dyvte_engine import Engine, ImageError, InvalidArgumentError, Request
from dyvte_engine.inputs.images import load_image, load_video
from dyvte_engine.serve.sampling import Penalty
from tests import tiny

from .common import PICTURE, encoded, noise


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp("tiny"), seed=3)
    hf = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    return Engine.from_pretrained(folder, device="cpu", max_batch=4, max_len=96), hf


def inputs_of(engine, text, image):
    return engine.model.processor(text=[text], images=[image], return_tensors="pt")


class Forbid(transformers.LogitsProcessor):
    """Even tokens may not come."""

    def __call__(self, ids, scores):
        out = scores.clone()
        out[:, ::2] = float("-inf")
        return out


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.4}, {"do_sample": True, "temperature": 0.7, "top_k": 3}]
)
def test_processors_sit_where_transformers_puts_them(pair, options):
    engine, hf = pair
    image = tiny.picture(random.Random(1))
    text = "<s> user : <image> w3 w9 assistant :"
    torch.manual_seed(5)
    wanted = hf.generate(
        **inputs_of(engine, text, image),
        max_new_tokens=12,
        logits_processor=transformers.LogitsProcessorList([Forbid()]),
        **{"do_sample": False} | options,
    )[0].tolist()
    request = Request(text, image, chat=False, seed=5, options=options | {"max_new_tokens": 12}, processors=[Forbid()])
    got = engine.submit(request).result().token_ids
    assert got == wanted[-len(got) :]
    assert all(token % 2 for token in got)


def test_logprobs_are_those_of_the_bare_logits(pair):
    engine, hf = pair
    image = tiny.picture(random.Random(2))
    text = "<s> user : <image> w5 assistant :"
    out = hf.generate(
        **inputs_of(engine, text, image),
        max_new_tokens=6,
        do_sample=False,
        repetition_penalty=1.5,
        output_logits=True,
        return_dict_in_generate=True,
    )
    wanted = torch.stack(out.logits)[:, 0].log_softmax(-1)
    options = {"max_new_tokens": 6, "repetition_penalty": 1.5}
    chunks = list(engine.submit(Request(text, image, chat=False, options=options, logprobs=3)))
    assert len(chunks) == len(wanted)
    for chunk, row in zip(chunks, wanted, strict=True):
        assert chunk.logprobs.logprob == pytest.approx(float(row[chunk.token_id]), abs=1e-4)
        best = row.topk(3)
        assert [token for token, _ in chunk.logprobs.top] == best.indices.tolist()
        assert [value for _, value in chunk.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_without_logprobs_chunks_have_none(pair):
    chunk = next(iter(pair[0].submit(Request("w1", chat=False, options={"max_new_tokens": 1}))))
    assert chunk.logprobs is None


WRONG = [{"logprobs": -1}, {"logprobs": tiny.WORDS + 10}, {"logprobs": True}, {"processors": [1]}, {"processors": len}]
WRONG += [{"stop_text": [""]}, {"stop_text": "x"}, {"stop_text": [1]}]


@pytest.mark.parametrize("fields", WRONG)
def test_hooks_of_another_kind_are_refused(pair, fields):
    with pytest.raises(InvalidArgumentError, match=f"request.{next(iter(fields))}"):
        pair[0].submit(Request("w1", chat=False, **fields))


def test_logprobs_of_the_whole_vocabulary(pair):
    """129 tokens: each is named once, and their probabilities add up."""
    request = Request("w1", chat=False, options={"max_new_tokens": 1}, logprobs=tiny.WORDS + 9)
    top = next(iter(pair[0].submit(request))).logprobs.top
    assert sorted(token for token, _ in top) == list(range(tiny.WORDS + 9))
    assert sum(math.exp(value) for _, value in top) == pytest.approx(1)


def test_a_processor_that_fails_ends_its_request_only(pair):
    engine, _ = pair

    def broken(ids, scores):
        raise ZeroDivisionError

    options = {"max_new_tokens": 5, "eos_token_id": []}
    bad = engine.submit(Request("w1 w2", chat=False, options=options, processors=[broken]))
    good = engine.submit(Request("w1 w2", chat=False, options=options))
    assert len(good.result().token_ids) == 5
    with pytest.raises(ZeroDivisionError):
        bad.result()
    engine.check_integrity()


def test_penalties_are_openai_s_formula():
    """logit - count * frequency - (count > 0) * presence, of the answer's tokens."""
    penalty, scores = Penalty(0.5, 0.25), torch.zeros(1, 6)
    ids = torch.tensor([[1, 2, 2]])
    assert penalty(ids, scores).tolist() == [[0] * 6]  # the prompt does not count
    ids = torch.tensor([[1, 2, 2, 4]])
    assert penalty(ids, scores)[0].tolist() == [0, 0, 0, 0, -0.75, 0]
    ids = torch.tensor([[1, 2, 2, 4, 4, 5]])
    assert penalty(ids, scores)[0].tolist() == [0, 0, 0, 0, -1.0, -0.75]


def test_stop_text_ends_with_the_token_that_completes_it(monkeypatch):
    engine = Engine.from_pretrained("nano", device="cpu", max_batch=2)
    question = "what color is the rectangle? Answer in a sentence."
    whole = engine.generate(question, PICTURE)
    monkeypatch.setattr(transformers, "StopStringCriteria", lambda *a: pytest.fail("a table of the vocabulary"))
    for stop in ("gle", "rectangle is", "is bl", "The", "."):
        got = engine.submit(Request(question, PICTURE, stop_text=["never", stop])).result()
        n = next(i for i in range(1, 9) if stop in engine.model.processor.tokenizer.decode(whole.token_ids[:i]))
        assert got.token_ids == whole.token_ids[:n] and got.finish_reason == "stop_string"
        assert got.text == engine.model.processor.tokenizer.decode(whole.token_ids[:n])
    for stop in ("rectangle?", "</s>"):  # of the prompt; of the end token, which is no text
        assert engine.submit(Request(question, PICTURE, stop_text=[stop])).result().finish_reason == "stop"


def test_load_counts_requests_and_pages(pair):
    engine, _ = pair
    assert {k: v for k, v in engine.load.items() if k != "pages"} == dict(
        waiting=0, prefilling=0, running=0, pages_promised=0
    )
    handle = engine.submit(Request("w1", chat=False, options={"max_new_tokens": 60, "eos_token_id": []}))
    next(iter(handle))
    load = engine.load
    assert load["running"] == 1 and 0 < load["pages_promised"] <= load["pages"]
    handle.cancel()
    assert engine.load["pages_promised"] == 0


def test_pictures_and_videos_from_bytes():
    data = PICTURE.read_bytes()
    assert load_image(data).tobytes() == load_image(PICTURE).tobytes()
    frames = [noise(9, 7, seed) for seed in range(3)]
    webp = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (load_video(webp) == load_video(frames)).all()
    with pytest.raises(ImageError, match="not a readable picture") as error:
        load_image(b"GIF89a broken")
    assert "0x" not in str(error.value) and "GIF89a" not in str(error.value)


def test_tokenize_counts_the_picture(pair):
    engine, _ = pair
    ids = engine.tokenize("user : <image> w3", noise(20, 20))[0]
    assert ids.count(4) == tiny.VISUAL_TOKENS
