"""Make the pictures of docs/page.md anew: a page is served, a browser visits it, WebP files come out.

    python docs/screenshots.py MODEL [MODEL2] [--output_dir docs]

MODEL needs the mean voice for the speaker's tab; MODEL2 stands beside it in the picture of two systems. The recordings
are synthetic voices (eSpeak NG, the extra demo). It wants Chromium and the extra browser, as `make browser` does.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from sailer.inference.page import PageSettings, served
from sailer.inference.page_parts.examples import EXAMPLES, make_examples

CLIP = "broken promise"  # of the page's examples
SPOKEN = [("Neutral", 0), ("Happy", 2), ("Surprise", 3), ("Fear", 1), ("Disgust", 2), ("Happy", 4)]  # in its voice
LARGEST = 300_000  # bytes of a picture
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
PATIENCE_MS = 120_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a system")
    parser.add_argument("second", nargs="?", help="of another one")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        sys.exit("no Chromium here (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        clip = Path(place, f"{CLIP}.wav")
        make_examples(Path(place), {clip.name: EXAMPLES[clip.name]})
        voice = EXAMPLES[clip.name][0]
        recordings = [*make_examples(Path(place), {f"{said} {n}.wav": (voice, [(said, n)]) for said, n in SPOKEN})]
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        folder = arguments.output_dir
        with served(PageSettings([arguments.model], port=0)) as address:
            with visited(browser, address, "light") as page:
                judge(page, clip)
                keep(page, folder / "page_light.webp")
            with visited(browser, address, "dark") as page:
                judge(page, clip)
                keep(page, folder / "page_dark.webp")
            with visited(browser, address, "light", width=390) as page:
                judge(page, clip)
                keep(page, folder / "page_narrow.webp")
            with visited(browser, address, "light") as page:
                adapt(page, recordings, clip)
                keep(page, folder / "page_speaker.webp")
        if arguments.second is not None:
            both = PageSettings([arguments.model, arguments.second], port=0)
            with served(both) as address, visited(browser, address, "light") as page:
                judge(page, clip)
                keep(page, folder / "page_two.webp")
        browser.close()
    return 0


@contextmanager
def visited(browser: Browser, address: str, theme: str, width: int = 1200) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": width, "height": 800})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{address}?__theme={theme}")
    page.get_by_role("button", name="Analyse").wait_for()
    yield page
    context.close()


def judge(page: Page, clip: Path) -> None:
    """The recording's tab, once it has an answer."""
    page.locator("input[type=file]").first.set_input_files(clip)
    page.locator("#sailer-results .sailer-results").wait_for()


def adapt(page: Page, recordings: list[Path], clip: Path) -> None:
    """The speaker's tab, once it shows before and after."""
    page.get_by_role("tab", name="A speaker").click()
    with page.expect_file_chooser() as chosen:
        page.get_by_role("button", name="Choose recordings").click()
    chosen.value.set_files(recordings)
    page.get_by_text(f"{len(recordings)} chosen").wait_for()
    page.locator("#sailer-speaker-clip input[type=file]").set_input_files(clip)
    page.locator("#sailer-speaker-clip .component-wrapper").wait_for()
    page.get_by_role("button", name="Before and after").click()
    page.locator("#sailer-speaker-results .sailer-results").wait_for()


def keep(page: Page, path: Path) -> None:
    """The whole page, without loss; raises ValueError where that is larger than pictures may be."""
    page.wait_for_timeout(1500)  # the waveform is drawn, and what was fading is gone
    Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB").save(path, lossless=True, quality=100)
    size = path.stat().st_size
    print(f"{path}: {size // 1000} kB")
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes, more than {LARGEST}.")


if __name__ == "__main__":
    sys.exit(main())
