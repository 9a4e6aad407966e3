"""Request bodies of OpenAI's API. A struct declares each field once: its name, type, bounds and meaning.

The OpenAPI document and the README's reference come from these declarations. Null always means the default. What
happens to other fields is in `field_policy`, what the fields mean for a generation in `parameters`.

Fields beyond OpenAI's have the names of vLLM and llama-server; `speculation` and `on_link_loss` are this project's.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec

from edge_runtime.planning.plan import OnLinkLoss
from edge_runtime.protocol.messages import MAX_LOGPROBS
from edge_runtime.protocol.sampling import (
    MASK_64,
    MAX_BIAS,
    MAX_BIASED_IDS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_STOP_IDS,
)
from edge_runtime.service.conversation import ChatMessage
from edge_runtime.service.errors import ApiError
from edge_runtime.service.field_policy import EndpointName, check_fields
from edge_runtime.service.structured_output import Choices, ResponseFormat, SchemaOrText, StructuredOutputs
from edge_runtime.service.tool_calls.output_format import TOOL_NAME, ToolChoice

# The largest `n` and `best_of`: OpenAI's.
MAX_CHOICES = 128
MIN_SEED, MAX_SEED = -(1 << 63), MASK_64

TokenCount = Annotated[int, msgspec.Meta(ge=-1, le=1 << 31)]
ChoiceCount = Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
TopCount = Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS - 1)]
Penalty = Annotated[float, msgspec.Meta(ge=-MAX_PENALTY, le=MAX_PENALTY)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
# msgspec cannot bound a repetition penalty by MAX_REPETITION_PENALTY as an int.
RepetitionPenalty = Annotated[float, msgspec.Meta(gt=0, le=float(MAX_REPETITION_PENALTY))]
Bias = Annotated[float, msgspec.Meta(ge=-MAX_BIAS, le=MAX_BIAS)]
# Exactly what `parameters.get_prompts` accepts; msgspec cannot distinguish lists by the type of their items.
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_CHOICES},
        {"$ref": "#/components/schemas/TokenIds"},
        {
            "type": "array",
            "items": {"$ref": "#/components/schemas/TokenIds"},
            "minItems": 1,
            "maxItems": MAX_CHOICES,
        },
    ]
}


def _excludes(**properties: Any) -> dict[str, Any]:
    """Return the schema of objects that do not have all of these values at once."""
    return {"not": {"properties": properties, "required": list(properties)}}


TOOL_SCHEMA = {
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": f"^{TOOL_NAME.pattern}$"},
                "description": {"type": "string"},
                "parameters": {"type": ["object", "null"]},
                "strict": {"type": ["boolean", "null"]},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
# Fields that contradict each other. Not expressed: best_of is at least n, and all answers fit into the queue.
CHAT_SCHEMA = {
    "allOf": [
        _excludes(add_generation_prompt={"const": True}, continue_final_message={"const": True}),
        _excludes(top_logprobs={"minimum": 1, "type": "integer"}, logprobs={"enum": [None, False]}),
        {
            "if": {"required": ["top_logprobs"], "properties": {"top_logprobs": {"minimum": 1, "type": "integer"}}},
            "then": {"required": ["logprobs"]},
        },
    ]
}
COMPLETION_SCHEMA = {
    "allOf": [
        _excludes(logprobs={"type": "integer"}, echo={"const": True}),
        _excludes(best_of={"minimum": 2, "type": "integer"}, stream={"const": True}),
    ]
}
SEED_SCHEMA = {"minimum": MIN_SEED, "maximum": MAX_SEED}
BIAS_SCHEMA = {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}, "maxProperties": MAX_BIASED_IDS}


def means(description: str) -> msgspec.Meta:
    """The meaning of a field, for the documents."""
    return msgspec.Meta(description=description)


class StreamOptions(msgspec.Struct, frozen=True):
    """Options of a stream; without effect otherwise. Others are ignored.

    Attributes:
        include_usage: add a last chunk with the token counts.
    """

    include_usage: bool | None = None


class EndpointRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that all endpoints accept."""

    endpoint: ClassVar[EndpointName]

    model: Annotated[
        str | None, means("Target model: an id of `/v1/models` or an exact version. Default: the verifier's.")
    ] = None
    temperature: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=2)] | None,
        means("0 (anything below 0.001) is greedy. Default: the model's own, else 1."),
    ] = None
    top_p: Annotated[
        Annotated[float, msgspec.Meta(gt=0, le=1)] | None, means("Nucleus. Default: the model's own, else 1.")
    ] = None
    top_k: Annotated[
        Annotated[int, msgspec.Meta(ge=-1, le=1 << 31)] | None,
        means("The k most probable tokens; 0 or -1 for all. Default: the model's own, else all."),
    ] = None
    min_p: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=1)] | None,
        means("Tokens with at least this share of the most probable one's probability. Default: 0, all."),
    ] = None
    presence_penalty: Annotated[Penalty | None, means("Subtracted from logits of generated tokens.")] = None
    frequency_penalty: Annotated[
        Penalty | None, means("Subtracted from logits of generated tokens, as often as they occurred.")
    ] = None
    repetition_penalty: Annotated[
        RepetitionPenalty | None, means("Divides logits of tokens of prompt and answer. Default: 1.")
    ] = None
    logit_bias: Annotated[
        Annotated[dict[TokenId, Bias], msgspec.Meta(max_length=MAX_BIASED_IDS, extra_json_schema=BIAS_SCHEMA)] | None,
        means(f"Added to logits, by token id; from -{MAX_BIAS} to {MAX_BIAS}, for at most {MAX_BIASED_IDS} ids."),
    ] = None
    seed: Annotated[
        Annotated[int, msgspec.Meta(extra_json_schema=SEED_SCHEMA)] | None,
        means("The same seed gives the same text. Default: random, of at most 53 bits, and returned."),
    ] = None
    stop: Annotated[
        StopString | Annotated[list[StopString], msgspec.Meta(max_length=16)] | None,
        means("The text ends before the first of these strings."),
    ] = None
    stop_token_ids: Annotated[
        Annotated[list[TokenId], msgspec.Meta(max_length=MAX_STOP_IDS)] | None,
        means("The text ends before the first of these tokens."),
    ] = None
    include_stop_str_in_output: Annotated[
        bool | None, means("Keep the stop string or stop token at the end of the text.")
    ] = None
    min_tokens: Annotated[
        Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] | None,
        means("No end-of-text and no stop token before this many tokens."),
    ] = None
    ignore_eos: Annotated[bool | None, means("Continue past the end-of-text token, for measurements.")] = None
    structured_outputs: Annotated[
        StructuredOutputs | None,
        means("What the answer matches: one of `json`, `regex`, `choice`, `grammar` and `json_object`."),
    ] = None
    guided_json: Annotated[SchemaOrText | None, means("The answer is JSON that matches this schema.")] = None
    guided_regex: Annotated[str | None, means("The answer matches this regular expression as a whole.")] = None
    guided_choice: Annotated[Choices | None, means("The answer is one of these texts.")] = None
    guided_grammar: Annotated[str | None, means("The answer matches this grammar, GBNF or Lark.")] = None
    json_schema: Annotated[SchemaOrText | None, means("As `guided_json`.")] = None
    grammar: Annotated[str | None, means("As `guided_grammar`.")] = None
    stream: Annotated[bool | None, means("Respond with server-sent events.")] = None
    speculation: Annotated[
        bool | None, means("false leaves every token to the target; otherwise the planner decides in every round.")
    ] = None
    on_link_loss: Annotated[
        OnLinkLoss | None,
        means("Without a verifier: `wait` for one, let the `draft` continue alone, or `fail`. Default: as configured."),
    ] = None


