"""How well drafts do with targets, and what evolution costs a frozen one: the evaluation that tables are made of.

    evaluation = evaluate(
        {"anchor": TorchProposer(draft), "bundle": OnnxProposer(OnnxDraft.load(path))},  # anything that is a `Draft`
        {"target-v1": model, "target-v2": lambda: load_evolved(...)},  # models, or what loads one when its turn comes
        {"python": ids, "cpp": ids},                                   # held-out text: token ids by name
        retrained={"target-v2": TorchProposer(other)},                 # drafts made anew for a version
        order=Order(texts=96),
        scene=Scene("raspberry-pi-5"),
    )
    evaluation.record()       # plain data, for JSON
    markdown(evaluation)      # tables, see `report`
    draw(evaluation, path)    # PNG

Every draft meets every version at every temperature on two kinds of text. `own`: what the target itself goes on to
write behind a piece of held-out text, which is what a board sees. `given`: the held-out text goes on as it is, and at
every position the target is asked what it would say there; rounds are then those of a draft whose acceptance falls so,
for a given text itself is nobody's proposal. Tokens are chosen with the board's noise (`contract.coupling`), so a guess
is accepted iff it is the target's token.

Positions that only repeat what stands before them (`loops`) are counted apart, for they flatter every draft:
all figures are without them unless they say so. Retention is a draft's acceptance over that of the retrained draft of
that version. Intervals are 95 % of a bootstrap over texts (`cloud_verifier.acceptance.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cloud_verifier.acceptance.bootstrap import Bootstrap, Interval
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling
from export.common.progress import Progress
from export.evaluate.proposers import Draft, Guesses, Passage, Writer
from export.evaluate.speeds import Scene, Speed, speed
from export.evaluate.traces import Trace

FORMAT = 1
OWN, GIVEN = "own", "given"
# What the draft that was made anew for a version is called in its rows.
RETRAINED = "retrained"
LONGEST_DRAFT = 16

# A model, or what loads one.
Target = torch.nn.Module | Callable[[], Any]


@dataclass(frozen=True)
class Order:
    """How much to measure, and how.

    Attributes:
        texts: pieces of text, spread evenly over what is given.
        prompt: tokens of each that are read and not judged.
        tokens: that are judged, or written by the target.
        temperatures, kinds: of which text is made.
        lengths: K, tokens drafted in a round.
        siblings: alternatives beside each of them, where rounds have any.
        seed: text i is sampled with seed + i; and of the bootstrap.
        resamples: of the bootstrap.
    """

    texts: int = 48
    prompt: int = 64
    tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    kinds: tuple[str, ...] = (OWN, GIVEN)
    lengths: tuple[int, ...] = (2, 4, 8, 16)
    siblings: int = 3
    seed: int = 0
    resamples: int = 2000

    def __post_init__(self) -> None:
        if self.texts < 2:
            raise InputError(f"{self.texts} texts say nothing of chance: evaluate on at least 2, better on 48 or more")
        if self.prompt < 1 or self.tokens < LONGEST_DRAFT:
            raise InputError(
                f"a text needs a prompt of at least 1 token and {LONGEST_DRAFT} behind it, "
                f"not {self.prompt} and {self.tokens}"
            )
        for temperature in self.temperatures:
            try:
                Sampling(temperature=temperature)
            except ValueError as error:
                raise InputError(f"temperature {temperature:g}: {error}") from None


@dataclass(frozen=True)
class Row:
    """One draft with one version at one temperature on one kind of text. Shares and counts are means over positions.

    Attributes:
        positions: judged, loops included.
        acceptance: share of guesses that are the target's token.
        looped: share of positions in loops.
        looped_acceptance: of guesses there; None without loops.
        overall_acceptance: of all guesses, loops and all.
        by_text: acceptance by the name of the text.
        survival: for k = 1 to LONGEST_DRAFT, the share of drafts whose first k tokens are all accepted.
        tokens_per_round: by plan: `K=4`, or `K=4 +3` with three siblings beside each token.
        retention: acceptance over the retrained draft's; None where there is none.
        overall_retention: the same with loops.
        speed: on a board; None where none was asked for.
    """

    draft: str
    version: str
    temperature: float
    kind: str
    positions: int
    acceptance: Interval | None
    looped: float
    looped_acceptance: Interval | None
    overall_acceptance: Interval | None
    by_text: dict[str, Interval | None]
    survival: list[Interval | None]
    tokens_per_round: dict[str, Interval | None]
    retention: Interval | None = None
    overall_retention: Interval | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        order: what was asked for.
        texts: pieces evaluated, by the name of the text that they are from.
        rows: by version, kind, temperature and draft, in the order in which these were given.
    """

    order: Order
    texts: dict[str, int]
    rows: list[Row] = field(default_factory=list)

    def row(self, draft: str, version: str, temperature: float = 0.0, kind: str = OWN) -> Row:
        """One row. Raises KeyError."""
        wanted = (draft, version, temperature, kind)
        for row in self.rows:
            if (row.draft, row.version, row.temperature, row.kind) == wanted:
                return row
        raise KeyError(wanted)

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {"format": FORMAT, **asdict(self), "torch": torch.__version__}


