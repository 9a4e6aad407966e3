"""Self-test of a draft bundle on this board: load it, draft, roll back, and compare with a fresh context.

`run_self_test` uses a separate process, so that a crash in native code, an out-of-memory kill or an endless loop cannot
harm the caller.
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

from edge_runtime.common.terminal import print_note
from edge_runtime.protocol.errors import BundleError, FlexSpecError

PROMPT = "A board drafts a few tokens, and a verifier has the last word.\n"
DRAFT_TOKENS = 8
# Chosen: a large draft on a slow card loads within a minute; a self-test beyond this limit hangs.
TIMEOUT_SECONDS = 300.0
# Characters of the process's standard error that are quoted in an error.
MAX_QUOTED_CHARACTERS = 300
# The kernel kills processes with a high score first when memory is short; the maximum is 1000.
OOM_SCORE = 800


class BundleUnfit(BundleError):
    """The bundle is intact but does not work on this board."""


class SelfTestReport(msgspec.Struct, frozen=True):
    """Result of a self-test.

    Attributes:
        tokens: greedy draft tokens after `PROMPT`.
        load_seconds: time to load the draft.
        step_seconds: time per drafted token.
    """

    tokens: list[int]
    load_seconds: float
    step_seconds: float


def run_self_test(bundle: Path, timeout: float = TIMEOUT_SECONDS) -> SelfTestReport:
    """Test the bundle in the directory `bundle` in another process. Its files must have been verified before.

    Raises:
        BundleUnfit: the draft does not load or run, or the process died or hung.
    """
    # Run from the directory of this package, so that a module of the same name in the user's folder is not found first.
    home = Path(__file__).resolve().parents[2]
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
        cause = ", perhaps out of memory" if number == signal.SIGKILL else ""
        raise BundleUnfit(f"the draft in {bundle} crashed its self-test: {name}{cause}; use another bundle")
    if done.returncode == 0:
        return msgspec.json.decode(done.stdout, type=SelfTestReport)
    output = done.stderr.decode(errors="replace").strip()[-MAX_QUOTED_CHARACTERS:]
    raise BundleUnfit(f"the draft in {bundle} failed its self-test: {output or 'no output'}")


def check_draft(path: Path) -> SelfTestReport:
    """Run the self-test in this process.

    Raises:
        FlexSpecError: the draft does not load, does not run, or drafts other tokens after a rollback.
    """
    # Imported here, because callers of `run_self_test` do not need onnxruntime.
    from edge_runtime.draft import DraftContext, OnnxDraft, Proposal
    from edge_runtime.planning.plan import Plan
    from edge_runtime.protocol.bundle import hash_vocabulary
    from edge_runtime.protocol.sampling import Sampling

    started = time.perf_counter()
    draft = OnnxDraft.load(path, verify=False)
    loaded = time.perf_counter()
    vocabulary = draft.tokenizer.get_vocab(with_added_tokens=True)
    if hash_vocabulary(vocabulary) != draft.manifest.vocabulary.hash:
        raise BundleUnfit("its tokenizer is not the one that its manifest describes; export the bundle again")
    size = draft.manifest.architecture.vocabulary_size
    ids: list[int] = draft.tokenizer.encode(PROMPT).ids[: max(1, draft.manifest.architecture.context - DRAFT_TOKENS)]
    used = draft.new_context()

    def draft_tokens(context: DraftContext, ids: list[int], temperature: float = 0.0) -> Proposal:
        return context.propose(ids, DRAFT_TOKENS, Sampling(temperature), Plan(1, siblings=1, sibling_confidence=1.0))

    step_started = time.perf_counter()
    first = draft_tokens(used, ids)
    step_seconds = (time.perf_counter() - step_started) / max(1, len(first.tokens))
    # A text without a common prefix: nothing of the first may remain after the rollback.
    draft_tokens(used, [(ids[0] + 1) % size, *ids[1:]], temperature=1.0)
    if not draft_tokens(used, ids).tokens == first.tokens == draft_tokens(draft.new_context(), ids).tokens:
        raise BundleUnfit("it drafts other tokens after a rollback; its graph or this board's processor is at fault")
    if not first.tokens or not all(0 <= token < size for token in first.tokens):
        raise BundleUnfit("it drafts tokens outside its vocabulary; export the bundle again")
    if not all(math.isfinite(p) and 0 < p <= 1 for p in first.confidences):
        raise BundleUnfit("its probabilities are not finite numbers; export the bundle again, or with other weights")
    return SelfTestReport(first.tokens, loaded - started, step_seconds)


def main() -> int:
    """`python -m edge_runtime.bundles.self_test BUNDLE`: print the report as JSON. Returns the exit code."""
    # Some containers do not allow a process to raise its own score.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    try:
        print(msgspec.json.encode(check_draft(Path(sys.argv[1]))).decode())
    except FlexSpecError as error:
        print_note(error)
        return error.exit_code
    return os.EX_OK


if __name__ == "__main__":
    raise SystemExit(main())
