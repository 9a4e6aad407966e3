"""What a board is told once, in one TOML file: the draft, the verifiers, the planner, the local service, the log.

Read from the file that is named, else $FLEXSPEC_CONFIG, else flexspec/config.toml below $XDG_CONFIG_HOME (~/.config),
else /etc/flexspec/config.toml, else defaults. The environment overrides the file: FLEXSPEC_<TABLE>__<FIELD>, such as
FLEXSPEC_PLANNER__POLICY=ucb, with commas between the strings of a list; FLEXSPEC_BUNDLE and FLEXSPEC_VERIFIER are short
for FLEXSPEC_DRAFT__BUNDLE and FLEXSPEC_VERIFIER__URLS. A variable that is empty counts as not set.

Secrets are never in the file or the environment: fields name files that hold them, or systemd passes them as
credentials (`CREDENTIALS`). A path that is not absolute starts at the folder of the file that says it.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from edge_runtime.planning.plan import OnLinkLoss
from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import toml_positions, validators

logger = logging.getLogger(__name__)

SYSTEM_FILE = Path("/etc/flexspec/config.toml")
PREFIX = "FLEXSPEC_"
SHORT = {"FLEXSPEC_BUNDLE": ("draft", "bundle"), "FLEXSPEC_VERIFIER": ("verifier", "urls")}
# Names that systemd's LoadCredential= is to use for what a field would otherwise name.
CREDENTIALS = {
    ("verifier", "token_file"): "verifier-token",
    ("verifier", "key_file"): "verifier-key",
    ("service", "api_key_file"): "api-key",
}
# How people call what must not be in the file, and the field that names the file it belongs in.
SECRETS = {
    "token": "token_file",
    "api_token": "token_file",
    "password": "token_file",
    "secret": "token_file",
    "api_key": "api_key_file",
    "key": "api_key_file",
    "client_key": "key_file",
    "private_key": "key_file",
}

Field = tuple[str, str]

Directory = Annotated[Path | None, msgspec.Meta(extra={"refine": validators.directory})]
File = Annotated[Path | None, msgspec.Meta(extra={"refine": validators.file})]
SecretFile = Annotated[Path | None, msgspec.Meta(extra={"refine": validators.secret_file})]
Authorities = Annotated[Path | None, msgspec.Meta(extra={"refine": validators.authorities})]
Somewhere = Annotated[Path | None, msgspec.Meta(extra={"refine": validators.path})]
Place = Annotated[Path, msgspec.Meta(extra={"refine": validators.path})]
Urls = Annotated[list[str], msgspec.Meta(min_length=1, extra={"refine": validators.urls})]
Objective = Annotated[str, msgspec.Meta(extra={"refine": validators.objective})]
Profile = Annotated[str, msgspec.Meta(extra={"refine": validators.profile})]
EnergyBudget = Annotated[str, msgspec.Meta(extra={"refine": validators.energy_budget})]
Policy = Annotated[str | None, msgspec.Meta(extra={"refine": validators.policy})]
Host = Annotated[str, msgspec.Meta(extra={"refine": validators.host})]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]

Radio = Literal["", "wifi", "ethernet", "lte", "5g"]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all tables."""


class Draft(Table, frozen=True):
    """The draft model.

    Attributes:
        bundle: directory of one bundle; None for the current one of the store.
        store: directory of the bundle store (see `edge_runtime.bundles`).
        public_key_file: PEM file of the keys of which one must have signed a bundle; None asks for no signature.
        threads: CPU threads of a step; 0 for one per physical core, at most 4.
        memory: whether verified text, prompts too, is remembered and helps the draft guess.
        memory_directory: where, across restarts; None for a service's state directory, else nowhere on disk.
    """

    bundle: Directory = None
    store: Place = msgspec.field(default_factory=lambda: default_store(os.environ))
    public_key_file: File = None
    threads: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    memory: bool = True
    memory_directory: Somewhere = None


