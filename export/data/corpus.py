"""Collects the training corpus of the example family: openly licensed source text that is installed on this machine.

There are two domains, `python` and `cpp` (headers), for the later versions of the target and for its draft. Every
contributing package is listed with its license, which is checked against the metadata of the installed
distribution, so that a package whose license changes stops the build. Nothing is downloaded, and the same installed
versions give the same documents in the same order.
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
# Chosen: larger files, files with longer lines and files with more digits are tables or generated code.
MAX_FILE_CHARACTERS = 400_000
MAX_LINE_CHARACTERS = 400
MAX_DIGIT_SHARE = 0.2
# Chosen: shorter lines (braces, `else:`) occur everywhere and are no sign of duplication.
MIN_DISTINCTIVE_LINE_CHARACTERS = 24
MAX_REPEATED_SHARE = 0.6

GENERATED = re.compile(r"@generated|(auto-?|automatically |was )generated|do not (edit|modify)", re.IGNORECASE)
# Some files have another license than their package. Text under these licenses could not be redistributed.
OTHER_LICENSE = re.compile(
    r"General Public License|\bA?L?GPL|Mozilla Public|\bMPL[- ]2|Creative Commons|non-?commercial|proprietary|"
    r"NVIDIA (Software )?License|Intel Simplified|Eclipse Public",
    re.IGNORECASE,
)
VENDORED = re.compile(r"(^|/)(_?vendor(ed)?|third_?party|externals?|extern|site-packages|subprojects)(/|$)")


@dataclass(frozen=True)
class Source:
    """Part of an installed distribution that is under one license.

    Attributes:
        package: name of the distribution; `cpython` means the standard library of the running interpreter.
        license: SPDX expression of the part that is used.
        declared: text that the metadata of the distribution must contain to confirm `license`.
        roots: directories to read, relative to site-packages.
        megabytes: upper bound on the text taken, so that no package dominates.
        skip: pattern of relative paths to exclude.
    """

    package: str
    license: str
    declared: str
    roots: tuple[str, ...]
    megabytes: float = 2.0
    skip: str = r"^$"


@dataclass(frozen=True)
class Domain:
    """A kind of text: its sources and the suffixes of its files."""

    name: str
    suffixes: tuple[str, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Document:
    """One file. `path` is unique within its domain and the same on every machine."""

    path: str
    text: str
    held_out: bool


@dataclass
class Contribution:
    """What one package contributed; the field names are those of `sources.json`."""

    package: str
    version: str
    license: str
    files: int = 0
    bytes: int = 0


@dataclass
class Corpus:
    """The documents of one domain, with the packages shuffled together."""

    domain: str
    documents: list[Document]
    contributions: list[Contribution] = field(default_factory=list)

    def record(self) -> list[dict[str, object]]:
        """Return the contributions as plain data for `sources.json`."""
        return [asdict(contribution) for contribution in self.contributions]


def _permissive(
    package: str, license: str, root: str | None = None, *, megabytes: float = 2.0, skip: str = r"^$"
) -> Source:
    """Return a source in one directory, `root` or named like the package, whose metadata names the license family."""
    family = license.split("-")[0]
    return Source(package, license, family, (root or package,), megabytes=megabytes, skip=skip)


PYTHON = Domain(
    "python",
    (".py",),
    (
        Source(
            "cpython",
            "PSF-2.0",
            "",
            (),
            megabytes=26,
            skip=r"^(lib2to3/tests/data|test/encoded_modules|idlelib|pydoc_data)/",
        ),
        _permissive("torch", "BSD-3-Clause", megabytes=14),
        _permissive("pandas", "BSD-3-Clause", megabytes=9),
        _permissive("scipy", "BSD-3-Clause", megabytes=9),
        _permissive("transformers", "Apache-2.0", megabytes=8),
        _permissive("numpy", "BSD-3-Clause", megabytes=7),
        _permissive("sympy", "BSD-3-Clause", megabytes=5),
        _permissive("networkx", "BSD-3-Clause", megabytes=6),
        # The license of matplotlib is modeled on Python's; its metadata says so in prose.
        Source(
            "matplotlib", "PSF-2.0", "Python Software Foundation", ("matplotlib",), megabytes=6, skip=r"^matplotlib/_cm"
        ),
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
        # The thousands of operator headers are generated from one template.
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

DOMAINS = (PYTHON, CPP)


def gather_corpus(domain: Domain, *, max_bytes: float | None = None) -> Corpus:
    """Collect the documents of a domain; equal installed versions give equal documents in equal order.

    Args:
        max_bytes: bound on the text of all sources, for small runs; it scales the bound of each source.

    Raises:
        InputError: a listed package declares another license, or no package of the domain is installed.
    """
    corpus = Corpus(domain.name, [])
    total = sum(source.megabytes for source in domain.sources) * MEGABYTE
    share = 1.0 if max_bytes is None else min(1.0, max_bytes / total)
    seen_digests: set[bytes] = set()
    seen_lines: set[int] = set()
    for source in domain.sources:
        version = _checked_version(source)
        if version is None:
            continue
        contribution = Contribution(source.package, version, source.license)
        for path, text in _usable_files(source, domain.suffixes):
            # Checked before a file is added, so that at most one file exceeds the bound.
            if contribution.bytes >= source.megabytes * MEGABYTE * share:
                break
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen_digests or _is_mostly_repeated(text, seen_lines):
                continue
            seen_digests.add(digest)
            name = f"{source.package}/{path}"
            corpus.documents.append(Document(name, text, is_held_out(name)))
            contribution.files += 1
            contribution.bytes += len(text.encode())
        if contribution.files:
            corpus.contributions.append(contribution)
    if not corpus.documents:
        packages = ", ".join(sorted({source.package for source in domain.sources}))
        raise InputError(f"no {domain.name} text found: install some of {packages} for this interpreter")
    corpus.documents.sort(key=lambda document: _path_hash(document.path))
    return corpus


def is_held_out(path: str) -> bool:
    """Return whether the file is held out for evaluation. The answer depends on the path alone."""
    return _path_hash(path) % 100 < HELD_OUT_PERCENT


def rejection_reason(text: str) -> str | None:
    """Return why the text of a file is unsuitable for training, or None if it is suitable."""
    if len(text) < 200:
        return "too short"
    if len(text) > MAX_FILE_CHARACTERS:
        return "too large"
    head = text[:4000]
    if GENERATED.search(text[:1500]):
        return "generated"
    if OTHER_LICENSE.search(head):
        return "mentions another license"
    if max(map(len, text.splitlines())) > MAX_LINE_CHARACTERS:
        return "long lines"
    if sum(map(text.count, "0123456789")) > MAX_DIGIT_SHARE * len(text):
        return "mostly digits"
    return None


def _path_hash(path: str) -> int:
    """Return a 64-bit hash: the shuffling order, equal on every machine."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8])


