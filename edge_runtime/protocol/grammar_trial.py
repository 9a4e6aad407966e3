"""Tries out grammars in a child process before this process compiles them.

llguidance bounds some of the work for a grammar, but not all: chains of rules overflow the stack, others take minutes
or gigabytes. In the child process they only end the child. A grammar that compiles there within the limits does so here
too, because compiling is deterministic. Both ends do this: a board does not trust its clients' grammars either.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import resource
import select
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO

import msgspec

from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.grammar import (
    TOO_COSTLY,
    CompiledGrammar,
    GrammarCompiler,
    GrammarTokenizer,
)

# Limits of a trial. Chosen: the costliest schema of ordinary use (2,000 properties) takes half a second and 16 MB.
# Seconds are of CPU time, so that a busy machine refuses nothing else; the other limit is for a child that hangs.
TRIAL_CPU_SECONDS = 3
TRIAL_SECONDS = 30.0
TRIAL_MEMORY = 96 << 20
# Stack of a trial: a quarter of what this process's threads have.
TRIAL_STACK = 2 << 20
# Time for starting the child and loading a tokenizer, on a busy machine.
START_SECONDS = 30.0
# Refused grammars that are remembered, so that repeating one costs nothing. Chosen.
REMEMBERED_REFUSALS = 256
# How long the child stays for the next grammar, with a tokenizer and llguidance of its own in memory. Chosen: clients
# repeat their grammars, which are tried out once.
IDLE_SECONDS = 60.0


class TrialModel(msgspec.Struct, frozen=True):
    """The model that a grammar is for; see `GrammarTokenizer`, whose `definition` is `tokenizer`."""

    tokenizer: str
    logits: int
    end_ids: list[int]


class GrammarTrial:
    """A child process in which grammars are tried out, one after the other. Thread-safe.

    The child is started when it is needed, and ended when it has not been for a while.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS) -> None:
        """
        Args:
            idle_seconds: how long the child stays after a trial.
        """
        self._idle_seconds = idle_seconds
        self._idle_timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._model: TrialModel | None = None
        self._refused: OrderedDict[tuple[int, str], str] = OrderedDict()

    def run(self, model: TrialModel, grammar: str) -> None:
        """Try out `grammar`. Raises GrammarError if it is invalid or exceeds the limits."""
        key = (hash(model.tokenizer), grammar)
        with self._lock:
            reason = self._refused.get(key)
            if reason is None:
                reason = self._try(model, grammar)
                self._stop_later()
            if reason:
                self._refused[key] = reason
                if len(self._refused) > REMEMBERED_REFUSALS:
                    self._refused.popitem(last=False)
                raise GrammarError(reason)

    @property
    def running(self) -> bool:
        """Whether the child runs."""
        return self._child is not None

    def close(self) -> None:
        """End the child; the next grammar starts another one."""
        with self._lock:
            self._stop()

    def _try(self, model: TrialModel, grammar: str) -> str:
        """Return why `grammar` is refused; empty if it is not."""
        if self._child is None or self._child.poll() is not None or self._model != model:
            self._start(model)
        answer = self._exchange(grammar.encode(), TRIAL_SECONDS)
        if answer is None:
            self._stop()
            return TOO_COSTLY
        return answer.decode()

    def _start(self, model: TrialModel) -> None:
        self._stop()
        # Only what the child imports: neither torch nor the state of this process.
        self._child = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime.protocol.grammar_trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Every further arena of malloc would reserve 64 MB of the address space that is limited.
            env=os.environ | {"MALLOC_ARENA_MAX": "1"},
            start_new_session=True,
        )
        self._model = model
        if self._exchange(msgspec.json.encode(model), START_SECONDS) != b"":
            self._stop()
            raise GrammarError("grammars cannot be tried out here: the child process does not start")

    def _stop_later(self) -> None:
        """End the child after the idle time, which begins now."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._idle_timer = threading.Timer(self._idle_seconds, self.close)
        self._idle_timer.daemon = True
        self._idle_timer.start()

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
            self._child.wait()
        self._child = self._model = None

    def _exchange(self, request: bytes, seconds: float) -> bytes | None:
        """Send `request` and return the child's answer; None if it ended or took longer than `seconds`."""
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        try:
            _write(child.stdin, request)
        except OSError:
            return None
        if not select.select([child.stdout], [], [], seconds)[0]:
            return None
        return _read(child.stdout)


class TriedGrammarCompiler(GrammarCompiler):
    """Compiles grammars for one model after a trial."""

    _model: TrialModel

    def _make_tokenizer(self, definition: str) -> GrammarTokenizer:
        self._model = TrialModel(definition, self._logits, sorted(self._end_ids))
        return super()._make_tokenizer(definition)

    def _compile(self, tokenizer: GrammarTokenizer, grammar: str) -> CompiledGrammar:
        _TRIAL.run(self._model, grammar)
        return super()._compile(tokenizer, grammar)


# All models share the child.
_TRIAL = GrammarTrial()
atexit.register(_TRIAL.close)


def _write(stream: IO[bytes], message: bytes) -> None:
    stream.write(struct.pack("<I", len(message)) + message)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes | None:
    """The next message; None at the end of the stream."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    (size,) = struct.unpack("<I", header)
    message = stream.read(size)
    return message if len(message) == size else None


def _try_grammar(tokenizer: GrammarTokenizer, grammar: str) -> str:
    """In the child: compile `grammar` and compute some masks. Return why it is refused; empty if it is not."""
    try:
        CompiledGrammar(tokenizer, grammar)
    except GrammarError as error:
        return str(error)
    return ""


def _virtual_memory() -> int:
    """Bytes of address space that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    """Body of the child: a model, then grammars, one answer each, until its input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    description = _read(requests)
    if description is None:
        return
    model = msgspec.json.decode(description, type=TrialModel)
    tokenizer = GrammarTokenizer(model.tokenizer, model.logits, model.end_ids)
    _try_grammar(tokenizer, "start: /a/")
    resource.setrlimit(resource.RLIMIT_AS, (_virtual_memory() + TRIAL_MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(TRIAL_STACK)
    _write(answers, b"")
    while (grammar := _read(requests)) is not None:
        result: list[str] = []

        def run_trial(text: str = grammar.decode(), result: list[str] = result) -> None:
            result.append(_try_grammar(tokenizer, text))

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = math.ceil(used.ru_utime + used.ru_stime) + TRIAL_CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        trial = threading.Thread(target=run_trial)
        trial.start()
        trial.join()
        _write(answers, (result[0] if result else TOO_COSTLY).encode())


if __name__ == "__main__":
    main()
