"""Conventions that no linter checks: unique class names, links in documents, and examples that parse."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.util
import io
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

import cloud_verifier.cli.main
import device_profiles.cli
import edge_runtime.cli.main
import export.cli.main
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("edge_runtime", "cloud_verifier", "export", "device_profiles")
SECURITY = ROOT / "SECURITY.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", SECURITY]
DOCUMENTS += [ROOT / name / "README.md" for name in PACKAGES]
DOCUMENTS += [ROOT / "tests" / "benchmarks" / "README.md", ROOT / "export" / "example_family" / "README.md"]
# Packages whose `__init__` offers what others may use, and the one module beside it that is slow to import.
FRONT_DOORS = [
    *(f"edge_runtime.{name}" for name in ("verifier", "decoding", "draft", "simulation", "probes")),
    "edge_runtime.settings",
    "edge_runtime.settings.loading",
]
MAX_README_BYTES = 8192
MAX_POSITIONAL_ARGUMENTS = 5
CLASS = re.compile(r"^ *class (\w+)[(:\[]", re.MULTILINE)
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "log"}
PROGRAMS = {
    "edge-runtime": edge_runtime.cli.main.build_parser,
    "cloud-verifier": cloud_verifier.cli.main.build_parser,
    "draft-export": export.cli.main.build_parser,
    "device-profile": device_profiles.cli.build_parser,
}


class ParsedModule(NamedTuple):
    """A module, parsed, and the nodes of it that conventions are about, found in one walk over its tree."""

    path: Path
    tree: ast.Module
    nodes: list[ast.Import | ast.ImportFrom | ast.Call]


@functools.cache
def sources() -> list[ParsedModule]:
    """The modules of the packages."""
    paths = [path for directory in PACKAGES for path in (ROOT / directory).rglob("*.py")]
    found = []
    for path in paths:
        tree = ast.parse(path.read_text())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom | ast.Call)]
        found.append(ParsedModule(path.relative_to(ROOT), tree, nodes))
    return found


def imports(source: ParsedModule) -> Iterator[str]:
    """The modules that a module imports."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def is_log_call(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute) and node.func.attr in LOG_METHODS


def classes(*directories: str) -> dict[str, list[str]]:
    """The places of the classes below these directories, by name."""
    places = defaultdict(list)
    for directory in directories:
        for path in (ROOT / directory).rglob("*.py"):
            # Not parsed, which takes seconds.
            for name in CLASS.findall(path.read_text()):
                places[name].append(str(path.relative_to(ROOT)))
    return places


def test_a_class_name_has_one_meaning() -> None:
    """Also where tests use it; classes of two tests may have the same name."""
    named = classes(*PACKAGES)
    assert {name: where for name, where in named.items() if len(where) > 1} == {}
    assert {name: where for name, where in classes("tests").items() if name in named} == {}


def test_no_call_passes_more_than_five_arguments_by_position() -> None:
    long = [
        f"{source.path}:{node.lineno}"
        for source in sources()
        for node in source.nodes
        if isinstance(node, ast.Call) and len(node.args) > MAX_POSITIONAL_ARGUMENTS and not is_log_call(node)
    ]
    assert long == []


def test_other_packages_import_through_the_front_doors() -> None:
    wrong = [
        f"{source.path}: {name}"
        for source in sources()
        for name in imports(source)
        if name not in FRONT_DOORS
        for door in FRONT_DOORS
        if name.startswith(f"{door}.") and not source.path.is_relative_to(door.replace(".", "/"))
    ]
    assert wrong == []


def test_every_module_and_package_has_a_docstring() -> None:
    assert [str(source.path) for source in sources() if not ast.get_docstring(source.tree)] == []


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size < MAX_README_BYTES


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, link


