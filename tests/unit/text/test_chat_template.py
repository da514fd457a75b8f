"""Chat templates: the same text as `transformers` gives, and nothing a template does can hang or fill memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from brim.errors import InvalidParameter, RequestError, TokenizerError
from brim.formats.model_files import ModelFiles
from brim.text import template_sandbox
from brim.text.chat_template import ChatTemplate

_USER = [{"role": "user", "content": "Hi"}]
_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hi <there> "},
    {"role": "assistant", "content": "Hello é"},
    {"role": "user", "content": "Bye"},
]
_GEMMA_LIKE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}{{ raise_exception('Roles must alternate, not ' ~ message.role) }}{% endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}
"""
_CHATML_WITH_TOOLS = """{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(count=0) %}
{% for m in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {% generation %}<|im_start|>{{ m.role }}
{{ m['content'] }}<|im_end|>{{ eos_token }}{% endgeneration %}

    {%- set ns.count = ns.count + 1 %}
{% endfor %}
{{ ns.count }} {{ [1, 'a', {'b': none}] | tojson(indent=2) }} {{ "%s-%d" % ("x", 3) }} {{ strftime_now("%Y") | length }}
"""


@pytest.mark.parametrize("source", [_GEMMA_LIKE, _CHATML_WITH_TOOLS])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "é", "parameters": {"a": [1, 2.5, None]}}}]])
def test_equals_transformers(source: str, tools: Any) -> None:
    oracle = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (expected,), _ = oracle.render_jinja_template(
        [_TURNS], tools=tools, chat_template=source, add_generation_prompt=True, **tokens
    )
    assert ChatTemplate(source, tokens).render(_TURNS, tools=tools) == expected


def test_generation_prompt_and_extra_variables() -> None:
    template = ChatTemplate("{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}{{ thinking }}")
    assert template.render(_USER) == "Hi>"
    assert template.render(_USER, add_generation_prompt=False, extra={"thinking": True}) == "HiTrue"
    with pytest.raises(InvalidParameter, match="messages"):
        template.render(_USER, extra={"messages": []})


def test_content_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]}]
    assert ChatTemplate("{{ messages[0].content }}").render(parts) == "a\nb\nc"
    wants_lists = "{% for part in messages[0]['content'] %}[{{ part.text }}]{% endfor %}"
    assert ChatTemplate(wants_lists).render(parts) == "[a][b][c]"
    assert ChatTemplate(wants_lists).render(_USER) == "[Hi]"
    takes_both = "{% if messages[0].content is string %}{{ messages[0].content }}{% else %}" + wants_lists + "{% endif %}"
    assert ChatTemplate(takes_both).render(_USER) == "Hi"


@pytest.mark.parametrize(
    "messages",
    [
        ["text"],
        [{"content": "x"}],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "x", "extra": object()}],
    ],
)
def test_wrong_messages_are_refused(messages: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        ChatTemplate("{{ messages }}").render(messages)
    assert caught.value.param


def test_messages_nested_too_deep_are_refused() -> None:
    value: Any = "x"
    for _ in range(5000):
        value = [value]
    with pytest.raises(InvalidParameter, match="deep"):
        ChatTemplate("x").render([{"role": "user", "content": None, "extra": value}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "refuses these messages: Roles must alternate"),
        ("{{ a.b.c }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% include 'x' %}", "TypeError"),
        ("{% set ns = namespace(_x=1) %}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
    ],
)
def test_failing_templates_say_so(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(source).render(_USER)


_DOUBLING = "{%% set ns = namespace(a='x') %%}{%% for i in range(60) %%}{%% set ns.a = %s %%}{%% endfor %%}{{ ns.a }}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% set x %}{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}",
        "{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ (2 ** 4000) ** 4000 }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ (1).to_bytes(10**10, 'big') }}",
        "{{ 'x' | center(10**10) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ ('x' * 9999999).join('y' * 99999) }}",
        "{{ range(9999) | map('center', 9999) | join }}",
        "{{ range(9999) | list | tojson(indent=9999) }}",
        "{{ ('x\\n' * 99999) | indent(9999) }}",
        _DOUBLING % "ns.a ~ ns.a",
        _DOUBLING % "ns.a + ns.a",
        _DOUBLING % "[ns.a, ns.a]",
        _DOUBLING % "(ns.a, ns.a)",
        _DOUBLING % "{'a': ns.a, 'b': ns.a}",
        _DOUBLING % "dict(a=ns.a, b=ns.a)",
        _DOUBLING % "namespace(a=ns.a, b=ns.a)",
        _DOUBLING % "ns.a.replace('x', 'xx')",
        _DOUBLING % "ns.a | replace('x', 'xx')",
    ],
)
def test_nothing_hangs_or_fills_memory(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = (0.2, 200_000)
    monkeypatch.setattr(template_sandbox.RenderBudget.__init__, "__defaults__", defaults)
    started = time.perf_counter()
    with pytest.raises(RequestError, match="was stopped"):
        ChatTemplate(source).render(_USER)
    assert time.perf_counter() - started < 3.0


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{", "{% for x in y %}", "{{ x | nonesuch }}", "{{ " + "(" * 5000, "x" * 1_000_001]
)
def test_invalid_templates_are_refused_at_once(source: str) -> None:
    with pytest.raises(TokenizerError, match="--chat-template"):
        ChatTemplate(source)


def test_where_templates_come_from(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.chat_template": "gguf {{ bos_token }}",
        "tokenizer.ggml.tokens": ["<a>", "<b>"],
        "tokenizer.ggml.bos_token_id": 1,
    }
    file = tmp_path / "chat_template.jinja"
    file.write_text("file {{ eos_token }}", encoding="utf-8")
    config: dict[str, Any] = {"chat_template": "config", "bos_token": "B", "eos_token": {"content": "E"}}

    def first(**sources: Any) -> str:
        template = ChatTemplate.from_sources(**sources)
        assert template is not None
        return template.render(_USER)

    assert ChatTemplate.from_sources() is None
    assert first(gguf_metadata=metadata) == "gguf <b>"
    assert first(gguf_metadata=metadata, tokenizer_config=config) == "config"
    assert first(template_path=file, tokenizer_config=config) == "file E"
    assert first(override="{{ 'inline' }}", template_path=file) == "inline"
    assert first(override=str(file)) == "file "
    with pytest.raises(TokenizerError, match="cannot be read"):
        first(override=str(tmp_path / "absent.jinja"))


def test_named_templates() -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    template = ChatTemplate.from_sources(tokenizer_config={"chat_template": named})
    assert template is not None
    assert template.render(_USER) == "plain"
    assert template.render(_USER, tools=[{"name": "f"}]) == "with tools"
    for wrong in ([], [5], {"a": 5}, 5):
        with pytest.raises(TokenizerError):
            ChatTemplate.from_sources(tokenizer_config={"chat_template": wrong})


def test_from_a_folder(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": "<s>"}))
    files = ModelFiles(name="m", kind="safetensors", weight_paths=(), tokenizer_config_path=config)
    template = ChatTemplate.from_files(files)
    assert template is not None and template.render(_USER) == "<s>Hi"
