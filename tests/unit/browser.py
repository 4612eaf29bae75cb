"""A real Chromium for the tests that open reports, which are skipped where there is none, or no playwright."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'kvprofile[browser]'"
)

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module", name="browser")
def started_browser():
    with playwright.sync_playwright() as started:
        own = Path(started.chromium.executable_path)
        path = next(filter(None, map(shutil.which, CHROMIUMS)), str(own) if own.exists() else None)
        if path is None:
            pytest.skip(
                f"no Chromium: none of {', '.join(CHROMIUMS)} is on the path, and playwright has installed none"
            )
        # In containers tests often run as root, which Chromium's sandbox refuses. The page is our own.
        launched = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def opened(browser, path, **options):
    """The page at `path`, and what it complained of and asked for, which at the end must be nothing."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    yield page
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    context.close()
