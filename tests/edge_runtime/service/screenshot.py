"""Makes the README's picture of the dashboard: `python -m tests.edge_runtime.service.screenshot`.

A real service and verifier answer in a real browser. The sensor readings are those recorded on a Raspberry Pi with a
UPS hat.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from PIL import Image

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import Surroundings
from edge_runtime.probes.snapshot import Prober
from edge_runtime.probes.tcp import ByteMeter
from edge_runtime.service.dashboard import STATIC_DIRECTORY
from tests.conftest import FAMILY
from tests.edge_runtime.probes.conftest import BOARDS, roots_of
from tests.edge_runtime.service.browser import Tab, chromium
from tests.edge_runtime.service.conftest import BUNDLE, service_pair

PROMPTS = ("def read_config(path):\n", "import os\n", "class Queue:\n")
# Palette size of the file. The page has few colors, and a small file loads fast; chosen.
PALETTE_COLORS = 128


def take_screenshot(url: str, path: Path) -> None:
    """Send a few prompts to the dashboard at `url` and save a screenshot."""
    with chromium() as browser:
        tab = Tab(browser, url, width=1280, height=960)
        tab.wait_for_state("live")
        for _ in range(3):
            for prompt in PROMPTS:
                tab.ask(prompt, 0, 96)
                tab.page.wait_for_timeout(1500)
        tab.page.evaluate("document.activeElement.blur()")
        tab.page.screenshot(path=path)
        tab.close()
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(PALETTE_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


async def main() -> None:
    """Save the picture among the files of the page."""
    target = Target(FAMILY / "target-v1", device="cpu", dtype=torch.float32)
    recorded = Prober(roots_of(BOARDS / "ups-hat")).take()
    meter: ByteMeter | None = None

    def surroundings() -> Surroundings:
        return recorded.surroundings(meter.info if meter else None)

    async with service_pair(target, OnnxDraft.load(BUNDLE), surroundings=surroundings) as pair:
        # The round-trip time is measured on the connection to the verifier.
        meter = pair.service.client.meter
        await asyncio.to_thread(take_screenshot, pair.url, STATIC_DIRECTORY / "dashboard.png")


if __name__ == "__main__":
    asyncio.run(main())
