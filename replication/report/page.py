"""Text of the report: Jinja templates of Markdown that escape every value, and the Markdown as one HTML page.

The page holds its pictures, and one script that draws their curves anew, to be hovered. markdown-it-py reads the
Markdown, whose form says what is laid out otherwise: a second-level heading opens a section with an anchor, after the
first of which the contents stand; a picture and the paragraph after it are a figure, an arm's name and the text after
it a completion, and those in a row stand side by side; a table without names of columns has names of rows, and a row
with its first cell alone is a group's title.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from markupsafe import Markup, escape

from replication.statistics import format as shown

STATES = {"holds", "fails", "incomplete", "complete", "failed", "interrupted", "pending", "running"}
LONG = 24
"""Characters from which the words of a cell may be broken."""
OUR_HTML = re.compile(r"<br>|</details>|<details( open)?><summary>[\w ,:]+</summary>")
"""HTML of the templates themselves; anything else that looks like HTML is text."""
CURVES = "curves.json"
"""In the folder of figures: what the page's script draws."""
CONTENTS = "<!-- contents -->"


def markdown(template: str, results: object) -> str:
    """A template of templates/ with results as `r`: every value is text in it, whatever it holds."""
    return _environment(is_markdown=True).get_template(template).render(r=results)


def paragraphs(template: str, results: object) -> list[str]:
    """Those of a template of plain text, each on one line."""
    text = _environment(is_markdown=False).get_template(template).render(r=results)
    return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]


@functools.cache
def _environment(is_markdown: bool) -> Environment:
    loader = PackageLoader("replication.report")
    environment = Environment(
        loader=loader,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=is_markdown,
        finalize=_text if is_markdown else None,
    )
    formats = ("number", "signed", "count", "percent", "points", "duration", "plain")
    environment.filters |= {name: getattr(shown, name) for name in formats} | {"arm": shown.arm_name}
    environment.globals |= {name: getattr(shown, name) for name in ("places", "rounded", "between", "share", "shares")}
    environment.filters |= {"p": shown.p_value, "fence": lambda text: Markup(shown.markdown_fence(text))}
    return environment


def _text(value: Any) -> Markup:
    """One line in which Markdown has no meaning, at the start of a paragraph too."""
    if isinstance(value, Markup):
        return value
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", shown.markdown_cell(value))
    line = re.sub(r"^(\d{1,9})([.)])(?=\s|$)", r"\1\\\2", line)
    return Markup(re.sub(r"^[-+=](?=[-+=\s]|$)", r"\\\g<0>", line))


def html(text: str, title: str, colours: Mapping[str, str], folder: Path) -> str:
    """The page of a Markdown text, whose pictures lie in `folder`; the dot before an arm's name has its colour."""
    page = Environment(loader=PackageLoader("replication.report"), autoescape=True).get_template("page.html.j2")
    data = folder / "figures" / CURVES
    curves = Markup(data.read_text(encoding="utf-8").replace("<", "\\u003c")) if data.is_file() else ""
    return page.render(title=title, body=Markup(_Body(colours, folder).html(text)), curves=curves)


