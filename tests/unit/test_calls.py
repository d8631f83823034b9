"""Tool calls read back from what a model writes, whole and in pieces, as its template spells them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from caravan.data.calls import Reader, Spelling, spelling
from caravan.data.render import render
from caravan.data.tokenizer import Tokenizer, train
from caravan.types import Message, ToolCall

QWEN = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}<think>

</think>

{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>
{{ c.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """{% for m in messages %}<|im_start|>{{ m.role }}

{% if m.tool_calls %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{
m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}{%
if add_generation_prompt %}<|im_start|>assistant

{% endif %}"""
MISTRAL = """{% for m in messages %}{%
if m.tool_calls %}<|pad|>[{% for c in m.tool_calls %}{%
if not loop.first %}, {% endif %}{"name": {{ c.function.name | tojson }}, "arguments": {{
c.function.arguments | tojson }}, "id": {{ c.id | tojson }}}{% endfor %}]{% else %}{{ m.content }}{%
endif %}<|im_end|>{% endfor %}"""
PYTHONIC = """{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}({{
c.function.arguments | tojson }}){% endfor %}{% endfor %}"""
MARKED, ALONE = Spelling(), Spelling("", "", "name", "parameters")


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(["to be or not to be"] * 4, 300)


def told(tok: Tokenizer, source: str) -> Tokenizer:
    return Tokenizer(tok._definition, tok._config, source)


@pytest.mark.parametrize(
    ("source", "spelt"),
    [
        (None, MARKED),
        (QWEN, MARKED),
        (LLAMA, ALONE),
        (MISTRAL, replace(ALONE, arguments="arguments")),
        (PYTHONIC, None),
        ("{{ raise_exception('no') }}{{ tool_calls }}", None),
    ],
)
def test_a_template_shows_how_it_spells_calls(
    tok: Tokenizer, source: str | None, spelt: Spelling | None
) -> None:
    assert spelling(told(tok, source) if source else tok) == spelt


@pytest.mark.parametrize("source", [None, QWEN, LLAMA, MISTRAL])
def test_what_is_trained_is_what_is_read(tok: Tokenizer, source: str | None) -> None:
    tok = told(tok, source) if source else tok
    spelt = spelling(tok)
    assert spelt
    call = ToolCall("add", json.dumps({"a": 'two "2" </tool_call> {', "b": [1, {"c": None}]}), "call00001")
    asked = [Message("user", "be")]
    prompt = len(render(asked, tok, generation_prompt=True).ids)
    whole = render([*asked, Message("assistant", "", (call,))], tok)
    answer = tok.decode([i for i, m in zip(whole.ids, whole.mask, strict=True) if m][:-1])
    assert prompt < len(whole.ids)
    for size in (1, 3, len(answer)):
        reader = Reader(spelt, ["add"])
        parts = [p for at in range(0, len(answer), size) for p in reader.feed(answer[at : at + size])]
        parts += reader.feed("", last=True)
        assert [p for p in parts if isinstance(p, ToolCall)] == [replace(call, id="")]
        assert "".join(p for p in parts if isinstance(p, str)) in ("", "<think>\n\n</think>")


ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
PLAIN = '{"name": "add", "parameters": {"a": 1}}'
LISTED = '<tool_call>{"name": "add", "arguments": [1]}x'
ADDED = ToolCall("add", '{"a": 1}')


@pytest.mark.parametrize(
    ("spelt", "answer", "parts"),
    [
        (MARKED, "two words ", ["two words "]),
        (MARKED, f"I add.\n{ADD}", ["I add.", ADDED]),
        (MARKED, f"\n{ADD}\n{ADD}\n", [ADDED, ADDED]),
        (MARKED, f"{ADD} done.", [ADDED, "done."]),
        (MARKED, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', [ADDED]),
        (MARKED, '<tool_call>{"name": "add"}</tool_call>', [ToolCall("add", "{}")]),
        (MARKED, "a < b <tool_", ["a < b <tool_"]),
        (MARKED, "<tool_call>{broken", ["<tool_call>{broken"]),
        (MARKED, ADD.replace("add", "rm"), [ADD.replace("add", "rm")]),
        (MARKED, '<tool_call>{"name": ["add"]}</tool_call>', ['<tool_call>{"name": ["add"]}</tool_call>']),
        (MARKED, LISTED, [LISTED]),
        (ALONE, ' {"name": "add", "parameters": {"a": 1}}', [ADDED]),
        (ALONE, '[{"name": "add", "parameters": {"a": 1}}]', [ADDED]),
        (ALONE, f"{PLAIN}; {PLAIN}", [ADDED, ADDED]),
        (ALONE, '{"name": "other", "parameters": {}}', ['{"name": "other", "parameters": {}}']),
        (ALONE, '{"a": 1', ['{"a": 1']),
        (ALONE, 'So {"name": "add"}', ['So {"name": "add"}']),
    ],
)  # fmt: skip
def test_calls_and_words_are_told_apart_however_they_come(
    spelt: Spelling, answer: str, parts: list[str | ToolCall]
) -> None:
    for size in range(1, len(answer) + 1):
        reader = Reader(spelt, ["add"])
        found = [p for at in range(0, len(answer), size) for p in reader.feed(answer[at : at + size])]
        found += reader.feed("", last=True)
        joined: list[str | ToolCall] = []
        for part in found:
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        assert joined == parts, size


def test_words_are_not_held_back() -> None:
    reader = Reader(MARKED, ["add"])
    assert reader.feed("one two") == ["one two"]
    assert reader.feed(" <") == [] and reader.feed("b>") == [" <b>"]
    assert Reader(ALONE, ["add"]).feed("So") == ["So"]
