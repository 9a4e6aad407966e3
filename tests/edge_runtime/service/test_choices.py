"""Several answers to one request, limits of their length, log-probabilities: by the `openai` client."""

from __future__ import annotations

import asyncio
import math

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service.state import ServiceLimits
from tests.conftest import FAMILY
from tests.edge_runtime.service.conftest import service_pair

pytestmark = pytest.mark.usefixtures("toy_bundle")

PROMPT = "def read_config(path):\n"
OTHER = "import os\n"
SAMPLED = {"model": "", "temperature": 0.9, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FAMILY / "target-v1", dtype=torch.float32)


def compute_logprobs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return transformers' log-probabilities of the token after each of `ids` (n,): (n, V)."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.slow
def test_choices_are_the_answers_of_successive_seeds(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt=PROMPT, n=3, seed=40, **SAMPLED)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.seed for choice in answer.choices] == [40, 41, 42]
    assert (answer.seed, len({choice.text for choice in answer.choices})) == (40, 3)
    single = [client.completions.create(prompt=PROMPT, seed=seed, **SAMPLED) for seed in (40, 41, 42)]
    assert [choice.text for choice in answer.choices] == [each.choices[0].text for each in single]
    assert answer.usage.prompt_tokens == single[0].usage.prompt_tokens
    assert answer.usage.completion_tokens == 36
    assert answer.timings["predicted_n"] == 36


@pytest.mark.slow
def test_a_stream_carries_all_choices_by_index(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=[{"role": "user", "content": "x"}], n=3, seed=7, **SAMPLED)
    stream = client.chat.completions.create(
        messages=[{"role": "user", "content": "x"}],
        n=3,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
        **SAMPLED,
    )
    *chunks, usage = list(stream)
    texts, finishes, roles = ["", "", ""], [None] * 3, [0, 0, 0]
    for chunk in chunks:
        (choice,) = chunk.choices
        assert finishes[choice.index] is None
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role is not None
        finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert (finishes, roles) == (["length"] * 3, [1, 1, 1])
    assert usage.usage.completion_tokens == 36
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.slow
def test_several_prompts_are_answered_as_if_alone(client: openai.OpenAI, draft: OnnxDraft) -> None:
    answer = client.completions.create(prompt=[PROMPT, OTHER], n=2, seed=5, echo=True, **SAMPLED)
    alone = [client.completions.create(prompt=each, n=2, seed=5, echo=True, **SAMPLED) for each in (PROMPT, OTHER)]
    assert [choice.text for choice in answer.choices] == [choice.text for each in alone for choice in each.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith(PROMPT)
    assert answer.choices[3].text.startswith(OTHER)
    assert answer.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone)
    ids = [draft.tokenizer.encode(each).ids for each in (PROMPT, OTHER)]
    by_ids = client.completions.create(prompt=ids, n=2, seed=5, echo=True, **SAMPLED)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in answer.choices]


@pytest.mark.slow
def test_best_of_returns_the_most_probable(client: openai.OpenAI) -> None:
    candidates = client.completions.create(prompt=PROMPT, n=4, seed=11, logprobs=0, **SAMPLED)
    means = [sum(choice.logprobs.token_logprobs) / 12 for choice in candidates.choices]
    order = sorted(range(4), key=lambda index: -means[index])
    best = client.completions.create(prompt=PROMPT, n=2, best_of=4, seed=11, **SAMPLED)
    assert [choice.text for choice in best.choices] == [candidates.choices[index].text for index in order[:2]]
    assert [choice.seed for choice in best.choices] == [11 + index for index in order[:2]]
    assert [choice.logprobs for choice in best.choices] == [None, None]
    assert best.usage.completion_tokens == 48


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_transformers(
    client: openai.OpenAI, draft: OnnxDraft, model: PreTrainedModel, stream: bool
) -> None:
    answer = client.completions.create(prompt=PROMPT, seed=3, logprobs=2, stream=stream, **SAMPLED)
    choices = [chunk.choices[0] for chunk in (list(answer) if stream else [answer])]
    text = "".join(choice.text for choice in choices)
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    tokens, values, offsets, tops = (
        [item for part in parts for item in getattr(part, name)]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs")
    )
    assert "".join(tokens) == text
    assert offsets == [len("".join(tokens[:index])) for index in range(12)]
    prompt = draft.tokenizer.encode(PROMPT).ids
    ids = draft.tokenizer.encode(PROMPT + text).ids[len(prompt) :]
    expected = compute_logprobs(model, prompt + ids)[len(prompt) - 1 : -1]
    for index, token in enumerate(ids):
        assert values[index] == pytest.approx(float(expected[index, token]), abs=1e-3)
        assert sorted(tops[index].values(), reverse=True) == pytest.approx(expected[index].topk(2).values, abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_has_log_probabilities_with_bytes(client: openai.OpenAI, stream: bool) -> None:
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": "x"}], seed=3, logprobs=True, top_logprobs=3, stream=stream, **SAMPLED
    )
    parts = list(answer) if stream else [answer]
    tokens = [token for part in parts if part.choices[0].logprobs for token in part.choices[0].logprobs.content]
    if stream:
        text = "".join(part.choices[0].delta.content or "" for part in parts)
    else:
        text = answer.choices[0].message.content
    assert len(tokens) == 12
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == text
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.logprob
        assert math.exp(token.logprob) <= 1
    assert parts[-1].timings["logprobs_bytes"] > 12


