"""Openly licensed source text that is already on this machine: what the example model family is trained on.

Three domains: `python`, and `cpp` and `stubs` (what type checkers read) for targets that drift away from it. Every
package that contributes is named here with its licence, and that name is checked against what the installed
distribution itself declares, so a package that changes its licence stops the build instead of slipping in. Nothing is
fetched, and the same installed versions give the same documents in the same order.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from edge_runtime.protocol.errors import InputError

MEGABYTE = 1_000_000
HELD_OUT_PERCENT = 2
# A file that is larger, or has longer lines, is a table or was generated; so is one made of digits.
LARGEST_FILE = 400_000
LONGEST_LINE = 400
MOST_DIGITS = 0.2
# Lines shorter than this (braces, `else:`) repeat everywhere and say nothing about duplication.
TELLING_LINE = 24
MOST_REPEATED = 0.6

GENERATED = re.compile(r"@generated|(auto-?|automatically |was )generated|do not (edit|modify)", re.IGNORECASE)
# Some files of a package carry another licence than the package. These are the ones we could not pass on.
OTHER_LICENCE = re.compile(
    r"General Public License|\bA?L?GPL|Mozilla Public|\bMPL[- ]2|Creative Commons|non-?commercial|proprietary|"
    r"NVIDIA (Software )?License|Intel Simplified|Eclipse Public",
    re.IGNORECASE,
)
VENDORED = re.compile(r"(^|/)(_?vendor(ed)?|third_?party|externals?|extern|site-packages|subprojects)(/|$)")


@dataclass(frozen=True)
class Source:
    """Part of an installed distribution, under one licence.

    Attributes:
        package: name of the distribution; `cpython` is the running interpreter's standard library.
        licence: its SPDX expression, for the part that is used.
        declared: what the distribution's own metadata must mention for `licence` to be believed.
        roots: folders to take, relative to site-packages.
        megabytes: most text to take, so that no package dominates.
        skip: pattern of relative paths to leave out.
    """

    package: str
    licence: str
    declared: str
    roots: tuple[str, ...]
    megabytes: float = 2.0
    skip: str = r"^$"


@dataclass(frozen=True)
class Domain:
    """A kind of text: where it comes from and what its files are called."""

    name: str
    suffixes: tuple[str, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Document:
    """One file: `path` is unique within its domain and stable across machines."""

    path: str
    text: str
    held_out: bool


@dataclass
class Contribution:
    """What one package gave, for the record."""

    package: str
    version: str
    licence: str
    files: int = 0
    bytes: int = 0


@dataclass
class Corpus:
    """The documents of one domain, in an order that mixes packages."""

    domain: str
    documents: list[Document]
    contributions: list[Contribution] = field(default_factory=list)

    def record(self) -> list[dict[str, object]]:
        """The contributions as plain data, for `sources.json`."""
        return [asdict(contribution) for contribution in self.contributions]


def _permissive(package: str, licence: str, root: str | None = None, **rest: object) -> Source:
    """A source in one folder named like its package, declaring the licence family it is listed under."""
    family = licence.split("-")[0]
    return Source(package, licence, family, (root or package,), **rest)  # type: ignore[arg-type]


PYTHON = Domain(
    "python",
    (".py",),
    (
        Source(
            "cpython",
            "PSF-2.0",
            "",
            (),
            26,
            skip=r"^(lib2to3/tests/data|test/encoded_modules|idlelib|pydoc_data)/",
        ),
        _permissive("torch", "BSD-3-Clause", megabytes=14),
        _permissive("pandas", "BSD-3-Clause", megabytes=9),
        _permissive("scipy", "BSD-3-Clause", megabytes=9),
        _permissive("transformers", "Apache-2.0", megabytes=8),
        _permissive("numpy", "BSD-3-Clause", megabytes=7),
        _permissive("sympy", "BSD-3-Clause", megabytes=5),
        _permissive("networkx", "BSD-3-Clause", megabytes=6),
        # matplotlib's own licence is modelled on Python's; its metadata says so in words.
        Source("matplotlib", "PSF-2.0", "Python Software Foundation", ("matplotlib",), 6, r"^matplotlib/_cm"),
        _permissive("mypy", "MIT", megabytes=4, skip=r"typeshed"),
        _permissive("fonttools", "MIT", "fontTools", megabytes=2),
        _permissive("Pygments", "BSD-2-Clause", "pygments", megabytes=1.5, skip=r"_builtins\.py$|_mapping\.py$"),
        _permissive("pytest", "MIT", "_pytest"),
        _permissive("setuptools", "MIT"),
        _permissive("peft", "Apache-2.0", megabytes=2),
        _permissive("datasets", "Apache-2.0"),
        _permissive("huggingface-hub", "Apache-2.0", "huggingface_hub"),
        _permissive("accelerate", "Apache-2.0"),
        _permissive("optimum", "Apache-2.0"),
        _permissive("pyarrow", "Apache-2.0", megabytes=2),
        _permissive("onnx", "Apache-2.0", megabytes=1),
        _permissive("onnx-ir", "Apache-2.0", "onnx_ir"),
        _permissive("mpmath", "BSD-3-Clause", megabytes=1),
        _permissive("rich", "MIT"),
        _permissive("aiohttp", "Apache-2.0"),
        _permissive("fsspec", "BSD-3-Clause"),
        _permissive("anyio", "MIT"),
        _permissive("Jinja2", "BSD-3-Clause", "jinja2"),
        _permissive("pillow", "MIT-CMU", "PIL"),
        _permissive("click", "BSD-3-Clause"),
        _permissive("starlette", "BSD-3-Clause"),
        _permissive("urllib3", "MIT"),
        _permissive("requests", "Apache-2.0"),
        _permissive("httpx", "BSD-3-Clause"),
        _permissive("httpcore", "BSD-3-Clause"),
        _permissive("h11", "MIT"),
        _permissive("h2", "MIT"),
        _permissive("psutil", "BSD-3-Clause"),
        _permissive("tenacity", "Apache-2.0"),
        _permissive("pyparsing", "MIT"),
        _permissive("packaging", "Apache-2.0"),
        _permissive("attrs", "MIT", "attr"),
        _permissive("markdown-it-py", "MIT", "markdown_it"),
    ),
)

CPP = Domain(
    "cpp",
    (".h", ".hpp", ".hh", ".cuh"),
    (
        # The operator headers are written by a generator, thousands of them from one template.
        Source(
            "torch",
            "BSD-3-Clause",
            "BSD-3-Clause",
            ("torch/include/torch", "torch/include/c10", "torch/include/ATen", "torch/include/caffe2"),
            megabytes=12,
            skip=r"ATen/ops/|/generated/|Functions\.h$|mem_eff_attention/|TensorBody\.h$|Redispatch",
        ),
        Source("torch", "Apache-2.0", "Apache-2.0", ("torch/include/oneapi",), 1),
        Source("torch", "BSD-3-Clause", "BSD-3-Clause", ("torch/include/pybind11", "torch/include/google"), 2),
        Source("torch", "MIT", "MIT", ("torch/include/fmt",), 1),
        Source(
            "numpy",
            "BSD-3-Clause",
            "BSD-3-Clause",
            ("numpy/_core/include/numpy",),
            skip=r"libdivide/|__multi",
        ),
        Source("pyarrow", "Apache-2.0", "Apache-2.0", ("pyarrow/include",), 4),
        Source("onnx", "Apache-2.0", "Apache-2.0", ("onnx",), 1),
    ),
)

STUBS = Domain(
    "stubs",
    (".pyi",),
    (
        # Its stubs are typeshed's, which is Apache-2.0 with parts under MIT.
        Source("mypy", "Apache-2.0 AND MIT", "MIT", ("mypy",), 4),
        _permissive("torch", "BSD-3-Clause", megabytes=3),
        _permissive("numpy", "BSD-3-Clause", megabytes=2),
        Source("matplotlib", "PSF-2.0", "Python Software Foundation", ("matplotlib",), 1),
        _permissive("tokenizers", "Apache-2.0", megabytes=1),
        _permissive("cryptography", "Apache-2.0", megabytes=1),
        _permissive("onnx", "Apache-2.0", megabytes=1),
        _permissive("scipy", "BSD-3-Clause", megabytes=1),
        _permissive("pillow", "MIT-CMU", "PIL", megabytes=1),
    ),
)

DOMAINS = (PYTHON, CPP, STUBS)


def gather(domain: Domain, *, most_bytes: float | None = None) -> Corpus:
    """Reads a domain's documents, the same ones in the same order for the same installed versions.

    Args:
        domain: what to gather.
        most_bytes: a bound over all sources, shared in proportion to their own, for small runs.

    Raises:
        InputError: a listed package declares another licence, or nothing of the domain is installed.
    """
    corpus = Corpus(domain.name, [])
    total = sum(source.megabytes for source in domain.sources) * MEGABYTE
    share = 1.0 if most_bytes is None else min(1.0, most_bytes / total)
    contents: set[bytes] = set()
    lines: set[int] = set()
    for source in domain.sources:
        version = _checked_version(source)
        if version is None:
            continue
        given = Contribution(source.package, version, source.licence)
        for path, text in _readable(source, domain.suffixes):
            # Both bounds are checked before the file is taken: one file may pass the cap, never two.
            if given.bytes >= source.megabytes * MEGABYTE * share:
                break
            digest = hashlib.sha256(text.encode()).digest()
            if digest in contents or _mostly_repeats(text, lines):
                continue
            contents.add(digest)
            name = f"{source.package}/{path}"
            corpus.documents.append(Document(name, text, is_held_out(name)))
            given.files += 1
            given.bytes += len(text.encode())
        if given.files:
            corpus.contributions.append(given)
    if not corpus.documents:
        packages = ", ".join(sorted({source.package for source in domain.sources}))
        raise InputError(f"no {domain.name} text found: install some of {packages} beside this interpreter")
    corpus.documents.sort(key=lambda document: _place(document.path))
    return corpus


def is_held_out(path: str) -> bool:
    """Whether the file is kept for evaluation: a matter of its path alone, whatever else is there."""
    return _place(path) % 100 < HELD_OUT_PERCENT


def refuse(text: str) -> str | None:
    """Why a file's text is no use for training, or None."""
    if len(text) < 200:
        return "too short"
    if len(text) > LARGEST_FILE:
        return "too large"
    head = text[:4000]
    if GENERATED.search(text[:1500]):
        return "generated"
    if OTHER_LICENCE.search(head):
        return "mentions another licence"
    if max(map(len, text.splitlines())) > LONGEST_LINE:
        return "long lines"
    if sum(map(text.count, "0123456789")) > MOST_DIGITS * len(text):
        return "mostly digits"
    return None


