"""Makes the generations of `generate` and `chat` from their options, with a planner that remembers what it learned."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from edge_runtime.cli.planner_options import (
    add_planner_options,
    add_planner_state_option,
    make_planner,
    open_planner_state,
    run_probes,
)
from edge_runtime.cli.settings_options import add_config_option, add_removed_options
from edge_runtime.cli.verifier_client import add_verifier_options, make_client

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from edge_runtime.decoding import Generation
    from edge_runtime.draft import OnnxDraft
    from edge_runtime.protocol.sampling import Sampling
    from edge_runtime.settings import Settings
    from edge_runtime.verifier import VerifierClient


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of verifier and planner."""
    add_config_option(parser)
    add_verifier_options(parser)
    add_planner_options(parser)
    add_planner_state_option(parser)
    add_removed_options(parser)


class GenerationFactory:
    """Makes generations with one draft and planner.

    Args:
        options: the parsed options of `add_generation_options`, with `max_new_tokens`.
        settings: the settings that they belong to.

    Raises:
        InputError: the planner's options are unusable.
    """

    def __init__(self, options: argparse.Namespace, settings: Settings, draft: OnnxDraft) -> None:
        self._settings, self._draft = settings, draft
        self._max_new_tokens: int = options.max_new_tokens
        self._planner = make_planner(options, settings.planner, draft)
        self._planner_state = open_planner_state(settings.planner, draft.manifest)
        self._planner_state.restore(self._planner)

    @contextlib.asynccontextmanager
    async def connect(
        self, settings: Settings, sampling: Sampling
    ) -> AsyncIterator[tuple[VerifierClient, Callable[[list[int]], Generation]]]:
        """Connect to the verifier of `settings`; yield the client, and a function that continues a prompt.

        What the planner learned is saved at the end, unless an exception ends the block.
        """
        from edge_runtime.decoding import Generation

        async with make_client(settings.verifier) as client, run_probes(client.meter, settings.planner) as surroundings:

            def generate(prompt: list[int]) -> Generation:
                return Generation(
                    self._draft,
                    client,
                    prompt,
                    sampling,
                    max_new_tokens=self._max_new_tokens,
                    planner=self._planner,
                    model=settings.verifier.model,
                    surroundings=surroundings,
                    on_link_loss=settings.service.on_link_loss,
                )

            yield client, generate
        self._planner_state.save(self._planner)
