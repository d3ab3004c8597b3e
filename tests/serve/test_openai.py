"""The `openai` package against a real server, and errors as it knows them."""

import asyncio
import re

import openai
import pytest

from dyvte_engine import EXAMPLES
from dyvte_engine.serve.options import ServeOptions

from .common import PICTURE, QUESTION, asked, listening


@pytest.fixture(scope="module")
def address(engine):
    with listening(engine, ServeOptions(api_keys=("key-one", "key-two"))) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="key-two", max_retries=0) as made:
        yield made


def test_a_question_about_a_picture(client, engine):
    answer = client.chat.completions.create(model="nano", messages=asked())
    wanted = engine.generate(QUESTION, PICTURE)
    assert answer.choices[0].message.content == wanted.text
    assert answer.usage.exit_layer == wanted.stats.exit_layer
    raw = client.chat.completions.with_raw_response.create(
        model="nano", messages=asked(), extra_headers={"x-request-id": "mine-7"}
    )
    assert raw.headers["x-request-id"] == "mine-7" and raw.parse().id == "chatcmpl-mine-7"


def test_a_stream(client, engine):
    chunks = list(client.chat.completions.create(model="nano", messages=asked(), stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == engine.generate(QUESTION, PICTURE).text


def test_sixteen_at_once(address, engine):
    async def ask(client, i):
        stream = await client.chat.completions.create(
            model="nano", messages=asked(), stream=True, seed=i, temperature=2.0, max_tokens=6
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="key-one") as client:
            return await asyncio.gather(*(ask(client, i) for i in range(16)))

    options = dict(do_sample=True, temperature=2.0, top_k=0, max_new_tokens=6)
    assert asyncio.run(all_of_them()) == [engine.generate(QUESTION, PICTURE, seed=i, **options).text for i in range(16)]
    engine.check_integrity()


@pytest.mark.parametrize(
    "page, wanted", [("README.md", "exit after layer"), ("docs/serving.md", "The rectangle is blue")]
)
def test_the_client_of_a_page(engine, page, wanted, monkeypatch, capsys):
    root = EXAMPLES.parents[2]
    code = next(c for c in re.findall(r"```python\n(.*?)```", (root / page).read_text(), re.DOTALL) if "openai" in c)
    monkeypatch.chdir(root)
    code = code.replace('"picture.png"', repr(str(PICTURE)))
    with listening(engine, ServeOptions(policies={"dynamic:auto,0.5": "keep-all"})) as (url, _):
        exec(compile(code.replace("http://127.0.0.1:8000", url), page, "exec"), {})
    assert wanted in capsys.readouterr().out


def test_completions_and_models(client):
    assert client.completions.create(model="nano", prompt="what is", max_tokens=2, logprobs=1).choices[0].text
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_parse_with_a_schema(client):
    pydantic = pytest.importorskip("pydantic")
    pytest.importorskip("llguidance")

    class Seen(pydantic.BaseModel):
        blue: bool

    parsed = client.chat.completions.parse(model="nano", messages=asked(), response_format=Seen, max_tokens=30)
    assert parsed.choices[0].message.parsed.blue in (True, False)


def test_errors_are_the_package_s_classes(address, client):
    with pytest.raises(openai.BadRequestError, match="temperature") as error:
        client.chat.completions.create(model="nano", messages=asked(), temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=asked())
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(model="nano", messages=asked("x", "data:image/png;base64,AAAA"))
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="key-on").models.list()
