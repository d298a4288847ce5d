"""The pages: every link, command, flag, path and name of code in them exists, and the front pages stay short.

A `bash` block is parsed as the command line would parse it, line by line; code in the running text may be a part of a
command, so its verb and flags are looked up. Words such as OUT, out/mine and my_suite.yaml are the reader's own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from paths import CHECKOUT

from replication.cli.arguments import Parser
from replication.cli.main import VERBS
from replication.config import RunConfig, find_cluster, find_config, flatten, load_cell, load_suite, to_dict
from replication.errors import UserError

PAGES = [
    CHECKOUT / "README.md",
    CHECKOUT / "CONTRIBUTING.md",
    *(p for folder in ("configs", "launch", "replication", "tests") for p in (CHECKOUT / folder).rglob("README.md")),
]
NAMES = [str(page.relative_to(CHECKOUT)) for page in PAGES]
LIMITS = {"README.md": 11_000, "CONTRIBUTING.md": 9_000}  # bytes: what is read at one go

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
OURS = re.compile(r"(\./)?(launch|tests|configs|replication|\.ci|\.github)/[\w./-]*\w")
READERS = re.compile(r"my_|^out/|^[A-Z_]+$")
MADE = {"launch/site.env"}  # by the reader
KEYS = set(flatten(to_dict(RunConfig())))
WORDS_OF_OTHERS = {
    *("encode_special_tokens", "index_select", "use_deterministic_algorithms", "SessionLog", "HunYuanMoEV1"),
    *("ConnectionError", "Trainer", "None", "TRITON_INTERPRET", "MASTER_ADDR", "MASTER_PORT", "OPENAI_API_KEY"),
    *("SSL_CERT_FILE", "ALL_PROXY", "NO_PROXY"),
}
"""Names in the pages that are a library's, and that nothing here spells."""


class Command(NamedTuple):
    words: list[str]
    is_whole: bool
    """Whether it stands in a block, to be copied; a part of one may stand in the text."""


def blocks(text: str, language: str) -> list[str]:
    return [body for _, name, body in FENCE.findall(text) if name == language]


def spans(text: str) -> list[str]:
    return [" ".join(code.split()) for code in SPAN.findall(FENCE.sub("", text))]