class _Body:
    """HTML of the nodes of one Markdown text."""

    def __init__(self, colours: Mapping[str, str], folder: Path) -> None:
        self._colours, self._folder = colours, folder
        self._sections: dict[str, str] = {}
        self._reader = MarkdownIt("commonmark").enable("table")
        self._reader.add_render_rule("html_inline", lambda _, tokens, i, *rest: _ours(tokens[i].content))
        self._reader.add_render_rule("image", lambda _, tokens, i, *rest: self._image(tokens[i]))

    def html(self, text: str) -> str:
        nodes = SyntaxTreeNode(self._reader.parse(text)).children
        pieces: list[tuple[str, str]] = []
        while nodes:
            pair = self._pair(*nodes[:2]) if len(nodes) > 1 else None
            pieces.append(pair or ("", self._block(nodes[0])))
            nodes = nodes[2 if pair else 1 :]
        lines = []
        for row, group in groupby(pieces, key=itemgetter(0)):
            inner = "\n".join(piece for _, piece in group)
            lines.append(f'<div class="{row}">{inner}</div>' if row else inner)
        contents = "".join(f'<a href="#{name}">{title}</a>' for name, title in self._sections.items())
        page = "\n".join([*lines, "</section>"])
        return page.replace(CONTENTS, f'<nav aria-label="Contents">{contents}</nav>')

    def _pair(self, node: SyntaxTreeNode, after: SyntaxTreeNode) -> tuple[str, str] | None:
        """A figure with its caption, or an arm's name with its completion, and its row; None for what stands alone."""
        if node.type == "paragraph" and [child.type for child in node.children[0].children] == ["image"]:
            caption = f"<figcaption>{self._inline(after)}</figcaption>"
            return "figures", f"<figure>{self._inline(node)}{caption}</figure>"
        if after.type == "fence" and _words(node).removesuffix(", cut for this page") in self._colours:
            return "samples", f'<div class="sample">{self._named(node)}{self._block(after)}</div>'
        return None

    def _block(self, node: SyntaxTreeNode) -> str:
        match node.type:
            case "heading" if node.tag == "h2":
                end = ("" if not self._sections else "</section>\n" + CONTENTS * (len(self._sections) == 1)) + "\n"
                title = _words(node).split(":")[0]
                name = re.sub(r"\W+", "-", title.lower()).strip("-")
                self._sections[name] = str(escape(title))
                return f'{end}<section id="{name}">\n<h2>{self._inline(node)}</h2>'
            case "heading" | "paragraph":
                return f"<{node.tag}>{self._inline(node)}</{node.tag}>"
            case "bullet_list":
                items = "".join(f"<li>{self._named(item.children[0])}</li>" for item in node.children)
                return f"<ul>{items}</ul>"
            case "blockquote":
                inner = "".join(self._block(child) for child in node.children)
                kind = ' class="plan"' if "<strong>Plan." in inner else ""
                return f"<blockquote{kind}>{inner}</blockquote>"
            case "fence":
                return f"<pre>{escape(node.content.removesuffix(chr(10)))}</pre>"
            case "table":
                return f'<div class="box" tabindex="0"><table>\n{self._table(node)}\n</table></div>'
            case _:
                return _ours(node.content)

    def _table(self, table: SyntaxTreeNode) -> str:
        head, *rows = [row.children for part in table.children for row in part.children]
        named = any(map(_words, head))
        classes = [_column_class(cells) for cells in zip(head, *rows, strict=True)]

        def line(cells: Sequence[SyntaxTreeNode], tags: Sequence[str]) -> str:
            parts = zip(cells, tags, classes, strict=True)
            return f"<tr>{''.join(f'<{tag}{kind}>{self._named(cell)}</{tag}>' for cell, tag, kind in parts)}</tr>"

        lines = [line(head, ["th" if _words(cell) else "td" for cell in head])] if named else []
        for row in rows:
            is_group = named and len(row) > 1 and not any(map(_words, row[1:]))
            title = f'<tr class="group"><th colspan="{len(row)}">{_words(row[0])}</th></tr>'
            lines.append(title if is_group else line(row, ["td" if named else "th", *["td"] * (len(head) - 1)]))
        return "\n".join(lines)

    def _named(self, node: SyntaxTreeNode) -> str:
        """Inline text; the name of an arm at its start has the arm's colour, and a state its own."""
        content, words = self._inline(node), _words(node)
        for arm, colour in self._colours.items():
            if words == arm or words.startswith(f"{arm}, "):
                name = str(escape(arm))
                return f'<span class="arm"><i style="background:{colour}"></i>{name}</span>{content[len(name) :]}'
        return f'<span class="state {words}">{words}</span>' if words in STATES else content

    def _inline(self, node: SyntaxTreeNode) -> str:
        return str(self._reader.renderer.render(node.to_tokens()[1:-1], self._reader.options, {}))

    def _image(self, token: Any) -> str:
        path = self._folder / token.attrs["src"]
        kind, data = path.suffix[1:].replace("svg", "svg+xml"), base64.b64encode(path.read_bytes()).decode("ascii")
        return f'<img data-figure="{path.stem}" src="data:image/{kind};base64,{data}" alt="{escape(token.content)}">'


def _words(node: SyntaxTreeNode) -> str:
    """The text of a heading, paragraph or cell without its marks."""
    return "".join(part.content for inline in node.children for part in inline.walk() if part.type == "text")


def _column_class(cells: Sequence[SyntaxTreeNode]) -> str:
    """Of one column of a table: numbers, long words, or neither."""
    if "right" in str(cells[0].attrs.get("style")):
        return ' class="n"'
    return ' class="long"' if any(len(_words(cell)) > LONG for cell in cells) else ""


def _ours(content: str) -> str:
    content = content.strip()
    return content if OUR_HTML.fullmatch(content) else str(escape(content))
