"""What comes back is what the engine says, in OpenAI's shape; what is not served is refused by name."""

import json
from itertools import pairwise

import pytest

from dyvte_engine import Engine
from dyvte_engine.requests import StreamChunk, TokenLogprobs
from dyvte_engine.serve.answer import Answer, Delta, chat_logprobs

from .common import PICTURE, QUESTION, SHIPPED, asked, chat_body, data_url, encoded, image_part, noise


@pytest.mark.parametrize("shipped", SHIPPED[:3])
def test_an_answer_is_the_engine_s(app, engine, shipped):
    picture = PICTURE.parent / shipped["file"]
    wanted = engine.generate(shipped["prompt"], picture)
    got = app.chat(messages=asked(shipped["prompt"], data_url(picture.read_bytes())), max_tokens=None).json()
    assert got["object"] == "chat.completion" and got["model"] == "nano" and got["id"].startswith("chatcmpl-")
    choice, usage, stats = got["choices"][0], got["usage"], wanted.stats
    assert choice["message"]["content"] == wanted.text == shipped["reference"]
    assert choice["finish_reason"] == "stop"
    assert usage["prompt_tokens"] == stats.visual_tokens + stats.text_tokens
    assert usage["completion_tokens"] == stats.new_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (usage["visual_tokens"], usage["exit_layer"]) == (stats.visual_tokens, stats.exit_layer)
    assert usage["prefill_share"] == pytest.approx(stats.prefill_tflops_true / stats.prefill_tflops_true_keep_all)
    assert (usage["kv_bytes"], usage["kv_bytes_keep_all"]) == (stats.kv_bytes, stats.kv_bytes_keep_all)


