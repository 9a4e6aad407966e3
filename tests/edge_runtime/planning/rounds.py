"""Synthetic rounds for tests of estimators and planners."""

from __future__ import annotations

from hypothesis import strategies as st

from edge_runtime.planning.plan import UNRANKED, Conditions, Outcome, Plan, Surroundings


def make_outcome(
    confidences: list[float],
    accepted: int,
    *,
    own: int = 1,
    planned_own: int = 1,
    siblings: int = 0,
    sibling: int = 0,
    step: float = 0.01,
    link: float = 0.05,
    forward: float = 0.02,
    now: float = 0.0,
    left: int = 100,
    unread: int = 1,
    version: str = "v1",
    temperature: float = 0.0,
    own_seconds: float = 0.02,
    overhead: float = 0.003,
) -> Outcome:
    """Return a round without noise: `own_seconds` is the time per own token after the first."""
    further = max(0, own - 1) if planned_own > 1 else 0
    first = overhead + link + forward
    drafted = len(confidences)
    return Outcome(
        plan=Plan(drafted, planned_own, siblings=siblings),
        conditions=Conditions(left, 50, unread, now=now, version=version, temperature=temperature),
        accepted=accepted,
        own_tokens=own,
        confidences=confidences,
        offered=[siblings] * drafted,
        sibling=sibling,
        draft_seconds=step * drafted,
        first_seconds=first,
        exchange_seconds=first + further * own_seconds,
        forward_seconds=forward + further * own_seconds,
        sent=80,
        received=80,
    )


def outcomes() -> st.SearchStrategy[Outcome]:
    """Return a strategy of arbitrary valid outcomes."""
    seconds = st.floats(0.0, 1e3)

    @st.composite
    def draw(draw: st.DrawFn) -> Outcome:
        confidences = draw(st.lists(st.floats(0.0, 1.0), max_size=24))
        drafted = len(confidences)
        accepted = draw(st.integers(0, drafted))
        offered = draw(st.lists(st.integers(0, 7), min_size=drafted, max_size=drafted))
        sibling = draw(st.integers(0, offered[accepted])) if accepted < drafted else 0
        planned_own = draw(st.sampled_from((1, 1, 2, 30)))
        siblings = draw(st.integers(0, 7))
        ahead = draw(st.integers(0, 3)) if planned_own == 1 else 0
        guesses = st.tuples(st.floats(0.0, 1.0), st.sampled_from((0, 0, 1, 7, UNRANKED)))
        return Outcome(
            plan=Plan(drafted, planned_own, siblings=siblings, draft_ahead=ahead),
            conditions=draw(conditions()),
            accepted=accepted,
            own_tokens=draw(st.integers(1, planned_own + (sibling > 0))),
            confidences=confidences,
            offered=offered,
            sibling=sibling,
            ready=draw(st.integers(0, drafted)),
            draft_seconds=draw(seconds),
            first_seconds=draw(seconds),
            exchange_seconds=draw(seconds),
            queue_seconds=draw(seconds),
            forward_seconds=draw(seconds),
            sent=draw(st.integers(0, 100_000)),
            received=draw(st.integers(0, 100_000)),
            repeated=draw(st.booleans()),
            ahead_seconds=draw(seconds),
            shadow_guesses=[] if drafted else draw(st.lists(guesses, max_size=planned_own)),
        )

    return draw()


def conditions() -> st.SearchStrategy[Conditions]:
    """Return a strategy of arbitrary valid conditions."""
    optional = st.none() | st.floats(0.0, 1e5)
    return st.builds(
        Conditions,
        left=st.integers(1, 4000),
        position=st.integers(1, 100_000),
        unread=st.integers(0, 100_000),
        ready=st.integers(0, 16),
        now=st.floats(0.0, 1e6),
        version=st.sampled_from(("", "v1", "v2")),
        temperature=st.sampled_from((0.0, 0.3, 0.7, 1.0, 2.0)),
        surroundings=st.builds(
            Surroundings,
            rtt_seconds=optional,
            joules_left=optional,
            watts=optional,
            on_battery=st.none() | st.booleans(),
            throttled=st.none() | st.booleans(),
            celsius=optional,
            metered=st.none() | st.booleans(),
        ),
    )
