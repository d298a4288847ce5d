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
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse, RedirectResponse

from replication.console import utc
from replication.judging import rubric

STATIC_TYPES: Final = {"judge.css": "text/css; charset=utf-8", "judge.js": "text/javascript; charset=utf-8"}
STATIC: Final = {
    name: (resources.files("replication.judging.page") / "static" / name).read_bytes() for name in STATIC_TYPES
}

# Control characters, and those that turn the direction of the text after them.
ACTING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

BANNER: ContextVar[tuple[str, str] | None] = ContextVar("banner", default=None)
"""Words above all else on every page of this request: (in bold, why)."""
PREVIEW: Final = ("Preview", "What you see is a copy of the panel: votes given here are thrown away.")
TEST: Final = ("Test", "Votes given by this link enter no record and no count.")

# status -> (title, what to do)
PROBLEMS: Final = {
    400: ("This request cannot be read", "Open your link again, as it stands in your invitation."),
    401: ("Please sign in", "This page is for the administrator of the panel."),
    403: ("This did not come from your page", "Nothing was stored. Please go on from your own page."),
    404: ("There is no such page", "A link may have been cut short. Copy it whole from your invitation."),
    405: ("This address takes no visits", "It only receives what a page sends. Nothing was stored."),
    408: ("This took too long to arrive", "Nothing was stored. Please try again."),
    409: ("Not possible any more", "Nothing was stored."),
    413: ("This is too long", "Nothing was stored."),
    415: ("This is not a form of this page", "Nothing was stored."),
    422: ("Something is missing or unknown", "Nothing was stored. Please go on from your page."),
    500: ("Something went wrong here", "Votes that were stored before are safe. Please try again in a moment."),
}


def _readable(text: str) -> Markup:
    """Escaped; a character that acts without being seen stands there as its number."""
    return Markup(ACTING.sub(lambda m: f'<span class="mark">U+{ord(m.group()):04X}</span>', str(escape(text))))


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
_TEMPLATES.globals.update(css=_static("judge.css"), js=_static("judge.js"), rubric=rubric)


def page(name: str, status: int = 200, /, **values: Any) -> HTMLResponse:
    """A template of this package as an answer."""
    return HTMLResponse(_TEMPLATES.get_template(f"{name}.html.j2").render(**values, banner=BANNER.get()), status)


def problem(
    status: int, *, title: str = "", text: str = "", back: str = "", goes_on: bool = False, word: str = "Go on"
) -> HTMLResponse:
    """A short page that says what went wrong, and leads back where there is a way.

    Args:
        title, text: what happened, and what to do; empty: the usual words of the status.
        back: where the link leads; empty: no link, as where none would help. `word` is what it says.
        goes_on: whether the page goes there by itself after a few seconds.
    """
    usual = PROBLEMS.get(status, PROBLEMS[400 if status < 500 else 500])
    words = {"title": title or usual[0], "text": text or usual[1]}
    return page("message", status, **words, back=back, goes_on=goes_on, word=word)


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
