"""The verifier's models, as far as known: as it lists them now, else as it last did, else as configured."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from pathlib import Path

import msgspec

from edge_runtime.common.files import write_atomically
from edge_runtime.protocol.errors import VerifierUnreachable
from edge_runtime.protocol.messages import ModelList
from edge_runtime.service.openai_schema import OpenAIModel, OpenAIModelList
from edge_runtime.verifier import VerifierClient

log = logging.getLogger(__name__)

# How long a list from the verifier is not asked for again, and how long a request waits for a newer one: briefly if
# there is an older one. All chosen.
FRESH_SECONDS = 5.0
REFRESH_SECONDS, FIRST_SECONDS = 1.0, 5.0


class StoredModels(msgspec.Struct, frozen=True):
    """The file that keeps the models across restarts; `urls` are the verifiers that served them."""

    urls: list[str]
    models: list[OpenAIModel]


class KnownModels:
    """Lists the verifier's models at once whenever they are known, whether a verifier can be reached or not."""

    def __init__(self, client: VerifierClient, file: Path | None = None) -> None:
        """
        Args:
            file: where the list is kept across restarts; None for nowhere.
        """
        self._client = client
        self._file = file
        self._save_lock = threading.Lock()
        self._urls = [endpoint.url for endpoint in client.endpoints]
        self._models = self._load()
        # The verifier's list that `_models` was made from, and when `fetch` last asked for it.
        self._source: ModelList | None = None
        self._asked = float("-inf")
        self._asking: asyncio.Future[ModelList] | None = None
        # Versions of answers that were in no list when they came; each is a reason to ask only once.
        self._unlisted: set[str] = set()

    def context_of(self, model: str) -> int:
        """Return the longest text of a model in tokens; 0 if unknown.

        Args:
            model: an id or an exact version; empty for the verifier's default.
        """
        self._update()
        found = (known for known in self._models if not model or model in (known.id, known.version))
        return next((known.context for known in found), 0)

    def default(self) -> str:
        """Return the id of the verifier's default model; empty if unknown."""
        self._update()
        return next((known.id for known in self._models), "")

    def notice(self, version: str) -> None:
        """Ask for the models in the background if an answer came from a version that is not among them."""
        self._update()
        if version and version not in self._unlisted and all(version != model.version for model in self._models):
            self._unlisted.add(version)
            self._client.in_background(self._client.check())

    async def fetch(self, configured: str = "") -> OpenAIModelList:
        """Return the models, from the verifier if it answers soon.

        Args:
            configured: the configured target model; it is known to exist if nothing else is.

        Raises:
            VerifierError: nothing is known, and the verifier cannot be reached or refuses.
        """
        self._update()
        state = self._client.link_state
        if not self._models or (state.reachable is not False and time.monotonic() - self._asked > FRESH_SECONDS):
            seconds = REFRESH_SECONDS if self._models else FIRST_SECONDS
            try:
                if state.problem is not None:
                    raise VerifierUnreachable(state.problem.reason, state.problem.code)
                async with asyncio.timeout(seconds):
                    await self._ask()
            except (VerifierUnreachable, TimeoutError) as error:
                if not self._models and not configured:
                    if isinstance(error, VerifierUnreachable):
                        raise
                    message = f"no answer from {self._client.url} within {seconds:g} s; is it running, is the link up?"
                    raise VerifierUnreachable(message) from None
            self._update()
        return OpenAIModelList(self._models or [OpenAIModel(configured, int(time.time()), "", 0)])

    async def _ask(self) -> None:
        """Ask the verifier for its models; many at once ask it once."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._client.models())
        # Whoever gives up meanwhile takes it from nobody else.
        await asyncio.shield(self._asking)
        self._asked = time.monotonic()

    def _update(self) -> None:
        """Take over the list that the client received last."""
        latest = self._client.latest_models
        if latest is None or latest is self._source:
            return
        self._source = latest
        created = {model.version: model.created for model in self._models}
        now = int(time.time())
        models = [
            OpenAIModel(card.id, created.get(card.version, now), card.version, card.context) for card in latest.data
        ]
        if models != self._models:
            self._models = models
            # In a thread: writing to a card can take longer than the event loop may be held.
            self._saving = asyncio.ensure_future(asyncio.to_thread(self._save))

    def _load(self) -> list[OpenAIModel]:
        if self._file is None:
            return []
        try:
            stored = msgspec.json.decode(self._file.read_bytes(), type=StoredModels)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            # It is only a copy: the verifier has the list.
            return []
        return stored.models if stored.urls == self._urls else []

    def _save(self) -> None:
        if self._file is None:
            return
        try:
            # Whoever writes last writes the newest.
            with self._save_lock:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._file, msgspec.json.encode(StoredModels(self._urls, self._models)))
        except OSError as error:
            log.warning("cannot keep the list of models in %s: %s", self._file, error.strerror)