def test_a_stream_is_role_deltas_finish_usage_done(app):
    whole = app.chat().json()
    events = app.events(**chat_body(), stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    usage, choices = events[-2], [event["choices"][0] for event in events[:-2]]
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert all(event["usage"] is None and event["object"] == "chat.completion.chunk" for event in events[:-2])
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "stop" and choices[-1]["delta"] == {}
    assert len({event["id"] for event in events[:-1]}) == 1


def test_counts_so_far_where_they_are_asked_for(app):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = chat_body(n=2, temperature=1.5, seed=4)
    *events, last, _ = app.events(**body, stream_options=options)
    counts = [event["usage"] for event in events]
    assert {c["prompt_tokens"] for c in counts} == {last["usage"]["prompt_tokens"]}
    assert all(c["total_tokens"] == c["prompt_tokens"] + c["completion_tokens"] for c in counts)
    new = [c["completion_tokens"] for c in counts]
    assert new == sorted(new) and new[0] >= 1 and new[-1] == last["usage"]["completion_tokens"]


def test_without_include_usage_there_is_none(app):
    assert all("usage" not in event for event in app.events(**chat_body())[:-1])


def test_streams_of_several_choices_hold_each(app):
    body = chat_body(n=3, temperature=1.5, seed=4)
    wanted = [c["message"]["content"] for c in app.chat(**body).json()["choices"]]
    texts, ends = {}, {}
    for event in app.events(**body)[:-1]:
        choice = event["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
        ends[choice["index"]] = choice["finish_reason"]
    assert [texts[i] for i in range(3)] == wanted
    assert None not in ends.values()


def test_seeds_are_the_engine_s_and_choices_have_their_own(app, engine):
    answer = app.chat(n=3, temperature=2.0, seed=11)
    wanted = [
        engine.generate(QUESTION, PICTURE, seed=11 + i, do_sample=True, temperature=2.0, top_k=0, max_new_tokens=8).text
        for i in range(3)
    ]
    assert [c["message"]["content"] for c in answer.json()["choices"]] == wanted
    assert answer.json()["usage"]["prompt_tokens"] == app.chat().json()["usage"]["prompt_tokens"]


SAMPLED = [
    ({"top_p": 0.3, "temperature": 2}, {"do_sample": True, "temperature": 2.0, "top_p": 0.3, "top_k": 0}),
    ({"top_k": 2}, {"do_sample": True, "top_k": 2}),
    ({"top_k": -1, "min_p": 0.2}, {"do_sample": True, "top_k": 0, "min_p": 0.2}),
    ({"temperature": 0, "top_p": 0.5}, {}),
    ({"repetition_penalty": 3.0}, {"repetition_penalty": 3.0}),
    ({"logit_bias": {"70": 100, "71": -100}}, {"sequence_bias": {(70,): 100.0, (71,): -100.0}}),
    ({"min_tokens": 7}, {"min_new_tokens": 7}),
    ({"ignore_eos": True}, {"eos_token_id": []}),
    ({"max_completion_tokens": 3, "max_tokens": None}, {"max_new_tokens": 3}),
]


@pytest.mark.parametrize("given, wanted", SAMPLED, ids=[next(iter(given)) for given, _ in SAMPLED])
def test_options_are_the_engine_s(app, engine, given, wanted):
    got = app.chat(seed=3, **given).json()["choices"][0]["message"]["content"]
    assert got == engine.generate(QUESTION, PICTURE, seed=3, **{"max_new_tokens": 8, "do_sample": False} | wanted).text


def test_options_at_their_ends_are_answered(app):
    ends = dict(temperature=1e-6, repetition_penalty=0.01, presence_penalty=2, frequency_penalty=-2, top_p=5e-324)
    for fields in (ends, ends | {"temperature": 10, "repetition_penalty": 100, "min_p": 1, "top_k": 10**9}):
        assert app.chat(**fields, logit_bias={"5": 100, "6": -100}).status_code == 200


def test_frequency_penalty_changes_what_repeats(app):
    plain = app.complete(max_tokens=6, logprobs=0).json()["choices"][0]["logprobs"]["tokens"]
    varied = app.complete(max_tokens=6, logprobs=0, frequency_penalty=2, presence_penalty=2).json()
    assert len(set(plain)) == 1
    assert len(set(varied["choices"][0]["logprobs"]["tokens"])) > 1


def test_stop_strings_are_not_shown_in_whole_nor_in_part(app):
    answer = app.chat(stop=["is blue"]).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("The rectangle ", "stop")
    events = app.events(**chat_body(stop="is blue"))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == "The rectangle "
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    almost = app.chat(stop=["is blues"]).json()["choices"][0]
    assert almost["message"]["content"] == "The rectangle is blue."


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_a_stop_string_is_found_however_the_text_is_cut(step):
    text, stops = "aabaabcaabd tail", ["aabc", "xx"]
    pieces = [text[i : i + step] for i in range(0, len(text), step)]
    answer = Answer(stops)
    shown = [answer.take(StreamChunk(0, 1, piece)).text for piece in pieces]
    assert "".join(shown) == answer.text == text[: text.index("aabc")]


def test_logprobs_of_chat_and_completions(app, engine):
    content = app.chat(logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert "".join(row["token"] for row in content[:-1]) == "The rectangle is blue."
    for row in content:
        assert len(row["top_logprobs"]) == 3 and row["logprob"] == row["top_logprobs"][0]["logprob"] <= 0
        assert bytes(row["bytes"]).decode() == row["token"]
    streamed = [e["choices"][0] for e in app.events(**chat_body(logprobs=True, top_logprobs=3))[:-1]]
    assert [row for c in streamed if c["logprobs"] for row in c["logprobs"]["content"]] == content
    given = app.complete(logprobs=2).json()["choices"][0]
    assert [len(top) for top in given["logprobs"]["top_logprobs"]] == [2] * 4
    starts = [*given["logprobs"]["text_offset"], len(given["text"])]
    cut = [given["text"][a:b] for a, b in pairwise(starts)]
    assert cut == given["logprobs"]["tokens"]
    assert app.chat().json()["choices"][0]["logprobs"] is None


def test_bytes_of_tokens_that_are_parts_of_a_character(app, engine):
    tokenizer = engine.model.processor.tokenizer
    for text in ("é日", "🙂"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) > len(text)
        for token in ids:
            bias = {str(token): 100}
            row = app.complete(logit_bias=bias, logprobs=0, max_tokens=1)  # its text is a replacement character
            assert row.json()["choices"][0]["logprobs"]["tokens"] == ["\ufffd"]
        rows = [app.chat(logit_bias={str(t): 100}, logprobs=True, max_tokens=1).json() for t in ids]
        found = [row["choices"][0]["logprobs"]["content"][0]["bytes"] for row in rows]
        assert bytes(b for one in found for b in one).decode() == text


@pytest.mark.parametrize("tokens, wanted", [(["<0xE2>", "<0x82>", "<0xAC>"], "€"), (["â", "Ĥ¬"], "€"), (["a"], "a")])
def test_bytes_of_both_kinds_of_tokenizers(tokens, wanted):
    class Tokenizer:
        def decode(self, ids):
            return tokens[ids[0]] if wanted == "a" else "\ufffd"

        def convert_ids_to_tokens(self, token):
            return tokens[token]

    given = [Delta("", i, TokenLogprobs(-1.0), None) for i in range(len(tokens))]
    rows = chat_logprobs(given, Tokenizer())["content"]
    assert bytes(b for row in rows for b in row["bytes"]).decode() == wanted


def test_places_of_wrong_values_are_the_client_s(app):
    refused = app.complete(prompt=[1, 2]).json()["error"]
    assert refused["param"] == "prompt" and "[" not in refused["message"] and "_unicode" not in refused["message"]
    refused = app.complete(prompt="what is", max_tokens=10**6).json()["error"]
    assert refused["param"] is None and refused["message"].startswith("the prompt has ")
    refused = app.complete(prompt="what is", temperature=1e-30).json()["error"]
    assert refused["param"] == "temperature"


def test_completions_of_several_prompts(app, engine):
    answer = app.complete(prompt=["what is", "how many"], n=2).json()
    wanted = [
        engine.generate(p, chat=False, max_new_tokens=4).text for p in ("what is", "what is", "how many", "how many")
    ]
    assert [c["text"] for c in answer["choices"]] == wanted
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert answer["object"] == "text_completion"
    tokens = sum(map(len, engine.tokenize(["what is", "how many"], chat=False)))
    assert answer["usage"]["prompt_tokens"] == tokens
    stream = app.events("/v1/completions", model="nano", prompt="what is", max_tokens=4)
    assert "".join(e["choices"][0]["text"] for e in stream[:-1]) == wanted[0]


def test_a_policy_is_what_the_operator_allowed(app, engine):
    keep = app.chat(policy="keep-all").json()["usage"]
    early = app.chat(policy="dynamic:auto, 0.5").json()["usage"]
    own = app.chat().json()["usage"]
    assert keep["exit_layer"] is None and keep["prefill_share"] == 1
    assert early["exit_layer"] < own["exit_layer"] and early["kv_bytes"] < own["kv_bytes"] < keep["kv_bytes"]
    refused = app.chat(policy="fixed:3")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "policy"
    assert app("GET", "/v1/models").json()["data"][0]["policies"] == ["keep-all", "dynamic:auto,0.5"]


COLOR = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}


def test_json_schema_and_json_object(app):
    pytest.importorskip("llguidance")
    schema = COLOR | {"additionalProperties": False}
    asked_for = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for fields in ({"temperature": 0}, {"temperature": 3.0, "seed": 1}):
        choice = app.chat(response_format=asked_for, max_tokens=40, **fields).json()["choices"][0]
        assert json.loads(choice["message"]["content"])["color"] in ("red", "blue")
        assert choice["finish_reason"] == "stop"
    text = app.chat(response_format={"type": "json_object"}, max_tokens=30).json()["choices"][0]["message"]["content"]
    assert text.startswith("{")
    plain = app.chat(response_format={"type": "text"}).json()["choices"][0]["message"]["content"]
    assert plain == "The rectangle is blue."


def test_choices_and_expressions(app):
    pytest.importorskip("llguidance")
    for form, accepted in (
        ({"choice": ["a (b)", "c|d"]}, ("a (b)", "c|d")),
        ({"regex": "[0-9]{3}"}, tuple(f"{i:03}" for i in range(1000))),
        ({"json": {"const": 7}}, ("7",)),
    ):
        choice = app.chat(structured_outputs=form, max_tokens=20).json()["choices"][0]
        assert choice["message"]["content"] in accepted and choice["finish_reason"] == "stop"
    for form in ({}, {"choice": ["a"], "regex": "a"}, {"regex": "("}, {"grammar": "x"}, {"choice": []}):
        assert app.chat(structured_outputs=form).status_code == 400
    for longer in ({"ignore_eos": True}, {"min_tokens": 3}):
        assert app.chat(structured_outputs={"regex": "a"}, **longer).status_code == 400
    both = app.chat(structured_outputs={"regex": "a"}, response_format={"type": "text"})
    assert both.status_code == 400


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "http://elsewhere/x.json"}, {"pattern": "("}])
def test_schemas_that_are_not_accepted_are_refused(app, schema):
    refused = app.chat(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "string"} | schema}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "response_format", refused.text


