"""The answers of one request: one, or several choices of one or several prompts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from tokenizers import Tokenizer

from edge_runtime.service.answer import Answer, AnswerRequest, TextChange
from edge_runtime.service.parameters import ChoicePlan


class AnswerGroup:
    """Reads the answers of one request as they are generated.

    Attributes:
        answers: the candidates of the first prompt, then those of the next.
    """

    def __init__(self, requests: Iterable[AnswerRequest], choices: ChoicePlan, tokenizer: Tokenizer) -> None:
        self._changed = asyncio.Event()
        self.answers = [Answer(request, tokenizer, self._changed) for request in requests]
        self._plan = choices
        # Indices of the answers whose end the reader has seen; and the index to look at first, which rotates.
        self._finished: set[int] = set()
        self._turn = 0

    @property
    def firsts(self) -> list[Answer]:
        """The first candidate of each prompt."""
        return self.answers[:: self._plan.candidates]

    def first_of_prompt(self, index: int) -> Answer:
        """Return the first candidate of the prompt to which the answer at `index` belongs."""
        return self.answers[index - index % self._plan.candidates]

    def choices(self) -> list[Answer]:
        """Return the complete answers to return, in the order of their indices."""
        count, returned = self._plan.candidates, self._plan.returned
        if count == returned:
            return self.answers
        blocks = (self.answers[start : start + count] for start in range(0, len(self.answers), count))
        # `sorted` is stable: among equals, the one with the lowest seed.
        return [
            answer for block in blocks for answer in sorted(block, key=lambda answer: -answer.mean_logprob)[:returned]
        ]

    async def wait_for_text(self, seconds: float) -> None:
        """Wait until there is text to read or an answer is done, for at most `seconds`. Raises an answer's error."""
        with contextlib.suppress(TimeoutError):
            await self._wait(lambda: any(answer.has_text or answer.done for answer in self.answers), seconds)
        if not any(answer.has_text for answer in self.answers):
            self._raise_error()

    async def wait_until_done(self, seconds: float | None = None) -> None:
        """Wait for the end of all answers. Raises the first error, and TimeoutError after `seconds`."""
        await self._wait(lambda: all(answer.done for answer in self.answers), seconds)
        self._raise_error()

    async def read(self, seconds: float | None = None) -> tuple[int, TextChange | None] | None:
        """Wait for the next change of any answer.

        Returns:
            The index of the answer and all its unread changes as one, or no change at its end; None after the end of
            all answers.

        Raises an answer's error, and TimeoutError if nothing changes for `seconds`.
        """
        await self._wait(lambda: self._is_over() or any(map(self._is_readable, range(len(self.answers)))), seconds)
        order = [*range(self._turn, len(self.answers)), *range(self._turn)]
        for index in filter(self._is_readable, order):
            if change := self.answers[index].take():
                self._turn = (index + 1) % len(self.answers)
                return index, change
        self._raise_error()
        for index in filter(self._is_readable, order):
            self._finished.add(index)
            return index, None
        return None

    def _is_readable(self, index: int) -> bool:
        answer = self.answers[index]
        return answer.has_text or (answer.done and index not in self._finished)

    def _is_over(self) -> bool:
        return len(self._finished) == len(self.answers)

    def _raise_error(self) -> None:
        error = next((answer.error for answer in self.answers if answer.error), None)
        if error:
            raise error

    async def _wait(self, ready: Callable[[], bool], seconds: float | None) -> None:
        """Wait until `ready()`, or an answer has failed. Raises TimeoutError after `seconds`."""
        async with asyncio.timeout(seconds):
            while not (ready() or any(answer.error for answer in self.answers)):
                self._changed.clear()
                await self._changed.wait()
