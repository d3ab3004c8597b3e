"""Chat templates are programs of the checkpoint's author: bounded in time and size, their errors typed."""

import sys
import time
from types import SimpleNamespace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dyvte_engine import PromptError
from dyvte_engine.inputs import chat_templates
from dyvte_engine.inputs.chat_templates import apply_template
from dyvte_engine.models.original import TEMPLATE

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "why"}]}]
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}"


def processor(template):
    """What transformers' processors do with a template."""

    def apply(messages, add_generation_prompt, tokenize):
        options = dict(chat_template=template, add_generation_prompt=add_generation_prompt)
        return render_jinja_template(conversations=[messages], **options)[0][0]

    return SimpleNamespace(apply_chat_template=apply)


@pytest.mark.parametrize(
    "template", [TEMPLATE, "{{ messages[0]['role'] }}", "{% for m in messages %}{{ m }}{% endfor %}"]
)
def test_what_an_ordinary_template_writes(template):
    given = processor(template)
    tracing = sys.gettrace()
    assert apply_template(given, MESSAGES) == given.apply_chat_template(MESSAGES, True, False)
    assert sys.gettrace() is tracing


@pytest.mark.parametrize(
    "template",
    [
        NESTED + ENDS,
        NESTED + "xxxxxxxxxxxxxxx" + ENDS,
        "{% for a in range(99999) %}{% for b in range(99999) if b > 99999 %}" + ENDS,
        "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ lipsum(n=1000000000) }}",
        "{% for a in range(99999) %}{{ range(99999)|map('string')|join|length }}{% endfor %}",
    ],
)
def test_templates_that_do_not_end(template, monkeypatch):
    monkeypatch.setattr(chat_templates, "MAX_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(PromptError, match=r"chat template (runs for more than 0.2 seconds|writes or)"):
        apply_template(processor(template), MESSAGES)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = 'aaaaaaaaaaaaaaaa' %}" + "{% set x = x ~ x %}" * 60,
        "{% set x = 'aaaaaaaaaaaaaaaa' %}" + "{% set x = x + x %}" * 60,
        "{% set n = namespace(x='aaaa') %}{% for a in range(90) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x=[1, 2]) %}{% for a in range(90) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% for a in range(90000) %}" + "x" * 100 + "{% endfor %}",
    ],
)
def test_templates_that_grow(template, monkeypatch):
    monkeypatch.setattr(chat_templates, "MAX_SECONDS", 600.0)  # however slow the machine is
    with pytest.raises(PromptError, match=r"writes or holds more than 8,000,000 characters"):
        apply_template(processor(template), MESSAGES)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages.append(1) }}", "unsafe|not safe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_templates_that_fail(template, words):
    with pytest.raises(PromptError, match=rf"chat template cannot take the prompt: .*{words}"):
        apply_template(processor(template), MESSAGES)
