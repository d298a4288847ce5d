"""Pages as text: templates, the two static files, and the page for each thing that can go wrong.

Completions are untrusted. Templates escape everything, and what would act on the text around it is spelled out.
"""

from __future__ import annotations

import hashlib
import re
from contextvars import ContextVar
from importlib import resources
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse, RedirectResponse

from replication.console import utc

STATIC_TYPES: Final = {"judge.css": "text/css; charset=utf-8", "judge.js": "text/javascript; charset=utf-8"}
STATIC: Final = {
    name: (resources.files("replication.judging.page") / "static" / name).read_bytes() for name in STATIC_TYPES
}

# Control characters, and those that turn the direction of the text after them.
ACTING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

BANNER: ContextVar[str] = ContextVar("banner", default="")
"""What stands above all else on every page of this request: preview, test, or nothing."""


# No link, and nothing that a page would fetch: their marks stay as they were written.
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
_MARKDOWN.disable(["link", "image", "autolink", "reference"])


def _readable(text: str, form: str = "text") -> Markup:
    """Escaped, or made of Markdown; a character that acts without being seen stands there as its number."""
    safe = str(escape(text))
    if form == "markdown":
        import nh3  # where a study asks for it

        html = re.sub("(?<=[</])h[1-6]>", "h3>", _MARKDOWN.render(text))  # below the heading that says which text it is
        safe = nh3.clean(html, attributes={})
    return Markup(ACTING.sub(lambda m: f'<span class="mark">U+{ord(m.group()):04X}</span>', safe))


def _static(name: str) -> str:
    return f"/static/{name}?v={hashlib.sha256(STATIC[name]).hexdigest()[:12]}"


_TEMPLATES = Environment(
    loader=PackageLoader("replication.judging.page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_TEMPLATES.filters["readable"] = _readable
_TEMPLATES.filters["utc"] = utc
_TEMPLATES.filters["percent"] = lambda share: "" if share is None else f"{100 * share:.1f} %"
_TEMPLATES.globals.update(css=_static("judge.css"), js=_static("judge.js"))


def page(name: str, status: int = 200, /, **values: Any) -> HTMLResponse:
    """A template of this package as an answer."""
    return HTMLResponse(_TEMPLATES.get_template(f"{name}.html.j2").render(**values, banner=BANNER.get()), status)


def problem(status: int, what: str = "", back: str = "") -> HTMLResponse:
    """A short page that says what went wrong, in the words that its template has for it.

    Args:
        what: went wrong; empty: what the status says.
        back: where a link leads; empty: there is none, as where none would help.
    """
    return page("message", status, status=status, what=what or str(status), back=back)


def see_other(path: str) -> RedirectResponse:
    return RedirectResponse(path, 303)


def judge_path(token: str) -> str:
    return f"/j/{quote(token, safe='')}"


def way_back(path: str) -> str:
    """The page from which this path was asked for, whether or not the link in it is good; empty: not known."""
    parts = path.split("/")
    if len(parts) > 3 and parts[1] in ("j", "join"):
        return f"/{parts[1]}/{quote(parts[2], safe='')}"
    return "/admin" if len(parts) > 2 and parts[1] == "admin" else ""
