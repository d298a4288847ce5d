"""What a row reads as: columns, templates and conversations; and what cannot be rendered is one line with a remedy."""

from __future__ import annotations

import pytest

from replication.config import DataConfig, RunConfig, SourceConfig
from replication.data.render import columns_of, render
from replication.errors import UserError

CHAT = {"system": "", "user": "User: {content}\n", "assistant": "Assistant: {content}\n"}


def source(**keys):
    return SourceConfig(**{"name": "x", "kind": "jsonl", "path": "x.jsonl", **keys})


def test_a_template_leaves_out_lines_whose_columns_are_empty():
    s = source(template="{instruction}\n{input}\nAnswer: {output} ({input})\n\n{{end}}")
    assert columns_of(s) == ["instruction", "input", "output"]
    row = {"instruction": "Add.", "input": "1 {and} 2", "output": "3", "id": 4}
    assert render(s, row, "row") == "Add.\n1 {and} 2\nAnswer: 3 (1 {and} 2)\n\n{end}"
    assert render(s, {**row, "input": None}, "row") == "Add.\nAnswer: 3 ()\n\n{end}"


def test_messages_of_both_spellings_are_rendered_by_role():
    roles = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello {you}", "toxic": False},
        {"role": "assistant", "content": None},
    ]
    s = source(text_field="messages", messages=CHAT)
    assert render(s, {"messages": roles}, "row") == "User: Hello {you}\nAssistant: \n"
    turns = [{"from": "human", "value": "Hi", "weight": None}, {"from": "gpt", "value": "Yes?"}]
    s = source(text_field="messages", messages={"human": "Q: {content}\n", "gpt": "A: {content}\n"})
    assert render(s, {"messages": turns}, "row") == "Q: Hi\nA: Yes?\n"
    assert render(s, {"messages": None}, "row") == "" == render(s, {"messages": []}, "row")


@pytest.mark.parametrize(
    "keys, row, message",
    [
        ({"template": "{a} {b}"}, {"a": "x"}, r"row 3 has no field 'b'; its template may name: a"),
        ({"template": "{a}"}, {"a": 1}, r"field 'a' holds an int, not text; take another column into its template"),
        ({"text_field": "m"}, {"m": [{"role": "user"}]}, r"field 'm' holds a list, not text; say .* messages: \{user:"),
        ({"text_field": "m", "messages": CHAT}, {"m": "text"}, r"holds a str, not a list of messages; set text_field"),
        ({"text_field": "m", "messages": CHAT}, {"m": ["a"]}, r"a message is not \{role, content\} or \{from, value\}"),
        (
            {"text_field": "m", "messages": CHAT},
            {"m": [{"role": "tool", "content": "x"}]},
            r"a message of role 'tool', which messages does not name \(system, user, assistant\); add it there",
        ),
        (
            {"text_field": "m", "messages": CHAT},
            {"m": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
            r"row 3: the content of a message of role 'user' is a list, not text; take another data set, or render it",
        ),
        (
            {"text_field": "m", "messages": CHAT},
            {"m": [{"role": ["user"], "content": "x"}]},
            r"a message of role '\['user'\]', which messages does not name",
        ),
    ],
)
def test_what_cannot_be_rendered_is_one_line(keys, row, message):
    with pytest.raises(UserError, match=rf"data\.sources: source 'x': .*{message}"):
        render(source(**keys), row, "row 3")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"template": "{a}", "messages": CHAT}, r"sets template and messages; .* remove one"),
        ({"template": "{a}", "kind": "text"}, r"template of 'x' needs rows with columns, and kind 'text' has none"),
        ({"messages": CHAT, "kind": "python_topics"}, r"messages of 'x' needs rows"),
        ({"template": "no columns"}, r"template of 'x' must name columns in braces"),
        ({"template": "{a.b}"}, r"template of 'x' must name columns in braces"),
        ({"template": "{a"}, r"template of 'x' must name columns in braces, .*\(write \{\{ for a brace\)"),
        ({"messages": {"user": "{text}"}}, r"the text of role 'user' may have \{content\} in braces and no other"),
    ],
)
def test_keys_that_contradict_one_another(keys, message):
    with pytest.raises(UserError, match=message):
        RunConfig(data=DataConfig(sources=(source(**keys),))).check()


def test_a_budget_must_be_positive():
    with pytest.raises(UserError, match=r"data\.token_budget: 0 must be at least 1"):
        RunConfig(data=DataConfig(token_budget=0)).check()
