"""A deployment of Ray Serve on this machine; needs `pip install 'dyvte-engine[ray]'`."""

from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray.serve")

import openai
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from dyvte_engine.serve.ray import Arguments, build_app

from .common import QUESTION, asked, chat_body, free_port

CONFIG = Path(__file__).parents[2] / "docs" / "ray.yaml"


def test_the_configuration_in_the_documentation_is_one():
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    application = config.applications[0]
    assert application.import_path == f"{build_app.__module__}:{build_app.__name__}"
    assert [d.name for d in application.deployments] == [
        build_app(Arguments(**application.args))._bound_deployment.name
    ]


@pytest.fixture(scope="module")
def address():
    port = free_port()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(
        build_app(Arguments(policy="keep-all", allow_policy=["auto"], engine={"device": "cpu"}, api_keys=["word"]))
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def test_answers_streams_and_errors(address, engine):
    wanted = engine.generate(QUESTION, asked()[0]["content"][0]["image_url"]["url"])
    with openai.OpenAI(base_url=f"{address}/v1", api_key="word", max_retries=0) as client:
        answer = client.chat.completions.create(model="nano", messages=asked(), extra_body={"policy": "auto"})
        assert answer.choices[0].message.content == wanted.text
        assert answer.usage.exit_layer == wanted.stats.exit_layer
        chunks = list(client.chat.completions.create(model="nano", messages=asked(), stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted.text
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=asked())
    assert httpx.post(f"{address}/v1/chat/completions", json=chat_body()).status_code == 401
    health = httpx.get(f"{address}/health", headers={"x-session-id": "one"})
    assert health.status_code == 200 and health.headers["x-replica"]