class Verifier(Table, frozen=True):
    """Who has the last word.

    Attributes:
        urls: base URLs, the preferred one first.
        model: which target; empty for the verifier's choice.
        token_file: file of the token that the verifier asks for.
        ca_file: PEM file of the authorities to trust instead of the system's.
        certificate_file: PEM file of this board's own certificate, for verifiers that ask for one.
        key_file: PEM file of its private key.
        deadline_seconds: for how long an answer may stand still, attempts to reach a verifier included.
        http2: use HTTP/2 where the verifier offers it.
        insecure: prompts and answers may travel in clear to another machine; the token never does.
    """

    urls: Urls = msgspec.field(default_factory=lambda: ["http://127.0.0.1:8500"])
    model: str = ""
    token_file: SecretFile = None
    ca_file: Authorities = None
    certificate_file: File = None
    key_file: File = None
    deadline_seconds: Seconds = 600.0
    http2: bool = True
    insecure: bool = False


class Planner(Table, frozen=True):
    """Who decides how much to draft; as the options of `edge-runtime generate`.

    Attributes:
        policy: None for the release's own choice.
        objective: what a token should cost least of, by name or as prices.
        profile: what this board is: name of a shipped profile, or a .toml file; empty if nobody knows.
        radio: what the link goes over, for its energy; empty leaves that out.
        energy_budget: joules per hour, or until when the battery must last; empty for no budget.
    """

    policy: Policy = None
    objective: Objective = "latency"
    profile: Profile = ""
    radio: Radio = ""
    energy_budget: EnergyBudget = ""


class Service(Table, frozen=True):
    """The local HTTP service.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        max_concurrent: answers written at once.
        max_waiting: requests that may wait behind them.
        api_key_file: file of the key that clients must present; None asks for none.
        on_link_loss: without a verifier: wait for it, go on with the draft alone, or fail at once.
    """

    host: Host = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8400
    max_concurrent: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    max_waiting: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 8
    api_key_file: SecretFile = None
    on_link_loss: OnLinkLoss = "wait"


