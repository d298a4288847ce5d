"""The document of one row of a data set: the text of a column, several columns in a template, or a list of messages."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from replication.config import SourceConfig
from replication.errors import UserError

# How data sets spell a message: the key of the speaker and the key of the text.
MESSAGE_KEYS = (("role", "content"), ("from", "value"))


def refusal(source: SourceConfig, problem: str, remedy: str) -> UserError:
    """The error of one line for a source that cannot be used as it is."""
    text = f"data.sources: source '{source.name}': {problem}; {remedy}"
    return UserError(text.encode(errors="backslashreplace").decode())  # a key of the data may be no text


def columns_of(source: SourceConfig) -> list[str]:
    """Columns that a document is made of, in the order in which they are named."""
    return list(dict.fromkeys(_fields(source.template))) if source.template is not None else [source.text_field]


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def require_columns(source: SourceConfig, names: Sequence[str], where: str) -> None:
    """Refuse rows that lack a column, with the names of those there are."""
    for column in columns_of(source):
        if column not in names:
            remedy = f"set text_field to one of: {', '.join(names)}" if names else "every row needs its text"
            if source.template is not None:
                remedy = f"its template may name: {', '.join(names)}"
            raise refusal(source, f"{where} has no field '{column}'", remedy)


def render(source: SourceConfig, row: Mapping[str, Any], where: str) -> str:
    """The document of one row; null is an empty one. `where` names the row in errors.

    Raises UserError where a column is missing or holds something else, or a message has a role that is not named.
    """
    require_columns(source, list(row), where)
    if source.messages is not None:
        messages = row[source.text_field] if row[source.text_field] is not None else []
        if not isinstance(messages, list):
            found = f"{where}: field '{source.text_field}' holds a {type(messages).__name__}, not a list of messages"
            raise refusal(source, found, "set text_field to the column with the messages, or remove messages")
        return "".join(_message(source, source.messages, message, where) for message in messages)
    values = {column: _text(source, column, row, where) for column in columns_of(source)}
    if source.template is None:
        return values[source.text_field]
    # Without the lines whose columns are all empty.
    lines = [(line, _fields(line)) for line in source.template.split("\n")]
    return "\n".join(line.format_map(values) for line, of in lines if not of or any(values[column] for column in of))


def _text(source: SourceConfig, column: str, row: Mapping[str, Any], where: str) -> str:
    value = row[column]
    if value is None or isinstance(value, str):
        return value or ""
    others = [name for name, found in row.items() if isinstance(found, str)]
    remedy = f"set text_field to one of: {', '.join(others)}" if others else "write it as text, or name another column"
    if source.template is not None:
        remedy = "take another column into its template"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        remedy = 'say what a message reads as, such as messages: {user: "User: {content}\\n"}'
    found = type(value).__name__
    article = "an" if found[0] in "aeiou" else "a"
    raise refusal(source, f"{where}: field '{column}' holds {article} {found}, not text", remedy)


def _message(source: SourceConfig, texts: Mapping[str, str], message: Any, where: str) -> str:
    keys = next((keys for keys in MESSAGE_KEYS if isinstance(message, Mapping) and message.keys() >= {*keys}), None)
    if keys is None:
        forms = " or ".join("{" + ", ".join(keys) + "}" for keys in MESSAGE_KEYS)
        remedy = "take another data set, or render it to text beforehand"
        raise refusal(source, f"{where}: a message is not {forms}", remedy)
    role, content = (message[key] for key in keys)
    if not isinstance(role, str) or role not in texts:
        found = f"{where}: a message of role '{role}', which messages does not name ({', '.join(texts)})"
        raise refusal(source, found, 'add it there; "" leaves its messages out')
    if content is not None and not isinstance(content, str) and texts[role]:
        found = f"{where}: the {keys[1]} of a message of role '{role}' is a {type(content).__name__}, not text"
        remedy = 'take another data set, or render it to text beforehand; "" leaves the role\'s messages out'
        raise refusal(source, found, remedy)
    return texts[role].format(content="" if content is None else content)