def _place(path: str) -> int:
    """A number that shuffles paths and stays the same everywhere."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8])


def _readable(source: Source, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yields (relative path, text) of the source's usable files, shuffled by their paths."""
    site = Path(sysconfig.get_path("purelib"))
    base = Path(sysconfig.get_path("stdlib")) if source.package == "cpython" else site
    roots = [base / root for root in source.roots] or [base]
    skip = re.compile(source.skip)
    files = {}
    for root in roots:
        for path in root.rglob("*"):
            name = path.relative_to(base).as_posix()
            if path.suffix in suffixes and not skip.search(name) and not VENDORED.search(name) and path.is_file():
                files[name] = path
    for name in sorted(files, key=_place):
        try:
            text = files[name].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if refuse(text) is None:
            yield name, text


def _mostly_repeats(text: str, seen: set[int]) -> bool:
    """Whether most telling lines were seen before; if not, they count as seen from now on."""
    telling = {
        int.from_bytes(hashlib.blake2b(line.strip().encode(), digest_size=8).digest())
        for line in text.splitlines()
        if len(line.strip()) >= TELLING_LINE
    }
    if telling and len(telling & seen) > MOST_REPEATED * len(telling):
        return True
    seen |= telling
    return False


def _checked_version(source: Source) -> str | None:
    """The installed version, once its metadata bears out the licence; None if it is not installed."""
    if source.package == "cpython":
        return platform.python_version()
    try:
        found = distribution(source.package)
    except PackageNotFoundError:
        return None
    declared = declared_licence(found)
    if source.declared.lower() not in declared.lower():
        raise InputError(
            f"{source.package} {found.version} is listed as {source.licence} but declares {declared!r}: "
            "check its licence and correct export/data/corpus.py"
        )
    return found.version


def declared_licence(found: Distribution) -> str:
    """What a distribution says of its licence: expression, classifiers and the first line of the free text."""
    fields = found.metadata.get_all("License-Expression") or []
    fields += [line for line in found.metadata.get_all("Classifier") or [] if line.startswith("License")]
    fields += [text.strip().splitlines()[0] for text in found.metadata.get_all("License") or [] if text.strip()]
    return "; ".join(fields)