class GenerationRequest(EndpointRequest, frozen=True, kw_only=True):
    """Fields that completions and chat completions accept."""

    max_tokens: Annotated[
        TokenCount | None,
        means("Tokens of the answer at most. Default, and -1: what the context leaves. 0: the prompt only."),
    ] = None
    n: Annotated[
        ChoiceCount | None, means("Number of answers to a prompt. Choice i is the answer with the seed `seed` + i.")
    ] = None
    response_format: Annotated[
        ResponseFormat | None,
        means("`json_schema`, `json_object` (with a `schema`, too) or `text`: the answer is JSON that matches."),
    ] = None
    stream_options: Annotated[StreamOptions | None, means("`include_usage`: a last chunk with the token counts.")] = (
        None
    )


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """The body of `POST /v1/completions`."""

    endpoint: ClassVar[EndpointName] = "completions"

    prompt: Annotated[
        str | list[str | int | list[int]],
        msgspec.Meta(extra_json_schema=PROMPT_SCHEMA),
        means("A text, the ids of its tokens, or a list of one or the other, each with `n` answers."),
    ]
    echo: Annotated[bool | None, means("Return the prompt before the answer.")] = None
    add_special_tokens: Annotated[
        bool | None, means("false does not begin a text with the tokenizer's special tokens, such as `<s>`.")
    ] = None
    logprobs: Annotated[
        TopCount | None,
        means("Return log-probabilities, of this many most probable tokens at each position, too; not with `echo`."),
    ] = None
    best_of: Annotated[
        ChoiceCount | None,
        means("Generate this many answers and return the `n` whose tokens are most probable on average. No stream."),
    ] = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """The body of `POST /v1/chat/completions`."""

    endpoint: ClassVar[EndpointName] = "chat"

    messages: Annotated[
        Annotated[list[ChatMessage], msgspec.Meta(min_length=1)],
        means("The conversation; content is a text or a list of text parts."),
    ]
    tools: Annotated[
        list[Annotated[dict[str, Any], msgspec.Meta(extra_json_schema=TOOL_SCHEMA)]] | None,
        means("Functions that the model may call. Arguments of calls match `parameters`, a JSON schema."),
    ] = None
    tool_choice: Annotated[
        ToolChoice | None,
        means("`auto`, `required` (calls alone), `none` (leaves out the tools), a function, or `allowed_tools`."),
    ] = None
    parallel_tool_calls: Annotated[bool | None, means("false: one call at most. Default: true.")] = None
    reasoning_effort: Annotated[
        str | None,
        means("For the chat template, as `reasoning_effort`; also sets `enable_thinking`, to false for `none`."),
    ] = None
    documents: Annotated[
        list[dict[str, Any]] | None, means("Texts for retrieval-augmented answers, for the chat template.")
    ] = None
    add_generation_prompt: Annotated[
        bool | None, means("Begin the assistant's message. Default: unless a message is continued.")
    ] = None
    continue_final_message: Annotated[
        bool | None, means("Continue the last message. Default: if it is the assistant's and has no calls.")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, means("Further variables of the chat template, such as `enable_thinking`.")
    ] = None
    max_completion_tokens: Annotated[TokenCount | None, means("The newer name of `max_tokens`.")] = None
    logprobs: Annotated[bool | None, means("Return the log-probability of every token.")] = None
    top_logprobs: Annotated[
        TopCount | None, means("Return those of this many most probable tokens at each position, too.")
    ] = None


