"""What the comparisons ask, and what transformers' own `generate` answers."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from cloud_verifier.registry.checkpoint import base_directory
from cloud_verifier.registry.version_files import version_hash
from edge_runtime.common.files import lock_directory, write_atomically
from tests.benchmarks.comparison.board import AnswerCommand
from tests.benchmarks.harness.samples import ROOT

# Tokens of an answer, and of each answer in a conversation.
TOKENS, TURN_TOKENS = 64, 32
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "What is the capital of France, and what is it known for?",
    "Explain recursion to a child.",
    "Give me three tips for better sleep.",
    "What is the difference between a list and a tuple in Python?",
    "Write an email that asks for a day off.",
)
# What follows the question in a conversation.
FURTHER_TURNS = (
    "Can you explain that in more detail?",
    "Give me an example.",
    "Why is that so?",
    "What do people often get wrong about it?",
    "Say it in one short sentence.",
    "What would an expert add?",
    "How could I learn more about it?",
    "Is there anything that I should avoid?",
    "Thank you. Summarize what we talked about.",
)
# Characters of a document, about 1,000 tokens of the example family.
DOCUMENT_CHARACTERS = 4000
DOCUMENT_SOURCE = ROOT / "edge_runtime" / "README.md"

TextKind: TypeAlias = Literal["questions", "documents", "conversations"]
TEXT_TITLES: dict[TextKind, str] = {
    "questions": "",
    "documents": "questions about documents of about 1,000 tokens",
    "conversations": f"conversations of {1 + len(FURTHER_TURNS)} turns",
}


def make_turns(text: TextKind, repetition: int) -> list[str]:
    """Return what the user says in the sample `repetition`."""
    question = QUESTIONS[repetition % len(QUESTIONS)]
    if text == "conversations":
        return [question, *FURTHER_TURNS]
    if text == "documents":
        source = DOCUMENT_SOURCE.read_text()
        start = repetition % len(QUESTIONS) * (len(source) - DOCUMENT_CHARACTERS) // len(QUESTIONS)
        return [f"Summarize this text.\n\n{source[start : start + DOCUMENT_CHARACTERS]}"]
    return [question]


class References:
    """Texts of transformers' own `generate`, kept on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._texts = self._read()

    def get(self, target: Path, wanted: Sequence[AnswerCommand]) -> list[list[int]]:
        """Return the texts, generating those that are missing in a process of its own."""
        version = _version_hash(target.resolve())
        keys = [hashlib.sha256(msgspec.json.encode([version, each])).hexdigest() for each in wanted]
        if missing := [index for index, key in enumerate(keys) if key not in self._texts]:
            command = [sys.executable, "-m", "tests.benchmarks.comparison.reference", str(target)]
            requests = msgspec.json.encode([wanted[index] for index in missing])
            done = subprocess.run(command, input=requests, stdout=subprocess.PIPE, check=True)
            self._texts |= zip((keys[index] for index in missing), json.loads(done.stdout), strict=True)
            # Another process may have added texts in the meantime.
            with lock_directory(self._path.parent):
                write_atomically(self._path, json.dumps(self._read() | self._texts).encode())
        return [self._texts[key] for key in keys]

    def _read(self) -> dict[str, list[int]]:
        texts: dict[str, list[int]] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        return texts


@functools.cache
def _version_hash(target: Path) -> str:
    return version_hash(target, base_directory(target))
