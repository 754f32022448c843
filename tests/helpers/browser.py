"""A headless Chromium for the tests of pages, and for their pictures."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


def find() -> tuple[str, str] | None:
    """Chromium, or Chrome, and its driver; None unless both are installed."""
    browsers = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, browsers)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextlib.contextmanager
def opened(*, scale: float = 1.0) -> Iterator[webdriver.Chrome]:
    """A browser that keeps what a page logs and what it asks the network for.

    Args:
      scale: device pixels a pixel.
    """
    browser, driver = find()
    options = Options()
    options.binary_location = browser
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    with tempfile.TemporaryDirectory() as profile:
        flags = (*_FLAGS, f"--user-data-dir={profile}")
        for flag in (*flags, f"--force-device-scale-factor={scale}"):
            options.add_argument(flag)
        service = Service(executable_path=driver, log_output=os.devnull)
        chrome = webdriver.Chrome(options=options, service=service)
        try:
            yield chrome
        finally:
            chrome.quit()


def look(
    chrome: webdriver.Chrome, width: int, height: int, *, dark: bool = False
) -> None:
    """Sets the size of the window's inside, and the theme that it asks for."""
    sizes = {"width": width, "height": height, "deviceScaleFactor": 0, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    calm = {"name": "prefers-reduced-motion", "value": "reduce"}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, calm]})


def visit(chrome: webdriver.Chrome, page: pathlib.Path, fragment: str = "") -> None:
    """Opens a file anew, also if it is open with another fragment."""
    chrome.get("about:blank")
    chrome.get(page.absolute().as_uri() + fragment)
