"""The settings of a board, each declared once, as an annotated field of one of the tables below.

A field's name is its TOML key, its type and constraints are what a value is checked against, its value is the default,
and its `SettingSpec` holds the rest: help, command-line option, environment variable, validator.
Everything else is derived from that: configuration files and the environment (`settings.loading`), the options of the
commands (`cli.settings_options`), `edge-runtime config show`, and the reference that `edge-runtime config reference`
prints. To add a setting, add a field.

Every command imports this module, so it imports nothing slow.
"""

# No `from __future__ import annotations`: the annotations are data here.
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import msgspec

from edge_runtime.planning.plan import OnLinkLoss
from edge_runtime.settings import validators

ENVIRONMENT_PREFIX = "FLEXSPEC_"

# As `planning.factory.POLICY_NAMES`, whose module takes long to import; a test compares the two.
PolicyName = Literal["analytic", "learned", "fixed", "hf-dynamic", "genai-ewma", "ucb"]
# The forms themselves are in `service.tool_calls.forms`, above this package.
ToolCallFormName = Literal[
    "hermes",
    "qwen3-coder",
    "glm",
    "llama3",
    "mistral",
    "mistral-args",
    "granite",
    "deepseek",
    "deepseek-v3.1",
    "command-r",
]
ReasoningFormName = Literal["none", "think", "mistral"]
ToolCallFormSetting = Literal["auto", ToolCallFormName]
ReasoningFormSetting = Literal["auto", ReasoningFormName]
RadioName = Literal["", "wifi", "ethernet", "lte", "5g"]
LogLevel = Literal["debug", "info", "warning", "error"]
# Chosen: a client would rather hear why than wait longer, and most restarts of a router or verifier are over by then.
DEFAULT_DEADLINE_SECONDS = 120.0
DEFAULT_VERIFIER_URL = "http://127.0.0.1:8500"


class SettingSpec(NamedTuple):
    """What a field's annotation declares about a setting in addition to its type.

    Attributes:
        option: command-line option of the commands that take the setting, such as `--threads N`.
        help: one phrase, without the default.
        flag_help: help of the option, if it differs: an option such as --no-http2 says the opposite of its setting.
        default: the default in words; empty shows the value.
        variable: short environment variable, in addition to FLEXSPEC_<TABLE>__<FIELD>, which overrides it.
        credential: systemd credential (LoadCredential=) that is used if nothing else sets the value.
        validate: checks and normalizes a value of the right type, given the directory of relative paths.
        mistaken_names: keys that people write for the secret itself, which must never be in a configuration.
        reloadable: whether a running service applies a change on SIGHUP, without a restart.
    """

    option: str
    help: str
    flag_help: str = ""
    default: str = ""
    variable: str = ""
    credential: str = ""
    validate: Callable[[Any, Path], Any] | None = None
    mistaken_names: tuple[str, ...] = ()
    reloadable: bool = False

    @property
    def flag(self) -> str:
        """The option without the placeholder of its value."""
        return self.option.partition(" ")[0]

    @property
    def metavar(self) -> str | None:
        """The placeholder of the option's value; None without one."""
        return self.option.partition(" ")[2] or None


class RemovedFeature(NamedTuple):
    """A feature that is gone. What used to set it is accepted, does nothing and warns.

    Attributes:
        name: in words.
        keys: TOML keys, such as `draft.threads`, from which environment variables were made.
        options: command-line options, such as `--threads N`.
    """

    name: str
    keys: tuple[str, ...]
    options: tuple[str, ...]


class SettingsTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all tables."""


def default_store(environ: Mapping[str, str]) -> Path:
    """Return the default directory of the bundle store, below `state_directory`."""
    return state_directory(environ) / "bundles"


def state_directory(environ: Mapping[str, str]) -> Path:
    """Return where this process keeps state.

    That is the first directory of systemd's $STATE_DIRECTORY, else flexspec below $XDG_STATE_HOME, by default
    ~/.local/state.
    """
    state = environ.get("STATE_DIRECTORY", "").split(":")[0]
    if state:
        return Path(state)
    return (xdg_directory(environ, "XDG_STATE_HOME", ".local/state") or Path("/var/lib")) / "flexspec"


def xdg_directory(environ: Mapping[str, str], variable: str, below_home: str) -> Path | None:
    """Return an XDG base directory; None for a service, which has no home. The standard ignores relative ones."""
    base = Path(environ.get(variable, ""))
    if base.is_absolute():
        return base
    return Path(environ["HOME"], below_home) if environ.get("HOME") else None


class DraftSettings(SettingsTable, frozen=True):
    """[draft]: the draft model and what supports it."""

    bundle: Annotated[
        Path | None,
        SettingSpec(
            "--bundle DIR",
            "directory of the draft bundle",
            default="$FLEXSPEC_BUNDLE, else the store's current bundle, else the bundle shipped with a source checkout",
            variable="FLEXSPEC_BUNDLE",
            validate=validators.directory,
        ),
    ] = None
    store: Annotated[
        Path,
        SettingSpec(
            "--store DIR",
            "directory of the bundle store",
            default="bundles below $STATE_DIRECTORY under systemd, else ~/.local/state/flexspec/bundles",
            validate=validators.path,
        ),
    ] = msgspec.field(default_factory=lambda: default_store(os.environ))
    public_key_file: Annotated[
        Path | None,
        SettingSpec(
            "--key FILE",
            "PEM file of public keys, one of which must have signed a bundle",
            default="none, unsigned bundles are accepted",
            validate=validators.file,
        ),
    ] = None
    threads: Annotated[
        int,
        msgspec.Meta(ge=0, le=256),
        SettingSpec("--threads N", "CPU threads of the draft model; 0 uses one per physical core, at most 4"),
    ] = 0
    prefix_cache_mib: Annotated[
        int,
        msgspec.Meta(ge=0, le=1 << 20),
        SettingSpec(
            "--draft-prefix-cache MIB",
            "memory for the draft's KV caches of the last conversations, so that their next turns start sooner; "
            "0 keeps none",
        ),
    ] = 64


class VerifierSettings(SettingsTable, frozen=True):
    """[verifier]: the verifiers and the connection to them."""

    urls: Annotated[
        list[str],
        msgspec.Meta(min_length=1),
        SettingSpec(
            "--verifier URL[,URL...]",
            "base URLs of verifiers, the preferred one first; the next one is used while one cannot be reached",
            default=f"$FLEXSPEC_VERIFIER, else {DEFAULT_VERIFIER_URL}",
            variable="FLEXSPEC_VERIFIER",
            validate=validators.urls,
        ),
    ] = msgspec.field(default_factory=lambda: [DEFAULT_VERIFIER_URL])
    model: Annotated[
        str,
        SettingSpec(
            "--model NAME", "target model, if a request names none", default="the verifier's default", reloadable=True
        ),
    ] = ""
    token_file: Annotated[
        Path | None,
        SettingSpec(
            "--token-file FILE",
            "file with the bearer token for the verifier",
            default="no token",
            credential="verifier-token",
            validate=validators.secret_file,
            mistaken_names=("token", "api_token", "password", "secret"),
            reloadable=True,
        ),
    ] = None
    ca_file: Annotated[
        Path | None,
        SettingSpec(
            "--ca-file FILE",
            "PEM file of certificate authorities to trust",
            default="the system's",
            validate=validators.authorities,
        ),
    ] = None
    certificate_file: Annotated[
        Path | None,
        SettingSpec(
            "--client-certificate FILE",
            "PEM client certificate of this board, for verifiers that require one",
            default="no client certificate",
            validate=validators.file,
        ),
    ] = None
    key_file: Annotated[
        Path | None,
        SettingSpec(
            "--client-key FILE",
            "PEM private key of the client certificate",
            default="no client certificate",
            credential="verifier-key",
            validate=validators.file,
            mistaken_names=("client_key", "private_key"),
        ),
    ] = None
    deadline_seconds: Annotated[
        float,
        msgspec.Meta(gt=0, le=3600),
        SettingSpec(
            "--deadline SECONDS", "give up when no token has arrived for this long, retries included", reloadable=True
        ),
    ] = DEFAULT_DEADLINE_SECONDS
    proxy: Annotated[
        str,
        SettingSpec(
            "--proxy URL",
            "HTTP proxy for the connections to verifiers, such as http://proxy.example:3128; HTTP_PROXY and similar "
            "variables are ignored",
            default="none",
            variable="FLEXSPEC_PROXY",
            validate=validators.proxy,
        ),
    ] = ""
    http2: Annotated[
        bool,
        SettingSpec(
            "--no-http2",
            "use HTTP/2 if the verifier offers it",
            flag_help="use HTTP/1.1 even if the verifier offers HTTP/2",
        ),
    ] = True
    insecure: Annotated[
        bool,
        SettingSpec(
            "--insecure",
            "allow unencrypted prompts and answers to an http:// verifier on another machine; a token is never "
            "sent unencrypted",
        ),
    ] = False


class PlannerSettings(SettingsTable, frozen=True):
    """[planner]: how much to draft."""

    policy: Annotated[
        PolicyName | None,
        SettingSpec("--policy", "policy that decides how much to draft", default="analytic", reloadable=True),
    ] = None
    objective: Annotated[
        str,
        SettingSpec(
            "--objective OBJECTIVE",
            "what to minimize per token: latency, cloud, energy, balanced, or prices in seconds of waiting, such "
            "as verifier=2,joule=0.05",
            validate=validators.objective,
            reloadable=True,
        ),
    ] = "latency"
    profile: Annotated[
        str,
        SettingSpec(
            "--profile NAME",
            "device profile of this board: a name from `device-profile list`, or a .toml file",
            default="none, joules are not modeled",
            validate=validators.profile,
            reloadable=True,
        ),
    ] = ""
    radio: Annotated[
        RadioName,
        SettingSpec(
            "--radio",
            "what carries the link, to model its energy with the profile",
            default="none, the link's energy is not counted",
            reloadable=True,
        ),
    ] = ""
    energy_budget: Annotated[
        str,
        SettingSpec(
            "--energy-budget BUDGET",
            "joules per hour such as 18000, or a time of day such as 18:00 that the battery must last until",
            default="no budget",
            validate=validators.energy_budget,
            reloadable=True,
        ),
    ] = ""
    state_directory: Annotated[
        Path,
        SettingSpec(
            "--planner-state DIR",
            "keep here across restarts what the planner has learned about the draft: counts, no text",
            default="planner below $STATE_DIRECTORY under systemd, else ~/.local/state/flexspec/planner",
            validate=validators.path,
        ),
    ] = msgspec.field(default_factory=lambda: state_directory(os.environ) / "planner")


class ServiceSettings(SettingsTable, frozen=True):
    """[service]: the local HTTP service of `edge-runtime serve`."""

    host: Annotated[str, SettingSpec("--host ADDRESS", "address to listen on", validate=validators.host)] = "127.0.0.1"
    port: Annotated[
        int, msgspec.Meta(ge=0, le=65535), SettingSpec("--port PORT", "port to listen on; 0 picks a free one")
    ] = 8400
    max_concurrent: Annotated[
        int,
        msgspec.Meta(ge=1, le=64),
        SettingSpec(
            "--max-concurrent N",
            "answers generated at the same time; each takes memory for a draft context",
            reloadable=True,
        ),
    ] = 2
    max_waiting: Annotated[
        int,
        msgspec.Meta(ge=0, le=4096),
        SettingSpec(
            "--max-waiting N",
            "answers that may wait for one of those; requests for more are refused with a Retry-After",
            reloadable=True,
        ),
    ] = 64
    max_connections: Annotated[
        int,
        msgspec.Meta(ge=16, le=65536),
        SettingSpec(
            "--max-connections N",
            "connections of clients at once; when there are more, the address with most of them loses the one that has "
            "been idle for longest",
        ),
    ] = 512
    max_connections_per_address: Annotated[
        int,
        msgspec.Meta(ge=0, le=65536),
        SettingSpec(
            "--max-connections-per-address N",
            "connections from one IPv4 address or IPv6 /64 network, this machine excepted; 0 for no limit of its own, "
            "for instance behind a proxy on another machine",
        ),
    ] = 128
    api_key_file: Annotated[
        Path | None,
        SettingSpec(
            "--api-key-file FILE",
            "file of API keys, one per line, one of which clients must present",
            default="no key required",
            credential="api-key",
            validate=validators.api_key_file,
            mistaken_names=("api_key", "key"),
            reloadable=True,
        ),
    ] = None
    allowed_hosts: Annotated[
        list[str],
        SettingSpec(
            "--allowed-hosts NAME[,NAME...]",
            "further names under which a service without keys that listens on loopback answers, for instance behind a "
            "proxy",
            default="localhost and the board's own name, also with .local",
            validate=validators.host_names,
            reloadable=True,
        ),
    ] = msgspec.field(default_factory=list)
    cors_origins: Annotated[
        list[str],
        SettingSpec(
            "--cors-origins ORIGIN[,ORIGIN...]",
            "origins of web pages that may use the service from a browser, such as https://chat.example; * for all, "
            "which lets every page that you visit ask this board",
            default="none",
            validate=validators.origins,
            reloadable=True,
        ),
    ] = msgspec.field(default_factory=list)
    on_link_loss: Annotated[
        OnLinkLoss,
        SettingSpec(
            "--on-link-loss",
            "if no verifier can be reached: wait for one and continue the answer; let the draft continue alone, "
            "marked as unverified until a verifier is back; or fail immediately",
            reloadable=True,
        ),
    ] = "wait"
    tool_call_form: Annotated[
        ToolCallFormSetting,
        SettingSpec(
            "--tool-call-form",
            "form in which the target writes tool calls; auto recognizes it by the chat template",
            reloadable=True,
        ),
    ] = "auto"
    reasoning_form: Annotated[
        ReasoningFormSetting,
        SettingSpec(
            "--reasoning-form",
            "form in which the target marks its reasoning; auto recognizes it by the chat template, none leaves "
            "reasoning in the content",
            reloadable=True,
        ),
    ] = "auto"


class LogSettings(SettingsTable, frozen=True):
    """[log]: what is logged."""

    level: Annotated[LogLevel, SettingSpec("--log-level", "least severe messages that are logged", reloadable=True)] = (
        "info"
    )
    prompts: Annotated[bool, SettingSpec("--log-prompts", "log prompts and answers, too", reloadable=True)] = False


class Settings(SettingsTable, frozen=True):
    """All settings; every field has a default."""

    draft: DraftSettings = msgspec.field(default_factory=DraftSettings)
    verifier: VerifierSettings = msgspec.field(default_factory=VerifierSettings)
    planner: PlannerSettings = PlannerSettings()
    service: ServiceSettings = ServiceSettings()
    log: LogSettings = LogSettings()

    def get(self, key: str) -> Any:
        """Return the value of a setting, such as `draft.threads`."""
        table, _, name = key.partition(".")
        return getattr(getattr(self, table), name)

    def replace(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with other values, by key such as `draft.threads`; they are not validated."""
        tables: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            table, _, name = key.partition(".")
            tables.setdefault(table, {})[name] = value
        changed = {table: msgspec.structs.replace(getattr(self, table), **fields) for table, fields in tables.items()}
        return msgspec.structs.replace(self, **changed)


