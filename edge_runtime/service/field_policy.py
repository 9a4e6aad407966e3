"""What happens to request fields that this service does not implement: ignored, or refused by name.

- A field that could not change the answer, or whose answer would be the same text in another form, is ignored.
- A field that would change the answer is refused (400, `unsupported_parameter`), unless its value changes nothing.
- A field that nobody knows is ignored too, as vLLM, llama-server and ollama do, so that a newer client works.

The response header `x-ignored-fields` names every field that was ignored, and the log every unknown one.

The fields that are implemented are those of the structs in `requests`; `field_reference` prints all for the README.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from edge_runtime.service.errors import ApiError

log = logging.getLogger(__name__)

EndpointName = Literal["chat", "completions", "responses"]
IGNORED_HEADER = "x-ignored-fields"
# Names shown of ignored fields; chosen.
MAX_SHOWN_NAMES = 20
MAX_NAME_CHARACTERS = 40


class RefusedField(NamedTuple):
    """A field that would change the answer.

    Attributes:
        neutral: values that change nothing, in addition to null.
        advice: what to do instead.
        endpoints: where it is refused.
    """

    neutral: tuple[Any, ...] = ()
    advice: str = "leave it out"
    endpoints: tuple[EndpointName, ...] = get_args(EndpointName)


# Known fields of OpenAI's API, vLLM, llama-server and ollama without an effect here.
IGNORED_FIELDS = frozenset(
    {
        # OpenAI: accounting, storage, caching, and a guess of the answer that would only make it faster.
        *("user", "metadata", "store", "service_tier", "verbosity", "safety_identifier", "moderation"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "prediction"),
        # Of OpenAI's own tools, which are refused.
        "max_tool_calls",
        # vLLM: scheduling, caching, and the form of the answer.
        *("priority", "request_id", "session_id", "cache_salt", "kv_transfer_params", "ec_transfer_params"),
        *("vllm_xargs", "skip_special_tokens", "spaces_between_special_tokens", "return_tokens_as_token_ids"),
        *("return_token_ids", "return_prompt_text", "mm_processor_kwargs", "media_io_kwargs"),
        *("guided_decoding_backend", "guided_whitespace_pattern"),
        # llama-server: slots, caching, and the form of the answer.
        *("cache_prompt", "id_slot", "slot_id", "n_keep", "n_cache_reuse", "timings_per_token", "return_progress"),
        *("return_tokens", "post_sampling_probs", "response_fields", "t_max_prompt_ms", "repeat_last_n"),
        *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "xtc_threshold"),
        *("mirostat_tau", "mirostat_eta", "dynatemp_exponent", "min_keep", "reasoning_format"),
        # ollama: how long the model stays loaded, and options of its own API, which its /v1 ignores, too.
        *("keep_alive", "options"),
    }
)
REFUSED_FIELDS: dict[str, RefusedField] = {
    # OpenAI.
    "suffix": RefusedField(("",), "the models here continue a text and do not fill gaps", ("completions",)),
    "best_of": RefusedField((1,), "use n", ("chat", "responses")),
    "echo": RefusedField((False,), endpoints=("chat", "responses")),
    "add_special_tokens": RefusedField((False,), "the chat template writes them", ("chat", "responses")),
    "audio": RefusedField((), "the answer is text"),
    "modalities": RefusedField((["text"],), "the answer is text"),
    "functions": RefusedField(([],), "use tools"),
    "function_call": RefusedField(("none", "auto"), "use tool_choice"),
    "web_search_options": RefusedField(),
    "n": RefusedField((1,), "send a request for each answer", ("responses",)),
    "messages": RefusedField((), "use input", ("responses",)),
    "prompt": RefusedField((), "use input", ("responses",)),
    "max_tokens": RefusedField((), "use max_output_tokens", ("responses",)),
    "max_completion_tokens": RefusedField((), "use max_output_tokens", ("responses",)),
    "response_format": RefusedField((), "use text.format", ("responses",)),
    "logprobs": RefusedField((False,), "use top_logprobs", ("responses",)),
    "background": RefusedField((False,), endpoints=("responses",)),
    "conversation": RefusedField((), "use previous_response_id", ("responses",)),
    "context_management": RefusedField(([],), "shorten the input", ("responses",)),
    "truncation": RefusedField(("disabled",), "shorten the input", ("responses",)),
    # vLLM.
    "use_beam_search": RefusedField((False,)),
    "length_penalty": RefusedField((1,)),
    "prompt_logprobs": RefusedField(),
    "logprob_token_ids": RefusedField(),
    "allowed_token_ids": RefusedField(([],)),
    "bad_words": RefusedField(([],)),
    "logits_processors": RefusedField(([],)),
    "truncate_prompt_tokens": RefusedField((), "shorten the prompt"),
    "chat_template": RefusedField((), "the model's own template is used; chat_template_kwargs sets its variables"),
    "thinking_token_budget": RefusedField(),
    # llama-server.
    "n_predict": RefusedField((-1,), "use max_tokens"),
    "n_probs": RefusedField((0,), "use top_logprobs"),
    "repeat_penalty": RefusedField((1,), "use repetition_penalty"),
    "mirostat": RefusedField((0,)),
    "typical_p": RefusedField((1,)),
    "top_n_sigma": RefusedField((-1, 0)),
    "dynatemp_range": RefusedField((0,)),
    "samplers": RefusedField(([],)),
    "dry_multiplier": RefusedField((0,)),
    "xtc_probability": RefusedField((0,)),
    "t_max_predict_ms": RefusedField((-1, 0)),
    "n_indent": RefusedField((0,)),
    "lora": RefusedField(([],), "name the version of the target as the model"),
}


def check_fields(fields: dict[str, msgspec.Raw], supported: frozenset[str], endpoint: EndpointName) -> list[str]:
    """Return the names of the fields that are ignored.

    Args:
        fields: the top level of the request.
        supported: names that the endpoint implements.

    Raises:
        ApiError: (400) a field is refused.
    """
    others = [name for name in fields if name not in supported]
    for name in others:
        refused = REFUSED_FIELDS.get(name)
        if refused and endpoint in refused.endpoints:
            _check_neutral(name, fields[name], refused)
    return others


def log_unknown(names: list[str]) -> None:
    """Log the names of those ignored fields that are in neither table; nothing is logged of their values."""
    unknown = [name for name in names if name not in IGNORED_FIELDS and name not in REFUSED_FIELDS]
    if unknown:
        log.info("unknown fields of a request were ignored: %s", show_names(unknown))


def show_names(names: list[str]) -> str:
    """Return names that clients made up as one printable ASCII line of bounded length, for a header or the log."""
    shown = [ascii(name[:MAX_NAME_CHARACTERS])[1:-1] for name in names[:MAX_SHOWN_NAMES]]
    return ", ".join(shown + ["..."] * (len(names) > MAX_SHOWN_NAMES))


def refused_schema(field: RefusedField) -> dict[str, Any]:
    """Return the JSON schema of a refused field: the values that change nothing."""
    return {"enum": [None, *field.neutral], "description": f"Not supported: {field.advice}."}


def _check_neutral(name: str, raw: msgspec.Raw, refused: RefusedField) -> None:
    value = msgspec.json.decode(raw)
    # In Python, unlike JSON, True equals 1.
    neutral = any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in refused.neutral)
    if value is None or neutral:
        return
    allowed = " or ".join(msgspec.json.encode(known).decode() for known in refused.neutral)
    message = f"{name} is not supported: {refused.advice}{f', or send {allowed}' if allowed else ''}"
    raise ApiError(400, message, param=name, code="unsupported_parameter")