def _usable_files(source: Source, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of the suitable files of a source, in the order of their path hashes."""
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
    for name in sorted(files, key=_path_hash):
        try:
            text = files[name].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if rejection_reason(text) is None:
            yield name, text


def _is_mostly_repeated(text: str, seen: set[int]) -> bool:
    """Return whether most distinctive lines occur in `seen`; if not, add them to it."""
    lines = {
        int.from_bytes(hashlib.blake2b(line.strip().encode(), digest_size=8).digest())
        for line in text.splitlines()
        if len(line.strip()) >= MIN_DISTINCTIVE_LINE_CHARACTERS
    }
    if lines and len(lines & seen) > MAX_REPEATED_SHARE * len(lines):
        return True
    seen |= lines
    return False


def _checked_version(source: Source) -> str | None:
    """Return the installed version, or None if the package is not installed.

    Raises:
        InputError: the metadata of the distribution does not confirm the license.
    """
    if source.package == "cpython":
        return platform.python_version()
    try:
        found = distribution(source.package)
    except PackageNotFoundError:
        return None
    declared = declared_license(found)
    if source.declared.lower() not in declared.lower():
        raise InputError(
            f"{source.package} {found.version} is listed as {source.license} but declares {declared!r}: "
            "check its license and correct export/data/corpus.py"
        )
    return found.version


def declared_license(found: Distribution) -> str:
    """Return the license metadata of a distribution: expression, classifiers and the first line of the free text."""
    fields = found.metadata.get_all("License-Expression") or []
    fields += [line for line in found.metadata.get_all("Classifier") or [] if line.startswith("License")]
    fields += [text.strip().splitlines()[0] for text in found.metadata.get_all("License") or [] if text.strip()]
    return "; ".join(fields)