def evaluate(
    drafts: Mapping[str, Draft],
    targets: Mapping[str, Target],
    text: Mapping[str, Sequence[int]],
    *,
    retrained: Mapping[str, Draft] | None = None,
    order: Order | None = None,
    scene: Scene | None = None,
) -> Evaluation:
    """Measures every draft, and the retrained ones, with every target; see the module.

    Args:
        drafts: by name.
        targets: by the version's name; models in eval mode on any device.
        text: token ids by name, any sequence of integers: lists, arrays, tensors.
        retrained: by version.
        scene: where speed is modelled for; None models none.

    Raises:
        InputError: a text is too short, a name is unknown, or vocabularies differ.
        DraftError, TargetError: as drafts and loaders raise them.
    """
    order, retrained = order or Order(), retrained or {}
    for version in retrained:
        if version not in targets:
            raise InputError(f"a retrained draft for {version!r}, which is not evaluated: {_those(targets)}")
    if RETRAINED in drafts or not drafts or not targets:
        raise InputError(f"evaluate at least one draft, not called {RETRAINED!r}, and one target")
    pieces = _pieces(text, order)
    names = [name for name, _ in pieces]
    evaluation = Evaluation(order, {name: names.count(name) for name in text})
    bootstrap = Bootstrap(order.resamples, order.seed)
    steps = sum(len(drafts) + (version in retrained) for version in targets)
    done = 0
    with Progress("evaluation", steps * len(order.kinds) * len(order.temperatures)) as progress:
        for version, target in targets.items():
            writer = Writer(target if isinstance(target, torch.nn.Module) else target())
            contestants = dict(drafts) | ({RETRAINED: retrained[version]} if version in retrained else {})
            for name, draft in contestants.items():
                _check_sizes(name, draft, version, writer, order)
            for kind, passages, truths in _judged(writer, [ids for _, ids in pieces], order):
                traces = {}
                for name, draft in contestants.items():
                    draft.begin(version)
                    traces[name] = _follow(passages, truths, draft.guess(passages))
                    done += 1
                    progress.update(done, f"{version} {kind} T={passages[0].sampling.temperature:g} {name}")
                for name, draft in contestants.items():
                    row = _row(name, version, kind, order, names, traces, bootstrap)
                    if scene is not None and kind == OWN:
                        row = _with_speed(row, scene, draft, traces[name], order, bootstrap)
                    evaluation.rows.append(row)
    return evaluation