class Log(Table, frozen=True):
    """What is logged.

    Attributes:
        level: the least important messages that are.
        prompts: whether prompts and answers may be in them.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    prompts: bool = False


class Configuration(Table, frozen=True):
    """Everything; every field has a default."""

    draft: Draft = msgspec.field(default_factory=Draft)
    verifier: Verifier = msgspec.field(default_factory=Verifier)
    planner: Planner = Planner()
    service: Service = Service()
    log: Log = Log()


class Origin(msgspec.Struct, frozen=True):
    """Where a value comes from.

    Attributes:
        kind: `default`, `file`, `environment` or `credential`.
        name: the file or the variable.
        line, column: in the file, from 1; 0 where unknown.
    """

    kind: Literal["default", "file", "environment", "credential"]
    name: str = ""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        if self.kind == "file":
            return ":".join([self.name, *(str(number) for number in (self.line, self.column) if number)])
        return {"default": "default", "credential": f"credential {self.name}"}.get(self.kind, f"${self.name}")


class Problem(NamedTuple):
    """Something wrong, and where."""

    origin: Origin
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}"


class ConfigurationError(InputError):
    """A configuration with errors; the message has a line for each.

    Attributes:
        problems: all of them, those of the file first and in its order.
    """

    def __init__(self, problems: list[Problem]) -> None:
        kinds = ("file", "environment", "credential", "default")
        self.problems = sorted(problems, key=lambda p: (kinds.index(p.origin.kind), p.origin.line, p.origin.column))
        count = f"{len(problems)} errors" if len(problems) > 1 else "an error"
        super().__init__("\n  ".join([f"{count} in the configuration:", *map(str, self.problems)]))


class Effective(msgspec.Struct, frozen=True):
    """A configuration, and how it came about.

    Attributes:
        file: that was read; None if there was none.
        origins: of every field.
        warnings: what works and should not stay so, a sentence each.
    """

    configuration: Configuration
    file: Path | None
    origins: dict[Field, Origin]
    warnings: list[str]


class _Given(NamedTuple):
    value: Any
    origin: Origin
    folder: Path


def read_configuration(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Configuration:
    """The configuration in the file at `path`, or in the one that the module's docstring says; warnings are logged.

    Raises ConfigurationError, which names every error.
    """
    effective = read_effective(path, environ)
    for warning in effective.warnings:
        logger.warning(warning)
    return effective.configuration


def read_effective(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Effective:
    """As `read_configuration`, with where everything comes from."""
    problems: list[Problem] = []
    file = find_file(path, environ)
    given: dict[Field, _Given] = {}
    for field, name in CREDENTIALS.items():
        credential = Path(environ.get("CREDENTIALS_DIRECTORY", "/nowhere"), name)
        if os.path.lexists(credential):
            given[field] = _Given(str(credential), Origin("credential", name), Path())
    if file is not None:
        given |= _from_file(file, problems)
    given |= _from_environment(environ, problems)
    tables: dict[str, Table] = {}
    origins: dict[Field, Origin] = {}
    for table, kind in TABLES.items():
        values = {"store": default_store(environ)} if kind is Draft else {}
        for name, info in FIELDS[table].items():
            field = (table, name)
            origins[field] = Origin("default")
            if field in given:
                value, origins[field], folder = given[field]
                try:
                    values[name] = validators.convert(value, info.type, folder)
                except InputError as error:
                    problems.append(Problem(origins[field], f"{table}.{name}: {error}"))
        tables[table] = kind(**values)
    if problems:
        raise ConfigurationError(problems)
    configuration = Configuration(**tables)  # type: ignore[arg-type]
    return Effective(configuration, file, origins, list(_warnings(configuration)))


def find_file(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The configuration file; one that is named need not exist. None if there is none."""
    named = path or environ.get("FLEXSPEC_CONFIG")
    if named:
        return Path(named)
    home = _xdg(environ, "XDG_CONFIG_HOME", ".config")
    candidates = [*([home / "flexspec" / "config.toml"] if home else []), SYSTEM_FILE]
    return next((file for file in candidates if os.path.lexists(file)), None)


def default_store(environ: Mapping[str, str]) -> Path:
    """Where bundles are kept unless told otherwise.

    `bundles` below the first of systemd's $STATE_DIRECTORY, else flexspec/bundles below $XDG_STATE_HOME, by default
    ~/.local/state.
    """
    state = environ.get("STATE_DIRECTORY", "").split(":")[0]
    if state:
        return Path(state) / "bundles"
    return (_xdg(environ, "XDG_STATE_HOME", ".local/state") or Path("/var/lib")) / "flexspec" / "bundles"


def _xdg(environ: Mapping[str, str], variable: str, below_home: str) -> Path | None:
    """A base directory; a relative one is to be ignored, and a service has no home."""
    base = Path(environ.get(variable, ""))
    if base.is_absolute():
        return base
    return Path(environ["HOME"], below_home) if environ.get("HOME") else None


