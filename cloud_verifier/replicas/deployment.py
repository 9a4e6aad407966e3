"""Several replicas of a verifier on Ray Serve: how many there are, where, and what becomes of one that dies is Ray's.

A replica's death costs no token: its sessions are lost as evicted ones are, and boards open them again elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from cloud_verifier.api.server import serve
from cloud_verifier.engine.auth import Doors
from cloud_verifier.model.limits import VerifierLimits
from edge_runtime.common.http_server import Listening
from edge_runtime.protocol.errors import InputError, TargetError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from cloud_verifier.api.app import Service

log = logging.getLogger(__name__)

ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
# Replicas share nothing through Ray's object store: messages travel inside calls. This is the least that Ray takes.
OBJECT_STORE_BYTES = 80 << 20
# Between looks at the replicas; and between Ray's, at whether each of them is well.
LOOK_SECONDS = 1.0
HEALTH_SECONDS = 2.0
# How often the first replicas may fail to load before that is an error.
LOAD_ATTEMPTS = 2
# To reach a cluster.
CONNECT_SECONDS = 5.0
# What a trace calls an error, in its last line.
RAISED = re.compile(r"[\w.]+(Error|Exception): ")
# Replicas come quickly when rounds wait, and go slowly: each one that goes has its sessions opened again elsewhere.
UPSCALE_SECONDS, DOWNSCALE_SECONDS = 10.0, 300.0
# A session has at most a round, one sent ahead of its answer, and repetitions of both.
REQUESTS_PER_SESSION = 4


class Scaling(msgspec.Struct, frozen=True):
    """How many replicas, and of what.

    Attributes:
        fewest, most: replicas; between them, as many as `rounds` says.
        rounds: that a replica should have at once, waiting ones included.
        cpus, gpus: of each replica.
        cluster: address of a Ray cluster that is there; empty for one of this process's own, on this machine.
        name: of the application in the cluster.
        upscale_seconds, downscale_seconds: that there have to be too many rounds, or too few.
    """

    fewest: int
    most: int
    rounds: int = 16
    cpus: float = 1.0
    gpus: float = 0.0
    cluster: str = ""
    name: str = "flexspec-verifier"
    upscale_seconds: float = UPSCALE_SECONDS
    downscale_seconds: float = DOWNSCALE_SECONDS


def serve_replicas(
    build: Callable[[], Service],
    scaling: Scaling,
    limits: VerifierLimits,
    listening: Listening,
    doors: Doors,
    announce: Callable[[str], None],
    grace: float,
) -> None:
    """Serves until SIGINT or SIGTERM, as `server.serve` does.

    Args:
        build: makes a replica's service, in its process; it must be picklable.
        limits: of each replica.

    Raises:
        InputError: there is no such cluster, or it does not have what the replicas need.
        FlexSpecError: the port is taken, or the target did not load.
    """
    import uvloop

    with _ray(scaling):
        from cloud_verifier.replicas.ingress import Ingress

        fleet = Fleet(build, scaling, limits, grace)
        try:
            uvloop.run(serve(Ingress(fleet, limits, doors), listening, announce, grace))
        finally:
            fleet.remove()


class Fleet:
    """The replicas of one application.

    Attributes:
        handle: the way to them, once Ray knows of them.
        failure: why the first of them did not load.
        running: how many there are that can be asked.
    """

    def __init__(self, build: Callable[[], Service], scaling: Scaling, limits: VerifierLimits, grace: float) -> None:
        """`grace`: seconds that a replica has, when it is to go, for the rounds that it plays."""
        self.handle: DeploymentHandle[Any] | None = None
        self.failure: BaseException | None = None
        self.running = 0
        self._build = build
        self._scaling = scaling
        self._limits = limits
        self._grace = grace

    def status(self) -> str:
        """How many there are, in a line."""
        least, most = self._scaling.fewest, self._scaling.most
        return f"{self.running} replicas of {least if least == most else f'{least} to {most}'}"

    async def run(self) -> None:
        """Brings the replicas up, and looks after their number until cancelled."""
        ready = False
        try:
            self.handle = await asyncio.to_thread(self._deploy)
            while True:
                running, message = await asyncio.to_thread(self._look)
                if message and not ready:
                    raise TargetError(f"no replica came up: {message}")
                if running != self.running:
                    log.info("%d replicas are up", running)
                ready, self.running = ready or running > 0, running
                await asyncio.sleep(LOOK_SECONDS)
        except Exception as error:
            log.debug("no replicas", exc_info=True)
            self.failure = error
            self.running = 0

    def remove(self) -> None:
        """Ends the replicas, once they have ended their rounds."""
        from ray import serve

        with contextlib.suppress(Exception):
            serve.delete(self._scaling.name)

    def _deploy(self) -> DeploymentHandle[Any]:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, RequestRouterConfig

        from cloud_verifier.replicas.replica import Replica

        scaling, requests = self._scaling, REQUESTS_PER_SESSION * self._limits.max_sessions
        deployment = serve.deployment(Replica).options(  # type: ignore[attr-defined]
            name="replica",
            # Each keeps its own door to overload shut, see `inflight`; what Ray counts is only to grow by.
            max_ongoing_requests=requests,
            max_queued_requests=requests,
            autoscaling_config=AutoscalingConfig(
                min_replicas=scaling.fewest,
                max_replicas=scaling.most,
                initial_replicas=scaling.fewest,
                target_ongoing_requests=scaling.rounds,
                upscale_delay_s=scaling.upscale_seconds,
                downscale_delay_s=scaling.downscale_seconds,
            ),
            request_router_config=RequestRouterConfig(
                request_router_class=ROUTER,
                # To another replica a session is a lost one.
                request_router_kwargs={"num_fallback_replicas": 1},
            ),
            ray_actor_options={"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=max(1.0, self._grace),
            max_constructor_retry_count=LOAD_ATTEMPTS,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        # Ray's own door would speak HTTP/1.1: three times the bytes of ours in every round.
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        application = serve.RunTarget(deployment.bind(self._build), name=scaling.name, route_prefix=None)
        (handle,) = serve.run_many([application], wait_for_applications_running=False)
        return handle

    def _look(self) -> tuple[int, str]:
        """How many replicas are up, and, where Ray has given up on them, why."""
        from ray import serve
        from ray.serve.schema import ApplicationStatus

        application = serve.status().applications.get(self._scaling.name)
        if application is None or "replica" not in application.deployments:
            return 0, ""
        deployment = application.deployments["replica"]
        running = deployment.replica_states.get("RUNNING", 0)
        failed = application.status == ApplicationStatus.DEPLOY_FAILED
        return running, _cause(deployment.message or application.message) if failed else ""


@contextlib.contextmanager
def _ray(scaling: Scaling) -> Iterator[None]:
    """Connected to a Ray cluster, or with one of this process's own, which ends with it. Raises InputError."""
    if scaling.cluster not in ("", "auto"):
        _check_reachable(scaling.cluster)
    # Nothing about this machine goes to anybody; and nobody gets in who does not know the token.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not scaling.cluster:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Colours are for terminals, and the log may be anything.
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise InputError(f"replicas need Ray Serve ({error}): pip install 'flexspec[scale]'") from None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    try:
        if scaling.cluster:
            ray.init(address=scaling.cluster, **quiet)
        else:
            # So many processors as are asked for: how to share them is not Ray's to decide on a machine of its own.
            wanted = max(os.cpu_count() or 1, -int(-scaling.cpus * scaling.most // 1))
            ray.init(
                address="local",
                num_cpus=wanted,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"no Ray cluster at {scaling.cluster}" if scaling.cluster else "Ray did not start"
        raise InputError(f"{where}: {error}") from None
    try:
        _check_resources(scaling, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def _check_reachable(cluster: str) -> None:
    """Raises InputError: Ray itself would try for minutes."""
    host, _, port = cluster.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster at {cluster} ({error}); give HOST:PORT of its head, such as 10.0.0.1:6379, or auto"
        ) from None


def _check_resources(scaling: Scaling, there: dict[str, float]) -> None:
    for name, each in (("CPU", scaling.cpus), ("GPU", scaling.gpus)):
        needed, present = each * scaling.fewest, there.get(name, 0)
        if needed > present:
            raise InputError(
                f"{scaling.fewest} replicas need {needed:g} {name}s, and Ray has {present:g}: "
                "give --replicas fewer, or add machines to the cluster"
            )


def _cause(message: str) -> str:
    """What failed, of Ray's account of it: what the last line of a trace says."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["Ray does not say why"]
    last = next((line for line in reversed(lines) if RAISED.match(line)), lines[-1])
    return RAISED.sub("", last)