class SettingEntry(NamedTuple):
    """One setting, as declared by a field of a table.

    Attributes:
        type: the annotated type, for `validators.convert`.
        value: the default value; None if it depends on the environment.
    """

    table: str
    name: str
    type: Any
    value: Any
    spec: SettingSpec

    @property
    def key(self) -> str:
        """Table and field, such as `draft.threads`."""
        return f"{self.table}.{self.name}"

    def check(self, value: Any, folder: Path) -> Any:
        """Return a value from TOML, the environment or the command line as the setting has it.

        Args:
            folder: directory that relative paths start at.

        Raises:
            InputError: it is wrong; the message follows the setting's name.
        """
        converted = validators.convert(value, self.type)
        return self.spec.validate(converted, folder) if self.spec.validate else converted

    @property
    def variable(self) -> str:
        """Environment variable, such as FLEXSPEC_DRAFT__THREADS."""
        return f"{ENVIRONMENT_PREFIX}{self.table}__{self.name}".upper()

    @property
    def default(self) -> str:
        """The default in words, or as in TOML."""
        if self.spec.default:
            return self.spec.default
        if isinstance(self.value, bool):
            return str(self.value).lower()
        return f"{self.value:g}" if isinstance(self.value, float) else str(self.value)


def _entries() -> list[SettingEntry]:
    entries = []
    for table in msgspec.structs.fields(Settings):
        for field in msgspec.structs.fields(table.type):
            spec = next(item for item in field.type.__metadata__ if isinstance(item, SettingSpec))
            value = None if field.default is msgspec.NODEFAULT else field.default
            entries.append(SettingEntry(table.name, field.name, field.type, value, spec))
    return entries


REMOVED_FEATURES = (
    RemovedFeature(
        "n-gram cache",
        ("draft.ngram_cache", "draft.ngram_cache_directory", "draft.memory", "draft.memory_directory"),
        ("--ngram-cache DIR", "--no-ngram-cache", "--memory DIR", "--no-memory"),
    ),
)
# All settings by key, in the order of the tables.
SETTINGS = {entry.key: entry for entry in _entries()}
TABLES: dict[str, type[SettingsTable]] = {field.name: field.type for field in msgspec.structs.fields(Settings)}