def _from_file(file: Path, problems: list[Problem]) -> dict[Field, _Given]:
    """What the file says, by field; what it says that no field is adds to `problems`."""
    try:
        document = toml_positions.parse(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        reason = "there is no such file; leave it out for defaults" if isinstance(error, FileNotFoundError) else ""
        problems.append(Problem(Origin("file", str(file)), reason or f"cannot be read: {error.strerror}"))
        return {}
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problems.append(Problem(Origin("file", str(file), line), "is not UTF-8; save it as UTF-8"))
        return {}
    except toml_positions.TomlError as error:
        problems.append(Problem(Origin("file", str(file), *error.place), f"not TOML: {error}; correct it there"))
        return {}

    given: dict[Field, _Given] = {}
    for table, values in document.values.items():
        origin = Origin("file", str(file), *document.place((table,)))
        if table not in TABLES:
            problems.append(Problem(origin, _no_table(table)))
        elif not isinstance(values, dict):
            problems.append(Problem(origin, f"{table}: must be a table; write [{table}], and its fields below"))
        else:
            for name, value in values.items():
                origin = Origin("file", str(file), *document.place((table, name)))
                if name in FIELDS[table]:
                    given[table, name] = _Given(value, origin, file.parent)
                else:
                    problems.append(Problem(origin, _no_field(table, name)))
    return given


def _from_environment(environ: Mapping[str, str], problems: list[Problem]) -> dict[Field, _Given]:
    """The same of the environment; values are typed like their fields, as far as they can be."""
    given: dict[Field, _Given] = {}
    # The short names come first, so that the long ones override them.
    for variable in sorted(environ, key=lambda variable: (variable not in SHORT, variable)):
        table, separator, name = variable.removeprefix(PREFIX).lower().partition("__")
        field = SHORT.get(variable, (table, name))
        if variable not in SHORT and not (variable.startswith(PREFIX) and separator):
            continue
        origin, text = Origin("environment", variable), environ[variable]
        if field[0] not in TABLES:
            problems.append(Problem(origin, _no_table(table)))
        elif field[1] not in FIELDS[field[0]]:
            problems.append(Problem(origin, _no_field(table, name)))
        elif text:
            given[field] = _Given(validators.from_text(text, FIELDS[field[0]][field[1]].type), origin, Path())
    return given


def _no_table(table: str) -> str:
    if advice := _misplaced(table):
        return f"{table}: {advice}"
    close = difflib.get_close_matches(table, TABLES, 1)
    advice = f"did you mean [{close[0]}]?" if close else f"there are {', '.join(f'[{name}]' for name in TABLES)}"
    return f"there is no table {json.dumps(table, ensure_ascii=False)}; {advice}"


def _no_field(table: str, name: str) -> str:
    if advice := _misplaced(name):
        return f"{table}.{name}: {advice}"
    close = difflib.get_close_matches(name, FIELDS[table], 1)
    advice = f"did you mean {close[0]}?" if close else f"[{table}] has {', '.join(FIELDS[table])}"
    return f"{table}.{name}: there is no such field; {advice}"


def _misplaced(name: str) -> str:
    """Where `name` should be instead; empty if nobody knows."""
    file = SECRETS.get(name.lower().replace("-", "_"), name)
    table = next((table for table, fields in FIELDS.items() if file in fields), "")
    if file == name:
        return f"belongs in [{table}]" if table else ""
    return (
        f"secrets do not belong here; put it into a file that only its user can read, and name that file as "
        f"{table}.{file}, or pass it as the systemd credential {CREDENTIALS[table, file]}"
    )


def _warnings(configuration: Configuration) -> Iterator[str]:
    verifier, service = configuration.verifier, configuration.service
    for name, file in (
        ("verifier.token_file", verifier.token_file),
        ("verifier.key_file", verifier.key_file),
        ("service.api_key_file", service.api_key_file),
    ):
        if file is not None and file.stat().st_mode & 0o004:
            yield f"{name}: everybody on this machine can read {file}; `chmod o-r` it"
    for url in verifier.urls:
        if validators.is_in_clear(url) and verifier.token_file is not None:
            yield f"verifier.urls: the token would go to {url} unencrypted, which no command does; use https"
        elif validators.is_in_clear(url) and not verifier.insecure:
            yield f"verifier.urls: prompts would go to {url} unencrypted, which is refused; use https, or say insecure"
    if service.api_key_file is None and not validators.is_loopback(service.host):
        yield f"service.host: whoever reaches {service.host} can use the service; set service.api_key_file"


TABLES: dict[str, type[Table]] = {
    "draft": Draft,
    "verifier": Verifier,
    "planner": Planner,
    "service": Service,
    "log": Log,
}
FIELDS = {name: {info.name: info for info in msgspec.structs.fields(table)} for name, table in TABLES.items()}
