"""The client side of the verifier: endpoints, sessions, retries and the diagnosis of link faults."""

from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.link_faults import HINTS, Fault, LinkState
from edge_runtime.verifier.link_monitor import LinkMonitor
from edge_runtime.verifier.session import EarlyRound, RoundUpdate, VerifierSession

__all__ = [
    "HINTS",
    "EarlyRound",
    "Fault",
    "LinkMonitor",
    "LinkState",
    "RoundUpdate",
    "VerifierClient",
    "VerifierSession",
]
