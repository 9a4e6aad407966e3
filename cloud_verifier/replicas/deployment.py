"""Deploys several replicas of a verifier on Ray Serve, which starts, places, watches, scales and replaces them.

The death of a replica costs no token: its sessions are lost as evicted ones are, and boards reopen them elsewhere.
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
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.model.limits import VerifierLimits
from edge_runtime.common.http_server import ListenOptions
from edge_runtime.protocol.errors import InputError, TargetError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from cloud_verifier.api.app import VerifierService

log = logging.getLogger(__name__)

# Name of the Ray Serve application.
APPLICATION = "flexspec-verifier"
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
# The smallest object store that Ray accepts: replicas share nothing through it, messages are arguments of calls.
OBJECT_STORE_BYTES = 80 << 20
# How often the number of running replicas is read from Ray.
POLL_SECONDS = 1.0
# How often Ray checks the health of each replica.
HEALTH_SECONDS = 2.0
# How often a replica may fail to load at the start before that is an error.
LOAD_ATTEMPTS = 2
CONNECT_SECONDS = 5.0
# The last line of a Python traceback, up to the message.
EXCEPTION_LINE = re.compile(r"[\w.]+(Error|Exception): ")
# Scale up quickly when rounds wait, and down slowly: boards must reopen the sessions of a removed replica elsewhere.
UPSCALE_SECONDS, DOWNSCALE_SECONDS = 10.0, 300.0
# A session has at most one round, one sent ahead of its reply, and repetitions of both.
REQUESTS_PER_SESSION = 4


class ScalingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Number and resources of the replicas.

    Attributes:
        min_replicas, max_replicas: bounds of their number, which `target_rounds` decides.
        target_rounds: rounds that each replica should have, waiting ones included.
        cpus, gpus: resources of each replica.
        cluster: address of an existing Ray cluster; empty to start one on this machine.
    """

    min_replicas: int
    max_replicas: int
    target_rounds: int
    cpus: float
    gpus: float
    cluster: str


def serve_replicas(
    build_service: Callable[[], VerifierService],
    *,
    scaling: ScalingOptions,
    limits: VerifierLimits,
    listening: ListenOptions,
    authenticator: Authenticator,
    announce: Callable[[str], None],
    grace: float,
) -> None:
    """Serve until SIGINT or SIGTERM, as `server.serve` does.

    Args:
        build_service: builds a replica's service in its process; must be picklable.
        limits: of each replica.

    Raises:
        InputError: the Ray cluster does not exist, or lacks the resources for the replicas.
        FlexSpecError: the port is in use, or the target did not load.
    """
    import uvloop

    with _ray_cluster(scaling):
        from cloud_verifier.replicas.ingress import Ingress

        deployment = ReplicaDeployment(build_service, scaling, limits, grace)
        try:
            uvloop.run(serve(Ingress(deployment, limits, authenticator), listening, announce, grace))
        finally:
            deployment.delete()


