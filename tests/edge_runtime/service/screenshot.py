"""Makes the README's picture of the page: `python -m tests.edge_runtime.service.screenshot`.

A real service and a verifier of the example family's target answer in a real browser. The sensor readings are those
recorded on a Raspberry Pi with a UPS hat.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from PIL import Image

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Plan, Surroundings
from edge_runtime.probes.snapshot import Prober
from edge_runtime.probes.tcp import ByteMeter
from edge_runtime.service.chat_template import load_chat_template
from edge_runtime.service.dashboard import STATIC_DIRECTORY
from export.data.questions import EVERYDAY_QUESTIONS
from export.example_family.prepare import prepare_family
from tests.edge_runtime.probes.conftest import BOARDS, roots_of
from tests.edge_runtime.service.browser import Tab, chromium
from tests.edge_runtime.service.conftest import service_pair

QUESTIONS = (EVERYDAY_QUESTIONS[2], EVERYDAY_QUESTIONS[4], EVERYDAY_QUESTIONS[0])
# Chosen: on one machine the verifier computes few positions much faster than many.
PLAN = Plan(3, siblings=1, sibling_confidence=0.5, reason="fixed")
# Palette size of the file. The page has few colors, and a small file loads fast; chosen.
PALETTE_COLORS = 128


def take_screenshot(url: str, path: Path) -> None:
    """Ask a few questions on the page at `url` and save a screenshot; the last answer is in view."""
    with chromium() as browser:
        tab = Tab(browser, url, width=1280, height=860)
        tab.wait_for_state("live")
        tab.set_settings(temperature=0)
        for question in QUESTIONS:
            tab.ask(question)
            tab.page.wait_for_timeout(1500)
        tab.page.evaluate("document.activeElement.blur()")
        tab.page.screenshot(path=path)
        tab.close()
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(PALETTE_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


async def main() -> None:
    """Save the picture among the files of the page."""
    family = prepare_family()
    target = Target(family / "target-v1", device="cpu", dtype=torch.float32)
    recorded = Prober(roots_of(BOARDS / "ups-hat")).take()
    meter: ByteMeter | None = None

    def surroundings() -> Surroundings:
        return recorded.surroundings(meter.info if meter else None)

    draft, chat_template = OnnxDraft.load(family / "bundle"), load_chat_template(family / "bundle")
    planner = FixedPlanner(PLAN)
    async with service_pair(
        target, draft, planner=planner, chat_template=chat_template, surroundings=surroundings
    ) as pair:
        # The round-trip time is measured on the connection to the verifier.
        meter = pair.service.client.meter
        await asyncio.to_thread(take_screenshot, pair.url, STATIC_DIRECTORY / "dashboard.png")


if __name__ == "__main__":
    asyncio.run(main())
