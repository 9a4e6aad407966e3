"""The special tokens of a checkpoint, as transformers reads them from its tokenizer's files. No tokenizer is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edge_runtime.protocol.errors import TargetError

CONFIG_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_FILE = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
# transformers' `SPECIAL_TOKENS_ATTRIBUTES`.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FURTHER_ROLE = "additional_special_tokens"


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file. Raises TargetError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{file} cannot be read ({error}); copy the model again") from None
    if not isinstance(content, dict):
        raise TargetError(f"{file} is not a JSON object; copy the model again")
    return content


def read_special_tokens(directory: Path) -> dict[str, str | list[str]]:
    """Return the special tokens' texts by role, such as `bos_token`: what a chat template is given. Raises TargetError.

    As in transformers, `special_tokens_map.json` counts only for tokenizers that were saved without their added tokens.
    """
    config = read_json_object(directory / CONFIG_FILE)
    values = dict(config)
    if "added_tokens_decoder" not in config:
        values |= read_json_object(directory / SPECIAL_TOKENS_FILE)
    extra = config.get("extra_special_tokens")
    # Roles of the model's own, such as `image_token`; in transformers 5 also a list of further tokens.
    named = {str(role): value for role, value in extra.items()} if isinstance(extra, dict) else {}
    tokens: dict[str, str | list[str]] = {}
    for role, value in {**{role: values.get(role) for role in ROLES}, **named}.items():
        if text := _token_text(value):
            tokens[role] = text
    further = values.get(FURTHER_ROLE)
    if isinstance(further, list) and (texts := [text for token in further if (text := _token_text(token))]):
        tokens[FURTHER_ROLE] = texts
    return tokens


def ends_of_tokenizer(directory: Path) -> frozenset[int]:
    """Return the id of the tokenizer's `eos_token`, if it has one; raises TargetError.

    It ends a text as well as the tokens of `generation_config.json`, which some checkpoints lack: vLLM does the same.
    """
    end = read_special_tokens(directory).get("eos_token")
    if not isinstance(end, str):
        return frozenset()
    added = read_json_object(directory / CONFIG_FILE).get("added_tokens_decoder")
    if isinstance(added, dict):
        for index, token in added.items():
            if _token_text(token) == end and str(index).isdecimal():
                return frozenset([int(index)])
    if not (directory / TOKENIZER_FILE).is_file():
        return frozenset()
    try:
        tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    except Exception as error:  # tokenizers raises bare Exception
        raise TargetError(f"{directory / TOKENIZER_FILE} is not a tokenizer: {error}") from None
    identity = tokenizer.token_to_id(end)
    return frozenset() if identity is None else frozenset([identity])


def _token_text(token: Any) -> str:
    """Return the text of a special token: a string, or an `AddedToken` as an object; empty if it is neither."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
