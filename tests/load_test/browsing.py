"""What a browser does with a page, as far as a load test needs it: its forms are read, filled and sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class FormOnPage:
    """A form that can be sent."""

    action: str
    hidden: dict[str, str] = field(default_factory=dict)
    choices: dict[str, list[str]] = field(default_factory=dict)
    """Name of a group of radio buttons, or of a list, -> the values it may have."""
    buttons: list[tuple[str, str]] = field(default_factory=list)
    """(name, value) of each button that says something."""


class PageReader(HTMLParser):
    """Forms and static files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.forms: list[FormOnPage] = []
        self.files: list[str] = []
        self._select = ""
        self.feed(text)
        self.close()

    def form(self, ending: str) -> FormOnPage | None:
        """The form whose action ends so."""
        return next((form for form in self.forms if form.action.endswith(ending)), None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append(FormOnPage(values.get("action", "")))
        elif tag == "link" and values.get("rel") == "stylesheet":
            self.files.append(values["href"])
        elif tag == "script" and "src" in values:
            self.files.append(values["src"])
        elif self.forms:
            self._field(tag, values, self.forms[-1])

    def _field(self, tag: str, values: dict[str, str], form: FormOnPage) -> None:
        name, value = values.get("name", ""), values.get("value", "")
        if tag == "select":
            self._select = name
        elif tag == "option" and self._select and value:
            form.choices.setdefault(self._select, []).append(value)
        elif tag == "button" and name:
            form.buttons.append((name, value))
        elif tag == "input" and name:
            kind = values.get("type", "text")
            if kind == "hidden":
                form.hidden[name] = value
            elif kind == "radio":
                form.choices.setdefault(name, []).append(value)
            elif kind == "submit":
                form.buttons.append((name, value))

    def handle_endtag(self, tag: str) -> None:
        if tag == "select":
            self._select = ""
