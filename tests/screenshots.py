"""The pictures of a running coordinator's dashboard that are in docs/: a desk in light colours and a phone in dark ones.

python -m tests.screenshots http://127.0.0.1:7473/ docs
"""

from __future__ import annotations

from pathlib import Path
import sys

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.test_dashboard import CHROMIUM, PATIENCE

#: File -> colours, width and height in CSS pixels.
PICTURES = {"dashboard.png": ("light", 1100, 1120), "dashboard-phone.png": ("dark", 390, 1180)}
#: Beginning of the text that the model is asked to go on with.
TEXT = '    def read(self, name):\n        """Return the'


def main(url: str, directory: str) -> None:
    """Ask the model something, and take every picture when it has answered."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.goto(url)
        _ask(page)
        for name, (scheme, width, height) in PICTURES.items():
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(500)  # The charts are drawn anew for the width.
            path = Path(directory) / name
            page.screenshot(path=path)
            with Image.open(path) as picture:
                picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        browser.close()


def _ask(page: Page) -> None:
    page.locator("#prompt").fill(TEXT)
    page.locator("#go").click(timeout=PATIENCE)
    expect(page.locator("#asked")).to_contain_text("token", timeout=PATIENCE)


if __name__ == "__main__":
    main(*sys.argv[1:])
