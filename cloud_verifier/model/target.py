"""One target model: a Hugging Face directory, loaded by transformers, that scores a token tree in one forward."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from cloud_verifier.model import attention
from cloud_verifier.model.batch import Piece
from cloud_verifier.model.kv_cache import Pool, Text
from cloud_verifier.model.lora import Pairs, is_plain
from cloud_verifier.model.rollback import forgetless_layers, sliding_window
from cloud_verifier.model.runner import Chosen, Runner
from cloud_verifier.model.tree import Tree
from cloud_verifier.registry.checkpoint import (
    base_of,
    check_whole,
    config_of,
    shared_fingerprints,
    tokenizer_of,
    version_hash,
    vocabulary_of,
)
from cloud_verifier.registry.delta import CHANGES, put_changes
from edge_runtime.protocol.bundle import shared_identity
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.sampling import Sampling

if TYPE_CHECKING:
    from cloud_verifier.model.tensor_parallel import Team

log = logging.getLogger(__name__)

GREEDY = Sampling()

# Of the pool that the self-test needs: a few pages, on any device.
SELF_TEST_TOKENS = 512

# transformers loads one model at a time: what it switches while it does, it switches for all threads.
_LOADING = threading.Lock()

# Largest difference of a logit, relative to the largest, that the self-test takes for rounding.
SELF_TEST_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class Target:
    """A loaded target.

    Attributes:
        name: the directory's name.
        version: `name@hash`, the hash covering every file that can change an answer.
        vocabulary: hash of the tokenizer's vocabulary, comparable with a bundle's.
        vocabulary_size: number of logits.
        end_ids: tokens that end a text.
        context: longest text in tokens.
        runner: the model, which versions that are adapters to one base share.
        adapter: slot of the version's adapter there; 0 is none.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        dtype: torch.dtype,
        context: int | None = None,
        name: str = "",
        exact: bool = False,
        compiled: bool = False,
        team: Team | None = None,
        beside: Sequence[Target] | None = None,
    ) -> None:
        """Loads the checkpoint or PEFT adapter at `path`.

        Args:
            device: a torch device.
            dtype: type to compute in.
            context: longest text to serve; None for what the model was trained for.
            name: to go by; empty for the directory's.
            exact, compiled, team: on CUDA, see `graphs.GraphRunner`.
            beside: loaded targets, to share memory with: versions of one base run through one model, beside which
                `settle` puts an adapter, and any other version keeps only the tensors that differ from those of one
                that it resembles. None: it will be the only one, and an adapter is merged into its base.

        Raises:
            TargetError: not a loadable checkpoint, or its cache cannot roll back.
        """
        path = path.resolve()
        base = base_of(path)
        config = config_of(base)
        check_whole(base)
        self._path, self._base = path, base
        self._identities: dict[tuple[str, int], str] = {}
        self.name = name or path.name
        self.version = f"{self.name}@{version_hash(path, base)}"
        self.context = _usable_context(config, context, path)
        self.vocabulary_size = config.vocab_size
        self.vocabulary = vocabulary_of(tokenizer_of(path, base))
        self.dtype, self.device = dtype, torch.device(device)
        self._layers = config.num_hidden_layers
        self.adapter = 0
        self._pairs: Pairs | None = None
        separate = beside is not None and is_plain(path)
        # Whether the runner's model is the base, unchanged.
        self._on_base = separate or path == base
        host = next((other for other in beside or () if other.holds(base, self.dtype, self.device)), None)
        if host and self._on_base:
            self.runner, self.end_ids = host.runner, host.end_ids
        else:
            model, _, self.end_ids = load_model(base if separate else path, device, dtype, attention=attention.NAME)
            self.runner = runner_of(model, self.context, exact, compiled, team)
            for other in beside or ():
                if other.runner.shape == self.runner.shape:
                    share_tensors(model, other.runner.model)
            if team is None or team.rank == 0:
                self._check()
        if separate:
            self._pairs = self.runner.adapters.read(path)

    def identity_like(self, identity: str) -> str:
        """What a draft of the same layout as `identity` presents if it fits; empty if there is no such layout here."""
        layout, _, rest = identity.partition("/")
        blocks = rest.partition("/")[0]
        # Checked before anything is read: whoever asks chooses these words.
        known = (
            layout in ("anchor", "prefix", "standalone") and blocks.isascii() and blocks.isdigit() and len(blocks) < 4
        )
        return self.shared_identity(layout, int(blocks)) if known and int(blocks) <= self._layers else ""

    def shared_identity(self, layout: str, blocks: int) -> str:
        """What a draft that shares these of our tensors presents (see `SharedTensors.identity`)."""
        known = self._identities.get((layout, blocks))
        if known is None:
            fingerprints = shared_fingerprints(self._path, self._base, layout, blocks, self._layers)
            known = self._identities[layout, blocks] = shared_identity(layout, blocks, fingerprints)
        return known

    @property
    def base(self) -> Path:
        """Directory of the checkpoint that it is, or is based on."""
        return self._base

    def holds(self, base: Path, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether `base` is the very checkpoint that the runner runs, so that an adapter to it can be put beside."""
        return self._on_base and (self._base, self.dtype, self.device) == (base, dtype, device)

    def settle(self) -> None:
        """Puts the adapter, if it is one beside its base, where forwards find it. Between two forwards only."""
        if self._pairs is not None:
            self.adapter = self.runner.adapters.put(self._pairs)
            self._pairs = None

    def retire(self) -> None:
        """Takes it out again; no text goes through it any more. Between two forwards only."""
        if self.adapter:
            self.runner.adapters.remove(self.adapter)
            self.adapter = 0

    def run(self, pool: Pool, pieces: Sequence[Piece]) -> list[Chosen | None]:
        """One forward of pieces of this version, and of others on the same runner: see `Runner.run`."""
        return self.runner.run(pool, pieces)

    def piece(self, text: Text, tree: Tree, sampling: Sampling = GREEDY) -> Piece:
        """`tree` behind `text`, to be scored by this version."""
        return Piece.of_tree(text, tree, sampling, self.adapter)

    def reading(self, text: Text, ids: list[int]) -> Piece:
        """`ids` behind `text`, only to be read."""
        return Piece.of_chain(text, ids, self.adapter)

    def _check(self) -> None:
        try:
            self._self_test()
        except TargetError:
            raise
        except Exception as error:
            raise TargetError(f"{self._path}: this architecture does not run with our attention: {error!r}") from None

    def _self_test(self) -> None:
        """Scores a small tree in one forward and token by token, and demands the same logits.

        This is what tells whether the architecture honours our masks, our positions and our roll-back.
        """
        ids = [(7 * i + 3) % self.vocabulary_size for i in range(8)]
        pool, together, alone = Pool(self.runner.shape, 4 * SELF_TEST_TOKENS), Text(), Text()
        # Without a graph: one of a pool that will be gone would stay, and of a team only the leader has this pool.
        self.runner.logits(pool, [self.reading(together, ids[:3])])
        pool.keep(together, [0, 1, 2])
        tree = self.piece(together, Tree(ids[3], 4, ids[4:6], {1: [ids[6]]}))
        logits = [*self.runner.logits(pool, [tree])[0].clone()]
        pool.keep(together, [0, 1, 3])
        logits += self.runner.logits(pool, [self.piece(together, Tree(ids[7], 7, [], {}))])[0].clone()
        expected = []
        for position, token in enumerate([*ids[:5], ids[6], ids[7]]):
            expected += self.runner.logits(pool, [self.piece(alone, Tree(token, position + 1, [], {}))])[0].clone()
            pool.keep(alone, [0])
        scale = float(torch.stack(expected).abs().max())
        pairs = zip([logits[0], logits[1], logits[3], logits[4]], expected[3:], strict=True)
        worst = max(float((a - b).abs().max()) for a, b in pairs)
        if not worst <= SELF_TEST_TOLERANCE[self.dtype] * scale:
            raise TargetError(
                f"{self._path}: logits of a token tree differ by {worst:.3g} from those of the same tokens one by one; "
                "this architecture does not take our attention or our positions"
            )
        log.info("self-test: a tree of 4 nodes and its parts one by one differ by %.2g", worst)


def runner_of(
    model: Any, context: int, exact: bool = False, compiled: bool = False, team: Team | None = None
) -> Runner:
    """What runs `model` where it is."""
    if model.device.type != "cuda":
        return Runner(model)
    from cloud_verifier.model.cuda_graphs import GraphRunner

    if team:
        team.split(model)
    return GraphRunner(model, context, exact, compiled, team)


def share_tensors(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Lets `model` hold the other's tensors wherever they are equal, and so frees its own."""
    for name, module in model.named_modules():
        for key, value in list(module._parameters.items()):
            try:
                known = other.get_submodule(name)._parameters.get(key)
            except AttributeError:
                continue
            if value is not None and known is not None and value.dtype == known.dtype and torch.equal(value, known):
                module._parameters[key] = known


def _usable_context(config: Any, wanted: int | None, path: Path) -> int:
    strange = forgetless_layers(config)
    if strange:
        raise TargetError(
            f"{path} has layers of type {', '.join(strange)}, whose state cannot roll back rejected tokens; "
            "serve a model with plain attention"
        )
    context: int = wanted or config.max_position_embeddings
    if context > config.max_position_embeddings:
        raise TargetError(f"{path} was trained for {config.max_position_embeddings} tokens, not {context}")
    window = sliding_window(config)
    if window and window < context:
        raise TargetError(
            f"{path} attends over a sliding window of {window} tokens, whose cache cannot roll back; "
            f"serve it with --max-context {window}, within which its attention is plain"
        )
    return context


def load_model(
    path: Path, device: str, dtype: torch.dtype | str, attention: str = "sdpa"
) -> tuple[Any, Path, frozenset[int]]:
    """The model at `path`, an adapter merged into its base; the base's directory; and the tokens that end a text.

    Raises:
        TargetError: not a loadable checkpoint.
    """
    base = base_of(path)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    try:
        with _LOADING:
            model, info = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype, attn_implementation=attention, output_loading_info=True
            )
        if info["missing_keys"]:
            raise ValueError(f"its checkpoint lacks {', '.join(sorted(info['missing_keys'])[:3])}")
        if (path / CHANGES).exists():
            put_changes(model, path)
        elif path != base:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        model = model.to(device).eval()
    except Exception as error:
        raise TargetError(f"{path} does not load on {device}: {error}") from None
    ids = model.generation_config.eos_token_id
    if ids is None:
        return model, base, frozenset()
    return model, base, frozenset([ids] if isinstance(ids, int) else ids)
