"""What tokens of an answer add to its text, as they come."""

import random

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dyvte_engine.runtime.sequence import GrowingText
from tests import tiny
from tests.engine.conftest import build

BYTES = [f"<0x{n:02X}>" for n in range(256)]
WORDS = ["\u2581on", "e", "\u2581", "\u2581\u2581", ",", "\u2581two", "\u00e9", "s", "\u2581'", "n't", "."]
TEXT = "Zwölf \U0001f600\U0001f680\U0001f468\u200d\U0001f469 und 世界 sind genug, \n  nicht wahr?" * 3


def fast(backend, **options):
    backend.add_special_tokens(["<s>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **options)


def by_bytes():
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(backend)


def with_bytes():
    """As Llama's: words whose space is a sign, and a token for each byte of other characters."""
    vocab = {word: i for i, word in enumerate([*BYTES, *WORDS, "<unk>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return fast(backend)


def of_pieces(**options):
    """As BERT's; what is cleaned up looks at the token behind a space."""
    vocab = {word: i for i, word in enumerate(["it", "##s", "do", "n't", "'", "s", ".", ",", "<unk>"])}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return fast(backend, **options)


MAKES = {
    "bytes": by_bytes,
    "with bytes": with_bytes,
    "pieces": of_pieces,
    "cleaned": lambda: of_pieces(clean_up_tokenization_spaces=True),
}


def answers(tokenizer):
    """Random ones, and text in bytes; special tokens in between."""
    rng, n = random.Random(0), len(tokenizer)
    yield [tokenizer.bos_token_id] * 11 + [rng.randrange(n) for _ in range(60)]
    for _ in range(20):
        few = rng.sample(range(n), min(n, 5))
        yield [rng.choice([rng.randrange(n), *few]) for _ in range(rng.choice([1, 30, 90]))]
    if n >= 256:
        names = tokenizer.convert_ids_to_tokens(range(256))
        place = {byte: names.index(name) for byte, name in enumerate(BYTES)} if names[0] == BYTES[0] else None
        yield tokenizer(TEXT)["input_ids"] if place is None else [place[byte] for byte in TEXT.encode()]


@pytest.mark.parametrize("make", MAKES)
def test_it_is_the_text_of_all_tokens(make):
    """At every place where what follows cannot change it, and in the end in any case."""
    tokenizer = MAKES[make]()
    for ids in answers(tokenizer):
        growing = GrowingText(tokenizer)
        for end in range(1, len(ids) + 1):
            got, want = growing.text(ids[:end]), tokenizer.decode(ids[:end], skip_special_tokens=True)
            waits = got.endswith("\ufffd") and want.endswith("\ufffd")  # nobody is shown either
            assert waits or got == want, (ids[:end], got, want)
        assert growing.text(ids, whole=True) == tokenizer.decode(ids, skip_special_tokens=True)


LONG = [
    ("bytes", ["e", "s"]),
    ("bytes", ["\u010a"]),  # new lines
    ("with bytes", ["e", "s"]),
    ("with bytes", ["\u2581"]),
    ("with bytes", [BYTES[byte] for byte in "世界".encode()]),
    ("pieces", ["do", "it"]),
    ("cleaned", ["do", "it"]),
]


@pytest.mark.parametrize(("make", "tokens"), LONG)
def test_no_token_takes_longer_than_the_one_before(make, tokens):
    tokenizer, asked = MAKES[make](), []
    ids = tokenizer.convert_tokens_to_ids(tokens)
    own = tokenizer.decode
    tokenizer.decode = lambda ids, **options: asked.append(len(ids)) or own(ids, **options)
    growing = GrowingText(tokenizer)
    for end in range(1, 400):
        growing.text((ids * 200)[:end])
    assert len(asked) > 400 and max(asked) <= 20  # known ones of two looks, and those of a character


@pytest.mark.parametrize("name", ["decode", "_decode"])
@pytest.mark.parametrize("of", ["class", "tokenizer"])
def test_an_own_way_to_decode_is_asked(of, name, monkeypatch):
    tokenizer = by_bytes()
    ids = tokenizer("one")["input_ids"]
    assert GrowingText(tokenizer).text(ids) == "one"
    instead = (lambda self, *ids, **options: "two") if of == "class" else (lambda *ids, **options: "two")
    monkeypatch.setattr(type(tokenizer) if of == "class" else tokenizer, name, instead)
    assert GrowingText(tokenizer).text(ids) == tokenizer.decode(ids) == "two"


def test_an_answer_that_nobody_streams_is_read_once(monkeypatch):
    engine, _ = build()
    texts, images = tiny.prompts(seed=7, n=2)
    options = dict(chat=False, max_new_tokens=12, eos_token_id=[])
    streamed = list(engine.stream(texts, images, **options))
    read, text = [], GrowingText.text
    monkeypatch.setattr(GrowingText, "text", lambda self, *args: read.append(args) or text(self, *args))
    results = engine.generate(texts, images, **options)
    assert len(read) == 2
    for index, result in enumerate(results):
        said = "".join(chunk.text for chunk in streamed if chunk.index == index)
        whole = engine.model.processor.tokenizer.decode(result.token_ids, skip_special_tokens=True)
        assert result.text == said == whole
