"""A conversation: the answers of its whole text, with its pictures computed once."""

import random

import pytest

from dyvte_engine import ImageError, InvalidArgumentError, KeepAll, PromptError
from tests import tiny
from tests.engine.conftest import build

A, B = (tiny.picture(random.Random(seed)) for seed in (1, 2))


def test_every_turn_answers_the_whole_conversation():
    engine, hf = build(max_len=512)
    chat, proc = engine.chat(system="w1 w2", max_new_tokens=5), engine.model.processor
    turns = [("w3 w4 ?", [A]), ("w5", []), ("w6 w7", [B]), ("w8", []), ("w9", [])]
    said, pictures, prefixes = [{"role": "system", "content": [{"type": "text", "text": "w1 w2"}]}], [], []
    for text, own in turns:
        parts = [{"type": "image"} for _ in own]
        said.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
        pictures += own
        result = chat.ask(text, own)
        whole = proc.apply_chat_template(said, add_generation_prompt=True)
        assert result.token_ids == tiny.hf_greedy(hf, proc, whole, pictures, 5)
        said.append({"role": "assistant", "content": [{"type": "text", "text": result.text}]})
        prefixes.append((result.stats.prefix, result.stats.pictures_reused))
    assert prefixes == [("miss", 0), ("hit", 1), ("miss", 1), ("hit", 2), ("hit", 2)]
    assert len(chat.messages) == 11


def test_a_turn_may_have_its_own_options_and_be_streamed():
    engine, _ = build(max_len=512, policy=KeepAll())
    chat, plain = (engine.chat(policy="fixed:1", max_new_tokens=4) for _ in range(2))
    chunks = list(chat.stream("w3 w4", A))
    assert chunks[-1].result.stats.exit_layer == 1 and len(chunks[-1].result.token_ids) <= 4
    assert plain.ask("w3 w4", A).token_ids == chunks[-1].result.token_ids and plain.messages == chat.messages
    assert chat.ask("w5", policy=KeepAll()).stats.exit_layer is None
    assert chat.ask("w5", max_new_tokens=1).stats.new_tokens == 1


def test_what_fails_is_not_said():
    engine, _ = build(max_len=64)
    chat = engine.chat(max_new_tokens=4)
    with pytest.raises(PromptError, match="max_len"):
        chat.ask(" ".join(["w1"] * 70))
    with pytest.raises(ImageError, match="accepted"):
        chat.ask("w1", 7)
    for _ in chat.stream("w1 w2", min_new_tokens=4):
        break
    assert chat.messages == []
    assert chat.ask("w1 w2").stats.new_tokens > 0 and len(chat.messages) == 2
    with pytest.raises(InvalidArgumentError, match="policy"):
        engine.chat(policy=3)


def test_forgotten_is_forgotten():
    engine, _ = build()
    for prefix in ("miss", "hit"):
        assert engine.generate("w1", A, max_new_tokens=1).stats.prefix == prefix
    engine.forget()
    assert len(engine.runner.prefixes) == engine.runner.pictures.bytes_held == 0
    stats = engine.generate("w1", A, max_new_tokens=1).stats
    assert (stats.prefix, stats.pictures_reused) == ("miss", 0)
