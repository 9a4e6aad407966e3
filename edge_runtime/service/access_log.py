"""One log line per answer. Prompt and text are logged only if the configuration asks for it."""

from __future__ import annotations

import logging

from tokenizers import Tokenizer

from edge_runtime.common import logs
from edge_runtime.service.answer import Answer

log = logging.getLogger(__name__)


def log_answer(answer: Answer, outcome: str, tokenizer: Tokenizer) -> None:
    """Log how an answer ended; `outcome` is its finish reason or an error code."""
    fields = {
        "FLEXSPEC_OUTCOME": outcome,
        "FLEXSPEC_VERSION": answer.version,
        "FLEXSPEC_TOKENS": answer.tokens,
        "FLEXSPEC_ROUNDS": answer.rounds,
        "FLEXSPEC_DRAFTED": answer.drafted,
        "FLEXSPEC_ACCEPTED": answer.accepted,
        "FLEXSPEC_SECONDS": round(answer.seconds, 3),
        "FLEXSPEC_ANSWER": answer.request.id,
        "FLEXSPEC_REQUEST": answer.request.request_id,
        "FLEXSPEC_ERROR": str(answer.error or ""),
    }
    log.info(
        "%(FLEXSPEC_OUTCOME)s: %(FLEXSPEC_TOKENS)d tokens in %(FLEXSPEC_ROUNDS)d rounds and %(FLEXSPEC_SECONDS).2f s, "
        "%(FLEXSPEC_ACCEPTED)d of %(FLEXSPEC_DRAFTED)d draft tokens accepted (%(FLEXSPEC_ANSWER)s, request "
        "%(FLEXSPEC_REQUEST)s)" + (": %(FLEXSPEC_ERROR)s" if str(answer.error or "") else ""),
        fields,
        extra={logs.EXTRA_FIELDS: fields},
    )
    if logs.are_prompts_logged():
        # Decoded only now: this costs more than the rest of the function.
        prompt, text = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (answer.request.prompt, answer.ids))
        log.info("prompt %r, answer %r", prompt, text)
