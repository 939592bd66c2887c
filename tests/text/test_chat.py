"""Chat templates against transformers, and what a broken, hostile or absent template ends in."""

from __future__ import annotations

import copy

import pytest

from headrace.errors import ArgumentError, ModelFileError, TemplateError, UnsupportedError
from headrace.text import template_language
from headrace.text.chat import ChatTemplate

CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' ~ date_string ~ '\\n\\n' }}
{{- system_message ~ '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ '}' ~ '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: user, assistant, ...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"""

QWEN_TOOLS = """{%- macro write(role, text) %}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{%- set ns = namespace(last_user=-1, seen='') %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.last_user < 0 and message.role == 'user' %}{%- set ns.last_user = index %}{%- break %}{%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools>' ~ (tools | tojson(indent=2)) ~ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = message.content | map(attribute='text') | join('+') %}{%- endif %}
    {%- set ns.seen = ns.seen ~ message.role[0] %}
    {{- write(message.role, content) }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}<tool_call>{{ call.function | tojson(ensure_ascii=True) }}</tool_call>
        {%- endfor %}
    {%- endif %}
    {%- if loop.index0 == ns.last_user %}(last){% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}{{ ns.seen }}"""

GENERATION = """{% set mark = 'out' %}{% for message in messages %}
{% if message.role == 'assistant' %}{% generation %}{% set mark = 'in' %}{{ message.content }}{{ eos_token }}
{% endgeneration %}{% else %}{{ message.content }}{% endif %}
{% endfor %}{{ mark }}{{ dict(a=1, b=[2, {'c': '<&>é'}]) | tojson(sort_keys=True, separators=(',', ':')) }}"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'It\'s <sunny> & "warm" in Zürich',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": "Hi <b>there</b>, \n it's {{ 7 * 7 }} {% raw %} 😀"}
ANSWER = {"role": "assistant", "content": "Hello!\n"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
}
RESULT = {"role": "tool", "content": "12 °C"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}

CASES = [
    (CHATML, [SYSTEM, USER, ANSWER, USER], {}),
    (LLAMA3, [SYSTEM, USER, ANSWER], {}),
    (LLAMA3, [USER, CALL, RESULT], {"date_string": "1 Jan 2030", "tools": TOOLS}),
    (MISTRAL, [USER, ANSWER, USER], {}),
    (QWEN_TOOLS, [SYSTEM, USER, CALL, RESULT, USER], {"tools": TOOLS}),
    (QWEN_TOOLS, [PARTS, ANSWER], {"enable_thinking": False}),
    (GENERATION, [USER, ANSWER, USER], {}),
]


@pytest.fixture(scope="module")
def reference():
    """transformers' renderer, with the special tokens the templates here use."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    model = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")


def build(source: str) -> ChatTemplate:
    """A template in a file with the special tokens of `reference`."""
    return ChatTemplate.from_metadata(
        {
            "tokenizer.chat_template": source,
            "tokenizer.ggml.tokens": ["<s>", "</s>"],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        }
    )


@pytest.fixture
def few_steps(monkeypatch) -> int:
    """Lowers the number of steps a rendering may take, so that reaching it takes no time."""
    monkeypatch.setattr(template_language, "MAX_STEPS", 20_000)
    return 20_000


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_same_text_as_transformers(reference, case, add_generation_prompt):
    source, messages, arguments = CASES[case]
    arguments = {**arguments, "add_generation_prompt": add_generation_prompt}
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **arguments)
    assert len(expected) > 50
    assert build(source).render(messages, **arguments) == expected


@pytest.mark.parametrize("messages", [[SYSTEM, USER], [USER, ANSWER, USER]])
def test_the_default_model_s_template(reference, default_metadata, messages):
    source = default_metadata["tokenizer.chat_template"]
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate.from_metadata(default_metadata).render(messages) == expected


def test_rendering_leaves_the_conversation_as_it_was():
    messages, tools = copy.deepcopy([USER, CALL]), copy.deepcopy(TOOLS)
    build(QWEN_TOOLS).render(messages, tools=tools)
    assert (messages, tools) == ([USER, CALL], TOOLS)


def test_fields_that_are_none_are_absent():
    source = "{{ messages[0].content is defined }}{{ 'name' in messages[0] }}"
    assert build(source).render([{"role": "assistant", "content": None, "name": None, **_calls()}]) == "FalseFalse"


def _calls():
    return {"tool_calls": CALL["tool_calls"]}


def test_templates_by_name():
    template = ChatTemplate.from_metadata(
        {
            "tokenizer.chat_template": "plain",
            "tokenizer.chat_template.tool_use": "tools",
            "tokenizer.chat_template.rag": "documents",
            "tokenizer.chat_templates": ["tool_use", "rag"],
        }
    )
    assert template.names == ("default", "rag", "tool_use")
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=TOOLS) == "tools"
    assert template.render([USER], name="rag") == "documents"
    with pytest.raises(ArgumentError, match=r"'poem'(.|\n)*default, rag, tool_use"):
        template.render([USER], name="poem")


def test_no_template():
    with pytest.raises(UnsupportedError, match="--raw"):
        ChatTemplate.from_metadata({"general.architecture": "llama"})


def test_a_template_that_is_no_text():
    with pytest.raises(ModelFileError, match="expected text"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 7})


def test_a_template_may_refuse():
    with pytest.raises(TemplateError, match=r"refuses.*Roles must alternate"):
        build(MISTRAL).render([USER, USER])


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{% for m in messages %}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at_all }}",
        "{{ messages | no_such_filter }}",
        "{% include 'file' %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_broken_templates(source):
    with pytest.raises(TemplateError, match="--raw"):
        build(source).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ dict.fromkeys.__self__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace(a=1) %}{% set ns.__init__ = 2 %}",
        "{{ strftime_now.__code__.co_consts }}",
    ],
)
def test_templates_stay_in_the_sandbox(source):
    with pytest.raises(TemplateError, match="failed"):
        build(source).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in [1] * 999999 %}{% for j in [1] * 999999 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set x = 'a' * 9999999 %}{{ x }}{{ x }}",
        "{{ 'a' * 10**10 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ lipsum(10**9) }}",
    ],
)
def test_templates_that_never_end_are_ended(source, few_steps):
    with pytest.raises(TemplateError, match="failed"):
        build(source).render([USER])


def test_a_template_is_usable_after_it_was_ended(few_steps):
    template = build("{% for m in messages %}{% for i in range(m.content | int) %}{% endfor %}{% endfor %}done")
    with pytest.raises(TemplateError, match=f"more than {few_steps} steps"):
        template.render([{"role": "user", "content": str(few_steps)}])
    assert template.render([{"role": "user", "content": str(few_steps - 1)}]) == "done"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "non-empty list"),
        ("Hello", "non-empty list"),
        ({"role": "user", "content": "x"}, "non-empty list"),
        (None, "non-empty list"),
        (["Hello"], r"messages\[0\]"),
        ([USER, {"content": "x"}], r"messages\[1\].*role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\].*role"),
        ([{"role": "", "content": "x"}], r"messages\[0\].*role"),
        ([{"role": "user"}], "neither content nor tool_calls"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user", "content": ["x"]}], "content"),
        ([{"role": "user", "content": object()}], r"messages\[0\]"),
    ],
)
def test_messages_are_checked(messages, told):
    with pytest.raises(ArgumentError, match=told):
        build(CHATML).render(messages)


def test_objects_do_not_reach_a_template():
    with pytest.raises(ArgumentError, match="template arguments"):
        build(CHATML).render([USER], path=object())
    with pytest.raises(ArgumentError, match="tools"):
        build(CHATML).render([USER], tools=[print])
