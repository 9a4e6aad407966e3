"""What all tests stand on: real models, real servers, nothing mocked."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib.util
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import certifi
import pytest
from hypothesis import HealthCheck, settings

from edge_runtime.common import http_server, logs
from edge_runtime.common.files import write_atomically
from edge_runtime.common.http_server import ListenOptions
from tests.event_loop_watchdog import watch_event_loops
from tests.toy_family import FAMILY

if TYPE_CHECKING:
    from cloud_verifier.api.app import VerifierLimits
    from cloud_verifier.api.server import VerifierServer
    from cloud_verifier.engine.auth import Authenticator
    from cloud_verifier.model.target import Target

# Fixtures that are defined elsewhere.
__all__ = ["watch_event_loops"]


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Undo what a command that ran in the process of a test configured."""
    packages = [logging.getLogger(name) for name in ("", *logs.PACKAGES)]
    before = [(logger, logger.level, logger.handlers[:]) for logger in packages]
    prompts = logs._prompts
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
    logs._prompts = prompts


# Tests run in parallel, one process per core; a process that took all cores would only wait for the others. Programs
# under test inherit it: threads of OpenMP that wait for work spin, which doubles what a verifier uses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ComputeOnce = Callable[[str, Callable[[], bytes]], bytes]

# Recorded acceptance of the example family, on which simulations run.
TRACES = Path(__file__).resolve().parents[1] / "export" / "example_family" / "acceptance.npz"

# The board's tests run without PyTorch, too (`make test-arm`); fixtures that need it then skip their tests.
if importlib.util.find_spec("torch"):
    import torch
    from transformers.utils import logging as transformers_logging

    # transformers logs to the standard error of its first use: here, not to one that a test captures and closes.
    transformers_logging.get_verbosity()
    torch.set_num_threads(1)

# A shell starts background jobs with SIGINT ignored, and children inherit that; Ctrl-C must end programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test fails because the machine is busy, so examples have no time limit. Fixtures that examples share are meant so.
settings.register_profile(
    "flexspec", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
# For `make test-quick`: a few examples where a test does not say how many it needs.
settings.register_profile("quick", settings.get_profile("flexspec"), max_examples=10)
settings.load_profile("flexspec")


# What programs keep between runs must neither come from, nor end up in, the home of whoever runs the tests.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="flexspec-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

# Every HTTP client reads the authorities that it trusts, the system's for 30 ms. No test talks to anyone whom they
# certify, so that one of them will do.
AUTHORITY = Path(os.environ["XDG_STATE_HOME"], "authority.pem")
AUTHORITY.write_text("".join(certifi.contents().partition("-----END CERTIFICATE-----")[:2]))
os.environ["SSL_CERT_FILE"] = str(AUTHORITY)

# Internal errors of pytest's worker processes, which inherit the variable.
INTERNAL_ERRORS = Path(os.environ.setdefault("FLEXSPEC_INTERNAL_ERRORS", tempfile.mktemp(prefix="flexspec-pytest-")))


def pytest_internalerror(excrepr: object) -> None:
    """Keep a worker's internal error: the tests that it had left are not run, and the report shows it in the middle."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        with INTERNAL_ERRORS.open("a", errors="backslashreplace") as file:
            file.write(f"{excrepr}\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Make captured logs encodable: one half of a surrogate pair, which JSON can express, would end the worker."""
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]


def pytest_unconfigure() -> None:
    """Print internal errors of workers at the end of the report."""
    if not os.environ.get("PYTEST_XDIST_WORKER") and INTERNAL_ERRORS.exists():
        print(f"pytest itself failed in a worker:\n{INTERNAL_ERRORS.read_text()[-2000:]}")
        INTERNAL_ERRORS.unlink()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where nothing may be lacking (`.ci/run`), a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FLEXSPEC_NO_SKIPS") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the modules with slow tests first: at the end of a parallel run, quick ones keep all processes busy."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Spare the garbage collector the objects of imported modules, over which it spent half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def short_grace() -> Iterator[None]:
    """Let servers in this process stop without waiting for connections that clients keep alive."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_server, "GRACE_SECONDS", 0.2)
        yield


@pytest.fixture(scope="session")
def compute_once(tmp_path_factory: pytest.TempPathFactory) -> ComputeOnce:
    """`compute_once(name, compute)`: the result of `compute()`, which one process of a parallel run computes."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    directory.mkdir(exist_ok=True)

    def get(name: str, compute: Callable[[], bytes]) -> bytes:
        path = directory / name
        with (directory / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                write_atomically(path, compute())
        return path.read_bytes()

    return get


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block Llama with a vocabulary of 300, as a Hugging Face directory."""
    pytest.importorskip("torch")
    from tests.models import save_target

    return save_target(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Target:
    return load_target(tiny_path)


@pytest.fixture(scope="session")
def family() -> Path:
    """The toy family: target-v1 to target-v4, draft-anchor, bundle."""
    return FAMILY


@pytest.fixture(scope="module")
def toy_bundle() -> Iterator[Path]:
    """The bundle of the toy family, which commands without `--bundle` use during a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXSPEC_BUNDLE", str(FAMILY / "bundle"))
        yield FAMILY / "bundle"


@pytest.fixture(scope="session")
def target_v1(family: Path) -> Target:
    return load_target(family / "target-v1")


def load_target(path: Path) -> Target:
    """Load a target in float32 on the CPU; skip the test if there is no PyTorch."""
    pytest.importorskip("torch")
    from cloud_verifier.model.target import Target

    return Target(path, device="cpu", dtype=torch.float32)


@contextlib.asynccontextmanager
async def serving(
    target: Target,
    limits: VerifierLimits | None = None,
    authenticator: Authenticator | None = None,
    **listening: object,
) -> AsyncIterator[VerifierServer]:
    """A real verifier on a free port of loopback, in this process; see `VerifierServer.url`."""
    from cloud_verifier.api.app import VerifierLimits, VerifierService
    from cloud_verifier.api.server import VerifierServer

    service = VerifierService(lambda: target, limits or VerifierLimits(), authenticator=authenticator)
    server = VerifierServer(service, ListenOptions(**{"port": 0, **listening}))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
