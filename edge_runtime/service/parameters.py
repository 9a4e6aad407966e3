"""What a request means for its generations: prompts, sampling parameters, limits, inputs of the chat template."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from edge_runtime.protocol.bundle import SamplingDefaults
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import MASK_64, Sampling, validate_prompt
from edge_runtime.service.chat_template import ChatOptions
from edge_runtime.service.errors import ApiError
from edge_runtime.service.requests import MAX_CHOICES, ChatRequest, CompletionRequest, GenerationRequest

OPENAI_DEFAULTS = SamplingDefaults(temperature=1.0, top_k=0, top_p=1.0)
# Fields that requests, the model's defaults and `Sampling` name alike.
SAME_NAMES = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "min_tokens", "ignore_eos"),
)
# Positive temperatures below this are greedy but for rounding, and `Sampling` refuses them.
MIN_TEMPERATURE = 1e-3
# JavaScript's numbers hold 53 bits exactly. One bit is for the choices, whose seeds count up from this one.
RANDOM_SEED_BITS = 52
# Limit of an answer while the target's context is not known: the largest count of the protocol. The verifier ends the
# text at the end of its context.
UNKNOWN_CONTEXT_TOKENS = (1 << 31) - 1


class ChoicePlan(msgspec.Struct, frozen=True):
    """How many answers each prompt gets.

    Attributes:
        candidates: answers to generate.
        returned: how many of them to return; if fewer, those whose tokens are most probable on average.
    """

    candidates: int = 1
    returned: int = 1


def get_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts, each a text or its token ids. Raises ApiError (400) if there is none or too many."""
    prompt: Any = request.prompt
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    if len(prompts) > MAX_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts; at most {MAX_CHOICES} in one request", param="prompt")
    for each in prompts:
        if not each:
            raise ApiError(400, "a prompt is empty: give at least one token", param="prompt")
        ids = isinstance(each, list) and all(isinstance(token, int) and 0 <= token < 1 << 31 for token in each)
        if not isinstance(each, str) and not ids:
            message = "the prompt must be a text, a list of token ids, or a list of such prompts, all of one kind"
            raise ApiError(400, message, param="prompt")
    if len({isinstance(each, str) for each in prompts}) > 1:
        raise ApiError(400, "prompts must be all texts or all lists of token ids", param="prompt")
    return prompts


def check_prompt(prompt: list[int], vocabulary_size: int) -> None:
    """Raise ApiError (400) unless the ids of a prompt are tokens of the model."""
    try:
        validate_prompt(prompt, vocabulary_size)
    except InputError as error:
        raise ApiError(400, str(error), param="prompt", code="invalid_token") from None


def get_chat_options(request: ChatRequest) -> ChatOptions:
    """Return the other inputs of the chat template. A last message of the assistant is continued."""
    starts, continues = request.add_generation_prompt, request.continue_final_message
    if continues is None:
        last = request.messages[-1]
        continues = starts is None and last.role == "assistant" and not last.tool_calls
    effort = request.reasoning_effort
    variables = {"reasoning_effort": effort, "enable_thinking": effort != "none"} if effort else {}
    return ChatOptions(
        tools=(request.tools or None) if request.tool_choice != "none" else None,
        documents=request.documents,
        add_generation_prompt=not continues if starts is None else starts,
        continue_final_message=continues,
        variables=variables | (request.chat_template_kwargs or {}),
    )


def get_sampling(request: GenerationRequest, defaults: SamplingDefaults = OPENAI_DEFAULTS) -> Sampling:
    """Return the sampling parameters of the first choice. Raises ApiError (400).

    Args:
        defaults: the model's; used where the request says nothing. Without either, OpenAI's apply.
    """
    values = {
        name: value
        for source in (OPENAI_DEFAULTS, defaults, request)
        for name in SAME_NAMES
        if (value := getattr(source, name, None)) is not None
    }
    if values["temperature"] < MIN_TEMPERATURE:
        values["temperature"] = 0.0
    values["top_k"] = max(0, values["top_k"])
    values["stop_ids"] = request.stop_token_ids or []
    # OpenAI's seeds are signed.
    values["seed"] = (secrets.randbits(RANDOM_SEED_BITS) if request.seed is None else request.seed) & MASK_64
    try:
        return Sampling(**values)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def get_choices(request: GenerationRequest) -> ChoicePlan:
    """Return how many answers each prompt gets. Raises ApiError (400)."""
    returned = request.n or 1
    best_of = request.best_of if isinstance(request, CompletionRequest) else None
    candidates = best_of or returned
    if candidates < returned:
        raise ApiError(400, f"best_of is {candidates} and must be at least n, {returned}", param="best_of")
    if candidates > returned and request.stream:
        raise ApiError(400, "best_of cannot be streamed: which answers are best is known at the end", param="best_of")
    return ChoicePlan(candidates, returned)


def get_logprobs(request: GenerationRequest) -> int:
    """Return `OpenRequest.logprobs`: 0, or 1 + the number of most probable tokens. Raises ApiError (400)."""
    if isinstance(request, CompletionRequest):
        if request.logprobs is None:
            return 0
        if request.echo:
            message = "logprobs and echo: there are no log-probabilities of the prompt; leave one of them out"
            raise ApiError(400, message, param="logprobs", code="unsupported_parameter")
        return 1 + request.logprobs
    assert isinstance(request, ChatRequest)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return 1 + (request.top_logprobs or 0) if request.logprobs else 0


def get_stop_strings(request: GenerationRequest) -> list[str]:
    """Return the stop strings of the request."""
    return [request.stop] if isinstance(request.stop, str) else list(request.stop or [])


def limit_answer(request: GenerationRequest, prompt_tokens: int, *, context: int, maximum: int) -> int:
    """Return how many tokens an answer may have; 0 for the prompt alone.

    Args:
        context: longest text of the target in tokens; 0 if unknown.
        maximum: the service's own limit; 0 for none.

    Raises:
        ApiError: (400) the prompt leaves no room in the context.
    """
    asked = get_max_tokens(request)
    if asked == 0:
        return 0
    if context and prompt_tokens >= context:
        raise context_overflow(request, context, f"{prompt_tokens} tokens")
    limits = (maximum, context and context - prompt_tokens, max(0, asked or 0))
    return min((limit for limit in limits if limit), default=UNKNOWN_CONTEXT_TOKENS)


def get_max_tokens(request: GenerationRequest) -> int | None:
    """Return how many tokens the request asks for at most: 0 for the prompt alone, None or less for no limit."""
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def context_overflow(request: GenerationRequest, context: int, length: str) -> ApiError:
    """Return the error of a prompt that is too long, in OpenAI's words, by which clients recognize it.

    Args:
        length: how long the prompt is, for the message.
    """
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    message = (
        f"This model's maximum context length is {context} tokens. However, your {param} resulted in {length}. "
        f"Please reduce the length of the {param}."
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")