def _pieces(text: Mapping[str, Sequence[int]], order: Order) -> list[tuple[str, list[int]]]:
    """Which pieces of which text are evaluated: (name, ids), the texts in turn, each from end to end."""
    length = order.prompt + order.tokens
    share = max(1, -(-order.texts // max(1, len(text))))
    columns = []
    for name, ids in text.items():
        whole = len(ids) // length
        if not whole:
            raise InputError(
                f"the text {name!r} has {len(ids)} tokens, and a piece takes {length} ({order.prompt} to read and "
                f"{order.tokens} to judge): give more text, or ask for shorter pieces"
            )
        places = np.unique(np.linspace(0, whole - 1, min(share, whole)).round().astype(int))
        # On the host, whatever kind of sequence it is.
        columns.append(
            [(name, np.asarray(_host(ids[p * length : (p + 1) * length])).tolist()) for p in places.tolist()]
        )
    longest = max(map(len, columns), default=0)
    pieces = [column[i] for i in range(longest) for column in columns if i < len(column)][: order.texts]
    if len(pieces) < 2:
        raise InputError(f"the text is too short: it has {len(pieces)} piece of {length} tokens, and chance takes 2")
    return pieces


def _host(ids: Sequence[int]) -> list[int]:
    """Plain numbers, whatever kind of sequence it is and wherever."""
    found: list[int] = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids).tolist()
    return found


def _judged(
    writer: Writer, pieces: list[list[int]], order: Order
) -> Iterator[tuple[str, list[Passage], list[list[int]]]]:
    """The passages of each kind and temperature, and the target's tokens at their judged positions."""
    for kind in order.kinds:
        for temperature in order.temperatures:
            samplings = [Sampling(temperature=temperature, seed=order.seed + i) for i in range(len(pieces))]
            if kind == OWN:
                prompts = [ids[: order.prompt] for ids in pieces]
                truths = writer.write(prompts, samplings, order.tokens)
                texts = [prompt + new for prompt, new in zip(prompts, truths, strict=True)]
            else:
                texts, truths = pieces, []
            passages = [Passage(ids, order.prompt, sampling) for ids, sampling in zip(texts, samplings, strict=True)]
            yield kind, passages, truths or writer.choices(passages)


def _follow(passages: list[Passage], truths: list[list[int]], guesses: list[Guesses]) -> list[Trace]:
    return [Trace.of(*parts) for parts in zip(passages, truths, guesses, strict=True)]


def _row(
    draft: str,
    version: str,
    kind: str,
    order: Order,
    names: list[str],
    traces: Mapping[str, list[Trace]],
    bootstrap: Bootstrap,
) -> Row:
    """What the traces of `draft` come to."""
    own = traces[draft]
    counts = [trace.accepted() for trace in own]
    inside = [trace.accepted(looped=True) for trace in own]
    overall = [(a + b, c + d) for (a, c), (b, d) in zip(counts, inside, strict=True)]
    positions = sum(total for _, total in overall)
    surviving = [trace.surviving(LONGEST_DRAFT) for trace in own]
    rounds = {
        f"K={length}" + f" +{siblings}" * bool(siblings): bootstrap.ratio(
            [trace.round_tokens(length, siblings) for trace in own]
        )
        for siblings in dict.fromkeys((0, order.siblings))
        for length in order.lengths
    }
    others = [trace.accepted() for trace in traces.get(RETRAINED, [])]
    others_inside = [trace.accepted(looped=True) for trace in traces.get(RETRAINED, [])]
    others_overall = [(a + b, c + d) for (a, c), (b, d) in zip(others, others_inside, strict=True)]
    compared = bool(others) and draft != RETRAINED
    return Row(
        draft,
        version,
        own[0].passage.sampling.temperature,
        kind,
        positions,
        bootstrap.ratio(counts),
        round(sum(total for _, total in inside) / positions, 5),
        bootstrap.ratio(inside),
        bootstrap.ratio(overall),
        {
            name: bootstrap.ratio([count for count, its in zip(counts, names, strict=True) if its == name])
            for name in dict.fromkeys(names)
        },
        [bootstrap.ratio([text[k] for text in surviving]) for k in range(LONGEST_DRAFT)],
        rounds,
        bootstrap.of_ratios(counts, others) if compared else None,
        bootstrap.of_ratios(overall, others_overall) if compared else None,
    )


def _with_speed(row: Row, scene: Scene, draft: Draft, traces: list[Trace], order: Order, bootstrap: Bootstrap) -> Row:
    texts = [text for trace in traces if (text := trace.recorded(row.version)) is not None]
    return replace(row, speed=speed(scene, draft, texts, order.lengths, order.siblings, bootstrap))


def _check_sizes(name: str, draft: Draft, version: str, writer: Writer, order: Order) -> None:
    if draft.vocabulary_size != writer.vocabulary_size:
        raise InputError(
            f"draft {name!r} knows {draft.vocabulary_size} ids and target {version!r} {writer.vocabulary_size}: "
            "they do not have one tokenizer"
        )
    length = order.prompt + order.tokens
    if length > min(draft.context, writer.context):
        raise InputError(
            f"pieces of {length} tokens are longer than the context of draft {name!r} ({draft.context}) or target "
            f"{version!r} ({writer.context}): ask for shorter ones"
        )


def _those(targets: Mapping[str, object]) -> str:
    return f"those evaluated are {', '.join(targets)}"