def commands(text: str) -> Iterator[Command]:
    for body in blocks(text, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield Command(words, True)
    for code in spans(text):
        if re.match(r"(\w+=\S+ )*(\./)?(replicate|python|launch/\w+\.sh|\.ci/run)( |$)", code):
            yield Command(shlex.split(code), False)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


@functools.cache
def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


# ---------------------------------------------------------------- links and sizes


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = CHECKOUT / name
    wrong = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("name", LIMITS)
def test_a_front_page_is_short(name: str) -> None:
    assert (CHECKOUT / name).stat().st_size <= LIMITS[name]


def test_every_page_is_reached_from_the_front_page() -> None:
    reached, todo = set(), [CHECKOUT / "README.md"]
    while todo:
        reached.add(page := todo.pop())
        links = [t.partition("#")[0] for t in LINK.findall(page.read_text(encoding="utf-8"))]
        found = {(page.parent / t).resolve() for t in links if t.endswith(".md") and not t.startswith("https://")}
        todo += found - reached - set(todo)
    assert [name for name in NAMES if (CHECKOUT / name).resolve() not in reached] == []


# ---------------------------------------------------------------- commands


class Parsed(BaseException):
    """What the parser of a verb made of its arguments; raised before the verb acts."""

    def __init__(self, namespace: argparse.Namespace, rest: list[str]) -> None:
        self.namespace, self.rest = namespace, rest


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Parsed:
    """The arguments of `replicate WORDS`, as the verb's own parser reads them; raises as it does."""
    depth = 0

    def outermost(original: Any, returns_rest: bool) -> Any:
        def call(self: Parser, args: Any = None, namespace: Any = None) -> Any:
            nonlocal depth
            depth += 1
            try:
                found = original(self, args, namespace)
            finally:
                depth -= 1
            if depth:
                return found
            raise Parsed(*found) if returns_rest else Parsed(found, [])

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", outermost(Parser.parse_known_args, True))
        patch.setattr(Parser, "parse_args", outermost(Parser.parse_args, False))
        with pytest.raises(Parsed) as found:
            VERBS[words[0]](words[1:])
    return found.value


@functools.cache
def help_of(*words: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        VERBS[words[0]]([*words[1:], "--help"])
    return said.getvalue()


def takes_an_action(verb: str) -> bool:
    return re.search(r"\[-h\]\s+[\w|]+\|\w+\s+\.\.\.", help_of(verb)) is not None


def unknown_keys(rest: list[str]) -> list[str]:
    return [word for word in rest if word.startswith("--") and word[2:].partition("=")[0] not in KEYS]


def unknown_files(namespace: argparse.Namespace) -> list[str]:
    """Configs that a command names and that are not there."""
    look = {"config": find_config, "suite": load_suite, "cluster": find_cluster,
            "claims": lambda name: find_config(name, "claims")}  # fmt: skip
    wrong = []
    for key, find in look.items():
        given = getattr(namespace, key, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not READERS.search(str(value)):
                try:
                    find(str(value))
                except UserError as error:
                    wrong.append(str(error))
    return wrong


def check_replicate(command: Command, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    words = [w for w in command.words[1:] if w != "--debug"]
    if not words:
        return []
    if words[0] not in VERBS:
        return [] if words[0] == "VERB" else [f"no verb {words[0]}"]
    if command.is_whole:
        try:
            parsed = parse(words, monkeypatch)
        except UserError as error:
            return [str(error)]
        return unknown_keys(parsed.rest) + unknown_files(parsed.namespace)
    try:
        known = help_of(*words[: 2 if takes_an_action(words[0]) and words[1:2] != ["ACTION"] else 1])
    except UserError:
        return [f"no action {words[1]}"]
    flags = [w.partition("=")[0] for w in words if w.startswith("--")]
    return [f for f in flags if f[2:] not in KEYS and f != "--help" and not re.search(rf"{f}(?![\w-])", known)]


def check_script(words: list[str]) -> list[str]:
    """What is wrong with a call of a script or module of ours: each flag must be in its text."""
    if words[0] == "python" and words[1:2] == ["-m"]:
        script = CHECKOUT / f"{words[2].replace('.', '/')}.py"
    else:
        script = CHECKOUT / (words[1] if words[0] == "python" else words[0])
    if not script.exists():
        return [f"{script.relative_to(CHECKOUT)}: not there"]
    if words[0] != "python" and not os.access(script, os.X_OK):
        return [f"{script.relative_to(CHECKOUT)}: cannot be called"]
    text = "".join(p.read_text() for p in (script.glob("*.py") if script.is_dir() else [script]))
    return [f"{script.name}: no {w}" for w in words if w.startswith("--") and w.partition("=")[0] not in text]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_understood(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = []
    for command in commands((CHECKOUT / name).read_text(encoding="utf-8")):
        words = list(command.words)
        while "=" in words[0] and words[1:]:  # variables that are set for the command
            words.pop(0)
        found = [
            f"{w}: not there" for w in words if OURS.fullmatch(w) and w not in MADE and not (CHECKOUT / w).exists()
        ]
        if "replicate" in words:
            found += check_replicate(command._replace(words=words[words.index("replicate") :]), monkeypatch)
        elif words[0] == "python" or OURS.fullmatch(words[0]):
            found += check_script(words)
        wrong += [f"{shlex.join(command.words)}: {line}" for line in found]
    assert wrong == []
    assert capsys.readouterr().err == "", "an earlier spelling"


def test_the_check_of_commands_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(line: str, is_whole: bool = True) -> list[str]:
        return check_replicate(Command(shlex.split(line), is_whole), monkeypatch)

    assert wrong("replicate grid run laptop --out out/mine --training.steps=6") == []
    assert wrong("replicate grid run laptop --training.stepps=6") == ["--training.stepps=6"]
    assert "laptopp" in wrong("replicate grid plan laptopp")[0]
    assert "--wat" in wrong("replicate report out/mine --wat")[0]
    assert "--out" in wrong("replicate prepare --config data/python.yaml")[0]
    assert wrong("replicate judge lock --early", is_whole=False) == []
    assert wrong("replicate judge lock --earlier", is_whole=False) == ["--earlier"]
    assert wrong("replicate judge unlock", is_whole=False) == ["no action unlock"]
    assert check_script(["launch/quickstart.sh", "--serve"]) == ["quickstart.sh: no --serve"]


# ---------------------------------------------------------------- what else the pages name


@functools.cache
def our_files() -> list[str]:
    folders = ("replication", "configs", "launch", "tests", ".ci")
    found = [
        p for folder in folders for p in (CHECKOUT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    return [str(p.relative_to(CHECKOUT)) for p in found]


@functools.cache
def our_words() -> set[str]:
    """Every word of the sources and of their names; no page is one."""
    sources = [f for f in our_files() if Path(f).suffix not in (".md", ".png", ".npz")] + ["pyproject.toml"]
    read = [(CHECKOUT / source).read_text(encoding="utf-8", errors="replace") for source in sources]
    return {word for text in ["\n".join(sources), *read] for word in re.findall(r"\w+", text)}


@functools.cache
def our_classes() -> set[str]:
    files = [CHECKOUT / f for f in our_files() if f.startswith("replication/") and f.endswith(".py")]
    return {name for file in files for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.M)}


@pytest.mark.parametrize("name", NAMES)
def test_files_and_names_of_code_are_there(name: str) -> None:
    wrong = []
    for code in spans((CHECKOUT / name).read_text(encoding="utf-8")):
        for file in re.findall(r"[\w./-]+\.(?:py|sh|sbatch)(?!\w)", code):
            known = any(f"/{ours}".endswith(f"/{file.removeprefix('./')}") for ours in our_files())
            wrong += [] if known or READERS.search(file) else [file]
        named = re.fullmatch(r"([A-Z][a-z]\w+)(\.\w+)?", code)
        if named and named[1] not in our_classes() | WORDS_OF_OTHERS:
            wrong.append(f"class {named[1]}")
        for word in re.findall(r"[A-Za-z_]\w{3,}", code):
            is_name = "_" in word or re.search(r"[a-z][A-Z]", word)
            if is_name and not READERS.search(word) and word not in our_words() | WORDS_OF_OTHERS:
                wrong.append(word)
    assert wrong == []


def test_what_the_code_cites_of_the_pages_is_there() -> None:
    """Citations such as (objectives/README.md, Token gain): from the file's folder, the package or the checkout."""
    wrong, cited = [], 0
    for file in (CHECKOUT / "replication").rglob("*.py"):
        text = " ".join(file.read_text(encoding="utf-8").split())
        for page, heading in re.findall(r"\(((?:\w+/)*README\.md)(?:, ([A-Z][^)]*))?\)", text):
            places = [folder / page for folder in (file.parent, CHECKOUT / "replication", CHECKOUT)]
            found = next((place for place in places if place.is_file()), None)
            cited += 1
            if found is None or (heading and slug(heading) not in anchors(found)):
                wrong.append(f"{file.name}: {page}, {heading}")
    assert wrong == []
    assert cited > 5


def test_contributing_has_every_folder_once() -> None:
    tree = blocks((CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "")[0]
    told = re.findall(r"^  (\w+)(?:/|\.py) ", tree, re.M)
    here = [p for p in (CHECKOUT / "replication").iterdir() if p.is_dir() or p.suffix == ".py"]
    assert sorted(told) == sorted(p.stem for p in here if not p.stem.startswith("__") and p.name != "configs")


def test_contributing_counts_the_lines_of_the_core() -> None:
    text = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Read these nine files")[2].partition("\n## ")[0]
    files = [CHECKOUT / target for target in LINK.findall(section) if target.endswith(".py")]
    said = int(re.search(r"About ([\d,]+) lines", section)[1].replace(",", ""))  # type: ignore[index]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert len(files) == 9
    assert abs(lines - said) < 100, f"they have {lines} lines"


def test_the_suite_of_the_front_page_is_complete(tmp_path: Path) -> None:
    (text,) = blocks((CHECKOUT / "README.md").read_text(encoding="utf-8"), "yaml")
    (tmp_path / "my_suite.yaml").write_text(text, encoding="utf-8")
    suite = load_suite(tmp_path / "my_suite.yaml")
    assert len({load_cell(suite, arm, seed).arm for arm in suite.arms for seed in suite.seeds}) == 4
