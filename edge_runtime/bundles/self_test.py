"""Whether a draft bundle works on this board: loads it, drafts with it, and compares with a fresh start.

`examine` does so in a process of its own, so that whatever a bundle does to it (a crash in native code, a kill for want
of memory, an endless loop) happens to nobody else.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from edge_runtime.protocol.errors import BundleError, FlexSpecError

TEXT = "A board drafts a few tokens, and a verifier has the last word.\n"
TOKENS = 8
# A large draft on a slow card takes a minute to load; beyond this it hangs.
SECONDS = 300.0
# Of what a dying process wrote, what is repeated.
LAST_WORDS = 300
# The kernel, short of memory, ends processes of a high score first; 1000 is the most.
OOM_SCORE = 800


class BundleUnfit(BundleError):
    """A bundle that is what was exported, and does not work on this board."""


class Examination(msgspec.Struct, frozen=True):
    """What a self-test found.

    Attributes:
        tokens: what the draft guessed behind `TEXT`, greedily.
        load_seconds: until the draft was loaded.
        step_seconds: per guessed token.
    """

    tokens: list[int]
    load_seconds: float
    step_seconds: float


def examine(bundle: Path, timeout: float = SECONDS) -> Examination:
    """Tests the bundle in the directory `bundle`, whose files were checked before, in another process.

    Raises:
        BundleUnfit: the draft does not load or run, or the process died or hung.
    """
    # Started where this very package is, so that a module of the same name in the user's folder is not found first.
    home = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "edge_runtime.bundles.self_test", str(bundle.absolute())]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, cwd=home, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise BundleUnfit(f"the draft in {bundle} did not finish its self-test within {timeout:g} s") from None
    except OSError as error:
        raise BundleUnfit(f"the self-test of {bundle} could not be started: {error.strerror}") from None
    if done.returncode < 0:
        number = -done.returncode
        name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
        cause = ", perhaps for want of memory" if number == signal.SIGKILL else ""
        raise BundleUnfit(f"the draft in {bundle} took its self-test down: {name}{cause}; use another bundle")
    if done.returncode == 0:
        return msgspec.json.decode(done.stdout, type=Examination)
    words = done.stderr.decode(errors="replace").strip()[-LAST_WORDS:]
    raise BundleUnfit(f"the draft in {bundle} failed its self-test: {words or 'it said nothing'}")


def run(path: Path) -> Examination:
    """The test itself, in this process.

    Raises:
        FlexSpecError: the draft does not load, does not run, or says something else the second time.
    """
    # Imported here: whoever only calls `examine` needs no onnxruntime.
    from edge_runtime.draft.model import DraftContext, OnnxDraft, Proposal
    from edge_runtime.protocol.bundle import vocabulary_hash
    from edge_runtime.protocol.sampling import Sampling

    started = time.perf_counter()
    draft = OnnxDraft.load(path, verify=False)
    loaded = time.perf_counter()
    vocabulary = draft.tokenizer.get_vocab(with_added_tokens=True)
    if vocabulary_hash(vocabulary) != draft.manifest.vocabulary.hash:
        raise BundleUnfit("its tokenizer is not the one that its manifest describes; export the bundle again")
    size = draft.manifest.architecture.vocabulary_size
    ids: list[int] = draft.tokenizer.encode(TEXT).ids[: max(1, draft.manifest.architecture.context - TOKENS)]
    used = draft.context()

    def guess(context: DraftContext, ids: list[int], temperature: float = 0.0) -> Proposal:
        return context.propose(ids, TOKENS, Sampling(temperature), siblings=1)

    begun = time.perf_counter()
    first = guess(used, ids)
    step_seconds = (time.perf_counter() - begun) / max(1, len(first.tokens))
    # A text that shares nothing with the first: what is behind the roll-back must not shine through.
    guess(used, [(ids[0] + 1) % size, *ids[1:]], temperature=1.0)
    if not guess(used, ids).tokens == first.tokens == guess(draft.context(), ids).tokens:
        raise BundleUnfit("it guesses other tokens after a roll-back; its graph or this board's processor is at fault")
    if not first.tokens or not all(0 <= token < size for token in first.tokens):
        raise BundleUnfit("it guesses tokens that its vocabulary does not have; export the bundle again")
    if not all(math.isfinite(share) and 0 < share <= 1 for share in first.confidences):
        raise BundleUnfit("its probabilities are no numbers; export the bundle again, or with other weights")
    return Examination(first.tokens, loaded - started, step_seconds)


def main() -> int:
    """`python -m edge_runtime.bundles.self_test BUNDLE`: prints the examination as JSON. Returns the exit code."""
    # Not every container lets a process offer itself.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    try:
        print(msgspec.json.encode(run(Path(sys.argv[1]))).decode())
    except FlexSpecError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return os.EX_OK


if __name__ == "__main__":
    raise SystemExit(main())