REFUSED = [
    {"tools": [{"type": "function"}]},
    {"functions": []},
    {"audio": {}},
    {"modalities": ["text"]},
    {"best_of": 2},
    {"nonsense": 1},
    {"temperature": -1},
    {"temperature": "1"},
    {"temperature": 1e-300},
    {"repetition_penalty": 5e-324},
    {"top_p": 0},
    {"n": 0},
    {"n": 9},
    {"n": 10**9},
    {"max_tokens": 0},
    {"max_tokens": 10**6},
    {"max_tokens": 3, "max_completion_tokens": 4},
    {"top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 21},
    {"stop": ["x"] * 17},
    {"stop": "x" * 257},
    {"stop": ""},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"528": 1}},
    {"logit_bias": {"5": 101}},
    {"logit_bias": {str(i): 1 for i in range(1025)}},
    {"presence_penalty": 3},
    {"stream_options": {"include_usage": True}},
    {"seed": 2**63},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "grammar"}},
    {"messages": []},
    {"messages": "hello"},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": "user", "content": []}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": "x", "name": "y"}]},
    {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    {"messages": [{"role": "user", "content": [image_part() | {"detail": "low"}]}]},
    {"messages": asked(QUESTION, *["data:image/png;base64,AA"] * 17)},
]


@pytest.mark.parametrize("fields", REFUSED, ids=[json.dumps(fields)[:50] for fields in REFUSED])
def test_what_is_not_served_is_a_400_that_names_it(app, fields):
    refused = app.chat(**fields)
    error = refused.json()["error"]
    assert refused.status_code == 400, refused.text
    assert error["type"] == "invalid_request_error"
    named = error["param"] or error["message"]
    assert next(iter(fields)) in named or "max_tokens" in error["message"], error


