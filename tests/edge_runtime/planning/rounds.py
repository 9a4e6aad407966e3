"""Rounds made up for tests of what learns from them."""

from __future__ import annotations

from hypothesis import strategies as st

from edge_runtime.planning.plan import UNNAMED, Conditions, Outcome, Plan, Surroundings


def make_outcome(
    confidences: list[float],
    accepted: int,
    *,
    own: int = 1,
    asked: int = 1,
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
    each: float = 0.02,
    overhead: float = 0.003,
) -> Outcome:
    """A round without noise: `each` for every own token beyond the first."""
    further = max(0, own - 1) if asked > 1 else 0
    first = overhead + link + forward
    drafted = len(confidences)
    return Outcome(
        Plan(drafted, asked, siblings=siblings),
        Conditions(left, 50, unread, now=now, version=version, temperature=temperature),
        accepted,
        own,
        confidences,
        [siblings] * drafted,
        sibling,
        draft_seconds=step * drafted,
        first_seconds=first,
        exchange_seconds=first + further * each,
        forward_seconds=forward + further * each,
        sent=80,
        received=80,
    )


def outcomes() -> st.SearchStrategy[Outcome]:
    """Anything that a round could come to."""
    seconds = st.floats(0.0, 1e3)

    @st.composite
    def draw(draw: st.DrawFn) -> Outcome:
        confidences = draw(st.lists(st.floats(0.0, 1.0), max_size=24))
        drafted = len(confidences)
        accepted = draw(st.integers(0, drafted))
        offered = draw(st.lists(st.integers(0, 7), min_size=drafted, max_size=drafted))
        sibling = draw(st.integers(0, offered[accepted])) if accepted < drafted else 0
        asked = draw(st.sampled_from((1, 1, 2, 30)))
        siblings = draw(st.integers(0, 7))
        seen = st.tuples(st.floats(0.0, 1.0), st.sampled_from((0, 0, 1, 7, UNNAMED)))
        return Outcome(
            Plan(drafted, asked, siblings=siblings, ahead=draw(st.integers(0, 3)) if asked == 1 else 0),
            draw(conditions()),
            accepted,
            draw(st.integers(1, asked + (sibling > 0))),
            confidences,
            offered,
            sibling,
            draw(st.integers(0, drafted)),
            *(draw(seconds) for _ in range(5)),
            draw(st.integers(0, 100_000)),
            draw(st.integers(0, 100_000)),
            draw(st.booleans()),
            ahead_seconds=draw(seconds),
            watched=[] if drafted else draw(st.lists(seen, max_size=asked)),
        )

    return draw()


def conditions() -> st.SearchStrategy[Conditions]:
    """Anything that a planner may be told."""
    maybe = st.none() | st.floats(0.0, 1e5)
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
            rtt_seconds=maybe,
            joules_left=maybe,
            watts=maybe,
            on_battery=st.none() | st.booleans(),
            throttled=st.none() | st.booleans(),
            celsius=maybe,
            metered=st.none() | st.booleans(),
        ),
    )