def commands(text: str) -> Iterator[list[str]]:
    """The example commands of our programs in a text, split into words."""
    lines = text.replace("\\\n", " ").splitlines()
    for line in lines:
        line = re.sub(r"\s+#.*$", "", line.strip())
        for part in re.split(r"&&|\||;|(?<!\S)&(?!\S)", line):
            try:
                words = shlex.split(re.sub(r"\s[<>]+\s*\S+", "", part))
            except ValueError:
                continue
            while words and (words[0] in ("sudo", "-") or "=" in words[0]):
                words = words[1:]
            if "cloud_verifier.cli" in words:
                words = ["cloud-verifier", *words[words.index("cloud_verifier.cli") + 1 :]]
            if (
                words
                and Path(words[0]).name in PROGRAMS
                and words[0].rpartition("/")[0] in ("", ".", "/opt/flexspec/bin")
            ):
                yield [Path(words[0]).name, *words[1:]]


def helps() -> Iterator[tuple[str, str]]:
    """Every help text of every command, by the words that print it."""
    for program in PROGRAMS:
        pending: list[list[str]] = [[]]
        while pending:
            words = pending.pop()
            output = io.StringIO()
            with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
                PROGRAMS[program]().parse_args([*words, "--help"])
            text = output.getvalue()
            yield " ".join([program, *words]), text
            table = re.search(
                r"^(?:positional arguments|[A-Za-z ]*commands|actions):\n((?:.|\n)*?)(?:\n\n|\Z)", text, re.MULTILINE
            )
            names = re.findall(r"^    ([a-z][a-z-]*)(?=\s|$)", table[1] if table else "", re.MULTILINE)
            pending += [[*words, name] for name in names]


@functools.cache
def examples() -> list[tuple[str, list[str]]]:
    """The example commands of all documents and help texts, with the names of these."""
    texts = []
    for document in DOCUMENTS:
        blocks = re.findall(r"^```[a-z]*\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
        texts += [(str(document.relative_to(ROOT)), block) for block in blocks]
    texts += [(f"{name} --help", text.partition("examples")[2]) for name, text in helps()]
    return [(name, command) for name, text in texts for command in commands(text)]


def test_examples_name_existing_files_of_the_repository() -> None:
    """Other paths are those of users."""
    tops = {*PACKAGES, "tests"}
    named = {
        (where, word)
        for where, (_, *arguments) in examples()
        for word in arguments
        if "/" in word and word.partition("/")[0] in tops
    }
    assert len(named) > 3
    assert [(where, word) for where, word in named if not (ROOT / word).exists()] == []


def error_of(program: str, arguments: list[str]) -> str:
    """What the parser of a program says against arguments; empty if it accepts them."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            PROGRAMS[program]().parse_args(arguments)
    except SystemExit as end:
        return f"{shlex.join([program, *arguments])}: {errors.getvalue().strip().splitlines()[-1]}" if end.code else ""
    return ""


@pytest.mark.slow
def test_examples_in_documents_and_help_texts_parse() -> None:
    assert len(examples()) > 100
    errors = [(where, error_of(program, arguments)) for where, (program, *arguments) in examples()]
    assert [(where, error) for where, error in errors if error] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_text_mentions_exists(document: Path) -> None:
    """Commands, which may lack arguments; targets of make, modules to run, and files."""
    text = document.read_text()
    mentioned = [command for span in re.findall(r"`([^`\n]+)`", text) for command in commands(span)]
    errors = [error_of(program, arguments) for program, *arguments in mentioned if arguments]
    assert [error for error in errors if error and not re.search(r"required|expected one argument", error)] == []
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)(?=[`; ]*(?:`|;|$|    ))", text, re.MULTILINE)) <= {*targets}
    tops = "|".join((*PACKAGES, "tests"))
    modules = re.findall(rf"python3? -m ((?:{tops})(?:\.[a-z_0-9]+)*)(?![\w.])", text)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    assert [path for path in re.findall(rf"`((?:{tops})/[\w./-]+)", text) if not (ROOT / path).exists()] == []


def test_every_number_of_a_command_line_has_a_range() -> None:
    """`whole_number` and `number` refuse what is negative, infinite or no number; settings and `Sampling` do, too."""

    def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from options(command)
            else:
                yield action

    checked = SETTINGS.keys() | {field.name for field in msgspec.structs.fields(Sampling)} | {"stop_id"}
    for build_parser in PROGRAMS.values():
        for action in options(build_parser()):
            assert action.type not in (int, float) or action.choices or action.dest in checked, action.option_strings