def test_nulls_ask_for_nothing(app):
    assert (
        app.chat(tools=None, stop=None, logit_bias=None, n=None, policy=None, response_format=None).status_code == 200
    )


def test_another_model_is_a_404(app):
    refused = app.chat(model="gpt-4o")
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"
    assert app("GET", "/v1/nothing").json()["error"]["type"] == "not_found_error"


def test_bodies_that_are_no_json(app):
    for body in (b"{", b"[" * 200_000, b"\xff\xfe", b"null", b"[]"):
        refused = app("POST", "/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert refused.status_code == 400, (body[:9], refused.text)


def test_tokenize(app, engine):
    answer = app("POST", "/tokenize", json={"prompt": "what is"}).json()
    tokenizer = engine.model.processor.tokenizer
    assert answer == {"count": 2, "max_model_len": engine.max_len, "tokens": tokenizer("what is").input_ids}
    with_picture = app("POST", "/tokenize", json={"messages": asked()}).json()
    assert with_picture["tokens"] == engine.tokenize(QUESTION, PICTURE)[0]
    assert app("POST", "/tokenize", json={}).status_code == 400


def test_version_and_health(app):
    assert app("GET", "/version").json()["version"]
    assert app("GET", "/health").status_code == 200


def test_a_conversation_with_two_pictures_and_turns(app, engine):
    other = data_url(encoded(noise(40, 40)))
    messages = [
        *asked("what is it?", other),
        {"role": "assistant", "content": "a square"},
        *asked("and here?"),
    ]
    got = app.chat(messages=messages, policy="keep-all").json()
    turns = [
        {"role": "user", "content": [{"type": "image", "url": other}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "a square"},
        {"role": "user", "content": [{"type": "image", "image": str(PICTURE)}, {"type": "text", "text": "and here?"}]},
    ]
    wanted = engine.generate([turns], policy="keep-all", max_new_tokens=8)[0]
    assert got["choices"][0]["message"]["content"] == wanted.text
    assert got["usage"]["visual_tokens"] == wanted.stats.visual_tokens == 288


def test_videos_where_the_family_takes_none(app):
    part = {"type": "video_url", "video_url": {"url": data_url(encoded(noise(9, 9), "GIF"), "image/gif")}}
    refused = app.chat(messages=[{"role": "user", "content": [part]}])
    assert refused.status_code == 400 and "video" in refused.json()["error"]["message"]


def test_the_engine_s_own_length_is_the_bound(app, engine):
    refused = app.chat(max_tokens=engine.max_len)
    assert refused.status_code == 400 and "max_tokens" in refused.json()["error"]["message"]
    assert isinstance(engine, Engine)
