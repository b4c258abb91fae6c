"""Templates render as their authors mean, and none can do more than that."""

from __future__ import annotations

import time

import pytest

from router import template_sandbox
from router.chat import ChatTemplate
from workers.errors import InvalidRequestError, ModelFileError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
Be brief.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def render(template: str) -> str:
    return ChatTemplate(template, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}).render(MESSAGES)


def test_a_common_template() -> None:
    assert render(CHATML) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[1].content | trim }}{{ eos_token }}", "<s>yes</s>"),
        ("{% for m in messages %}\n  {{- m.role }}{% if loop.index0 % 2 == 0 %},{% endif %}\n{% endfor %}", "user,assistant"),  # noqa: E501
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "hi"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]'),
        ("{{ ['é'] | tojson(indent=1) }}", '[\n "é"\n]'),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ 'a-b-c'.replace('-', '+') }}{{ 'a-b' | replace('-', '.') }}{{ '/'.join(['x', 'y']) }}", "a+b+ca.bx/y"),
        ("{{ 'l1\nl2' | indent(2) }}", "l1\n  l2"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 * 3 %}{% endfor %}{{ ns.n }}", "12"),  # noqa: E501
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f(2) ~ none }}", "<a><2>None"),
        ("{% if tools %}no{% endif %}{% if messages[0].tool_calls is defined %}no{% endif %}{{ pad_token }}", ""),
        ("{% set octavo_meter = 1 %}{{ 'a' ~ octavo_meter }}", "a1"),
        ("{{ 2 ** 5 }}{{ messages[1:] | length }}{{ messages[0].content.split('h')[1] }}", "321i"),
    ],
)  # fmt: skip
def test_what_templates_use(template: str, text: str) -> None:
    assert render(template) == text


def test_the_time() -> None:
    before = time.strftime("%Y-%m")
    assert render("{{ strftime_now('%Y-%m') }}") in (before, time.strftime("%Y-%m"))


def test_a_template_s_own_refusal() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


GROW = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}{% set ns.x = EXPR %}{% endfor %}"
NEST = GROW.replace("EXPR", "[ns.x, ns.x]")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * [1] }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 9.0 ** 9999 }}",
        GROW.replace("EXPR", "ns.x ~ ns.x"),
        GROW.replace("EXPR", "ns.x + ns.x"),
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        NEST + "{{ ns.x }}",
        NEST + "{{ ns.x | tojson }}",
        NEST + "{{ ns.x | upper }}",
        NEST + "{{ 'a' ~ ns.x }}",
        NEST + "{{ 'x' | default(ns.x) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ ('{:1000000000}' | attr('format'))(1) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "{{ range(99999) | join('a' * 9999) }}",
        "{{ ('a' * 9999).join(['a'] * 99999) }}",
        "{{ 'a' | indent(10**9, true) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_little_makes_not_much(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_CHARACTERS", 1_000_000)
    before = time.process_time()
    with pytest.raises((InvalidRequestError, ModelFileError)):
        render(template)
    assert time.process_time() - before < 60  # not a measurement: without the bounds these take for ever


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_no_rendering_without_end(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 10_000)
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.1)
    with pytest.raises(InvalidRequestError, match=r"it takes (more|longer) than"):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum(5) }}",
        "{{ cycler(1) }}",
    ],
)
def test_the_sandbox(template: str) -> None:
    with pytest.raises(InvalidRequestError):
        render(template)