class ReplicaDeployment:
    """The replicas of one Ray Serve application.

    Attributes:
        handle: Ray's handle for calls to the replicas; None until they are deployed.
        failure: why no replica came up.
        running: number of replicas that accept requests.
    """

    def __init__(
        self,
        build_service: Callable[[], VerifierService],
        scaling: ScalingOptions,
        limits: VerifierLimits,
        grace: float,
    ) -> None:
        """`grace` is how many seconds a replica that is removed has to finish its rounds."""
        self.handle: DeploymentHandle[Any] | None = None
        self.failure: BaseException | None = None
        self.running = 0
        self._build_service = build_service
        self._scaling = scaling
        self._limits = limits
        self._grace = grace

    def status(self) -> str:
        """One line about the number of replicas."""
        minimum, maximum = self._scaling.min_replicas, self._scaling.max_replicas
        return f"{self.running} replicas of {minimum if minimum == maximum else f'{minimum} to {maximum}'}"

    async def run(self) -> None:
        """Deploy the replicas and monitor their number until cancelled. Errors are recorded in `failure`."""
        was_running = False
        try:
            self.handle = await asyncio.to_thread(self._deploy)
            while True:
                running, message = await asyncio.to_thread(self._read_status)
                if message and not was_running:
                    raise TargetError(f"no replica came up: {message}")
                if running != self.running:
                    log.info("%d replicas are running", running)
                was_running, self.running = was_running or running > 0, running
                await asyncio.sleep(POLL_SECONDS)
        except Exception as error:
            log.debug("no replicas", exc_info=True)
            self.failure = error
            self.running = 0

    def delete(self) -> None:
        """Stop the replicas after they have finished their rounds."""
        from ray import serve

        with contextlib.suppress(Exception):
            serve.delete(APPLICATION)

    def _deploy(self) -> DeploymentHandle[Any]:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, RequestRouterConfig

        from cloud_verifier.replicas.replica import Replica

        scaling, max_requests = self._scaling, REQUESTS_PER_SESSION * self._limits.max_sessions
        deployment = serve.deployment(Replica).options(  # type: ignore[attr-defined]
            name="replica",
            # Each replica sheds load itself (see `engine.admission`); Ray's counts only drive the scaling.
            max_ongoing_requests=max_requests,
            max_queued_requests=max_requests,
            autoscaling_config=AutoscalingConfig(
                min_replicas=scaling.min_replicas,
                max_replicas=scaling.max_replicas,
                initial_replicas=scaling.min_replicas,
                target_ongoing_requests=scaling.target_rounds,
                upscale_delay_s=UPSCALE_SECONDS,
                downscale_delay_s=DOWNSCALE_SECONDS,
            ),
            request_router_config=RequestRouterConfig(
                request_router_class=ROUTER,  # type: ignore[arg-type]
                # The least possible: on any other replica the session is lost.
                request_router_kwargs={"num_fallback_replicas": 1},
            ),
            ray_actor_options={"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=max(1.0, self._grace),
            max_constructor_retry_count=LOAD_ATTEMPTS,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        # Ray's own proxy uses HTTP/1.1, which takes three times the bytes of our ingress per round.
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        application = serve.RunTarget(deployment.bind(self._build_service), name=APPLICATION, route_prefix=None)
        (handle,) = serve.run_many([application], wait_for_applications_running=False)
        return handle

    def _read_status(self) -> tuple[int, str]:
        """The number of running replicas, and, if Ray has given up on the deployment, the reason."""
        from ray import serve
        from ray.serve.schema import ApplicationStatus

        application = serve.status().applications.get(APPLICATION)
        if application is None or "replica" not in application.deployments:
            return 0, ""
        deployment = application.deployments["replica"]
        # The keys are members of a private enum of strings.
        running = deployment.replica_states.get("RUNNING", 0)  # type: ignore[call-overload]
        failed = application.status == ApplicationStatus.DEPLOY_FAILED
        return running, _error_message(deployment.message or application.message) if failed else ""


@contextlib.contextmanager
def _ray_cluster(scaling: ScalingOptions) -> Iterator[None]:
    """Connect to a Ray cluster, or start one that ends with this process. Raises InputError."""
    if scaling.cluster not in ("", "auto"):
        _check_reachable(scaling.cluster)
    # No usage statistics leave this machine, and our own cluster requires a random token. Ray reads these variables
    # when it is imported, so they must be set first.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not scaling.cluster:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # No colors: the log need not be a terminal.
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    import ray
    import ray.serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    log_options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    try:
        if scaling.cluster:
            ray.init(address=scaling.cluster, **log_options)
        else:
            # Claim as many CPUs as the replicas request, even if there are fewer: on a cluster of our own Ray must not
            # refuse replicas for lack of them.
            cpus = max(os.cpu_count() or 1, -int(-scaling.cpus * scaling.max_replicas // 1))
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **log_options,
            )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        problem = f"no Ray cluster at {scaling.cluster}" if scaling.cluster else "Ray did not start"
        raise InputError(f"{problem}: {error}") from None
    try:
        _check_resources(scaling, ray.cluster_resources())  # type: ignore[no-untyped-call]
        yield
    finally:
        ray.shutdown()


def _check_reachable(cluster: str) -> None:
    """Raises InputError if nothing listens at `cluster`. Ray itself would retry for minutes."""
    host, _, port = cluster.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster at {cluster} ({error}); give HOST:PORT of its head node, such as 10.0.0.1:6379, or auto"
        ) from None


def _check_resources(scaling: ScalingOptions, available: dict[str, float]) -> None:
    for name, per_replica in (("CPU", scaling.cpus), ("GPU", scaling.gpus)):
        needed, present = per_replica * scaling.min_replicas, available.get(name, 0)
        if needed > present:
            raise InputError(
                f"{scaling.min_replicas} replicas need {needed:g} {name}s, and Ray has {present:g}: "
                "reduce --replicas, or add machines to the cluster"
            )


def _error_message(report: str) -> str:
    """The message of the last exception in Ray's report of a failure."""
    lines = [line.strip() for line in report.splitlines() if line.strip()] or ["Ray gives no reason"]
    last = next((line for line in reversed(lines) if EXCEPTION_LINE.match(line)), lines[-1])
    return EXCEPTION_LINE.sub("", last)
