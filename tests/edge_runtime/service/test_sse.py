"""Server-sent events stay on one line for every client, whatever it takes for the end of a line."""

from __future__ import annotations

import json

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.service.sse import encode_event


class TextMessage(msgspec.Struct):
    text: str


@given(st.text())
@example('a\x85b\u2028c\u2029d\x1e\x0b\x0c\r\n"')
def test_an_event_is_one_line_for_every_client(text: str) -> None:
    event = encode_event(TextMessage(text))
    line, *rest = event.decode().splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == {"text": text}