R = TypeVar("R", bound=EndpointRequest)

# Path of the type of a part of a message, in an error.
PART_TYPE = re.compile(r"content\[[^]]*\]\.type$")


def parse_request(body: bytes, kind: type[R]) -> tuple[R, list[str]]:
    """Parse a request body.

    Returns:
        The request, and the names of the fields that were ignored.

    Raises:
        ApiError: (400) a field is invalid or refused; the error names it.
    """
    try:
        request = msgspec.json.decode(body, type=kind)
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise malformed_request(error) from None
    ignored = check_fields(fields, frozenset(kind.__struct_fields__), kind.endpoint)
    if request.seed is not None and not MIN_SEED <= request.seed <= MAX_SEED:
        raise ApiError(400, "seed is not a 64-bit integer", param="seed")
    return request, ignored


def malformed_request(error: Exception, parent: str = "") -> ApiError:
    """Return the error (400) of JSON that does not have the form of a struct.

    Args:
        error: msgspec's.
        parent: path of the value in the body; empty for the body itself.
    """
    match = re.fullmatch(r"(.*) - at `(?:key` in `)?\$\.?(.*)`", str(error), re.DOTALL)
    message, path = (match[1], match[2]) if match else (str(error), "")
    missing = re.search(r"missing required field `(.+)`", message)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
    path = ".".join(part for part in (parent, path) if part)
    if PART_TYPE.search(path) and message.startswith("Invalid enum value"):
        message = "this model reads texts only, no images, sounds or files: send parts of type text"
    if not path:
        return ApiError(400, f"the body is not a valid JSON request: {message}", code="invalid_json")
    return ApiError(400, f"{path}: {message}", param=path, code="invalid_parameter")