def test_a_stop_string_cuts_the_log_probabilities(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, seed=3, logprobs=0, **SAMPLED).choices[0]
    stop = whole.text[5:9]
    cut = client.completions.create(prompt=PROMPT, seed=3, logprobs=0, stop=stop, **SAMPLED).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    count = sum(offset < len(cut.text) for offset in whole.logprobs.text_offset)
    assert cut.logprobs.tokens == whole.logprobs.tokens[:count]
    options = SAMPLED | {"extra_body": {"ignore_eos": True, "include_stop_str_in_output": True}}
    kept = client.completions.create(prompt=PROMPT, seed=3, stop=stop, **options).choices[0]
    assert kept.text == whole.text[: whole.text.index(stop) + len(stop)]


def test_stop_tokens_end_the_text_and_are_not_shown(client: openai.OpenAI, draft: OnnxDraft) -> None:
    whole = client.completions.create(prompt=PROMPT, temperature=0, max_tokens=12, model="").choices[0].text
    prompt = draft.tokenizer.encode(PROMPT).ids
    ids = draft.tokenizer.encode(PROMPT + whole).ids[len(prompt) :]
    token = ids[6]
    end = ids.index(token)
    for include in (False, True):
        extra = {"stop_token_ids": [token], "include_stop_str_in_output": include}
        answer = client.completions.create(
            prompt=PROMPT, temperature=0, max_tokens=12, model="", logprobs=0, extra_body=extra
        )
        shown = draft.tokenizer.decode(ids[: end + include])
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (shown, "stop")
        assert len(answer.choices[0].logprobs.tokens) == end + include


def test_no_tokens_return_the_prompt_alone(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt=[PROMPT, OTHER], max_tokens=0, echo=True, model="")
    assert [choice.text for choice in answer.choices] == [PROMPT, OTHER]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage.completion_tokens == 0
    *chunks, last = list(client.completions.create(prompt=PROMPT, max_tokens=0, echo=True, model="", stream=True))
    assert ["".join(chunk.choices[0].text for chunk in chunks), last.choices[0].finish_reason] == [PROMPT, "length"]


@pytest.mark.slow
async def test_an_answer_fills_the_context_by_default(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        await pair.client.models.list()
        long = [5] * (target.context - 20)
        for asked in (None, -1, 500):
            answer = await pair.client.completions.create(
                model="", prompt=long, temperature=0, max_tokens=asked, extra_body={"ignore_eos": True}
            )
            assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("length", target.context)
        with pytest.raises(openai.BadRequestError) as caught:
            await pair.client.completions.create(model="", prompt=long * 2)
        assert caught.value.code == "context_length_exceeded"
        assert f"maximum context length is {target.context} tokens. However, your prompt" in str(caught.value)


@pytest.mark.slow
async def test_a_context_that_is_not_known_yet_gives_the_same(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        assert pair.service.state.models.context_of("") == 0
        with pytest.raises(openai.BadRequestError) as caught:
            await pair.client.completions.create(model="", prompt=[5] * (target.context + 10))
        assert caught.value.code == "context_length_exceeded"
        assert f"maximum context length is {target.context - 1} tokens. However, the prompt has" in str(caught.value)
        prompt = [5] * (target.context - 10)
        answer = await pair.client.completions.create(model="", prompt=prompt, extra_body={"ignore_eos": True})
        assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("length", target.context)


@pytest.mark.slow
async def test_more_choices_than_slots_take_turns_with_other_requests(target: Target, draft: OnnxDraft) -> None:
    limits = ServiceLimits(max_concurrent=1, max_waiting=8)
    async with service_pair(target, draft, limits) as pair:
        many = pair.client.completions.create(prompt=PROMPT, n=5, seed=1, **SAMPLED)
        others = [pair.client.completions.create(prompt=OTHER, seed=seed, **SAMPLED) for seed in range(3)]
        answer, *rest = await asyncio.gather(many, *others)
        assert len({choice.text for choice in answer.choices}) == 5
        assert all(each.usage.completion_tokens == 12 for each in rest)
        with pytest.raises(openai.BadRequestError):
            await pair.client.completions.create(prompt=PROMPT, n=10, **SAMPLED)
        assert (pair.service.queue.running, pair.service.queue.waiting) == (0, 0)


@pytest.mark.slow
async def test_further_choices_do_not_prefill_the_prompt_again(target: Target, draft: OnnxDraft) -> None:
    prompt = [5 + index % 300 for index in range(400)]
    async with service_pair(target, draft, ServiceLimits(max_concurrent=3)) as pair:
        stream = await pair.client.completions.create(prompt=prompt, n=3, seed=1, stream=True, **SAMPLED)
        cached = {}
        async for chunk in stream:
            if chunk.choices[0].finish_reason:
                cached[chunk.choices[0].index] = chunk.timings["cache_n"]
    assert cached[0] == 0
    assert min(cached[1], cached[2]) > len(prompt) // 2
