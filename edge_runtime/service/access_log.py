"""One line in the log for each answer; with its text only where the configuration says so."""

from __future__ import annotations

import logging

from tokenizers import Tokenizer

from edge_runtime.common import logs
from edge_runtime.service.completions import Answer

log = logging.getLogger(__name__)


def log_answer(answer: Answer, outcome: str, tokenizer: Tokenizer) -> None:
    """Logs how an answer ended."""
    fields = {
        "FLEXSPEC_OUTCOME": outcome,
        "FLEXSPEC_VERSION": answer.version,
        "FLEXSPEC_TOKENS": answer.tokens,
        "FLEXSPEC_ROUNDS": answer.rounds,
        "FLEXSPEC_DRAFTED": answer.drafted,
        "FLEXSPEC_ACCEPTED": answer.accepted,
        "FLEXSPEC_SECONDS": round(answer.seconds, 3),
    }
    log.info(
        "%s: %d tokens in %d rounds and %.2f s, %d of %d drafted tokens accepted",
        outcome,
        answer.tokens,
        answer.rounds,
        answer.seconds,
        answer.accepted,
        answer.drafted,
        extra={logs.FIELDS: fields},
    )
    if logs.prompts_wanted():
        # Decoding costs more than all the rest.
        prompt, text = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (answer.order.prompt, answer.ids))
        log.info("prompt %r, answer %r", prompt, text)
