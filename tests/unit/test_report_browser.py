"""The reports of real models as a browser shows them. Skipped where there is no playwright or no Chromium."""

from pathlib import Path

import pytest

from kvprofile.report.html import read_subject, write_report
from tests.unit.browser import opened, started_browser  # noqa: F401  # the fixture `browser`

PROFILES = Path(__file__).parents[2] / "profiles"

# Labels of the visible figures: pairs that overlap by more than a hair, and labels that leave their figure.
COLLISIONS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('figure svg')) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const labels = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    for (const [text, box] of labels)
      if (box.left < frame.left - 2 || box.right > frame.right + 2 || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)
        found.push(`${svg.closest('figure').id}: ${text} leaves the figure`);
    for (let i = 0; i < labels.length; i++)
      for (let j = i + 1; j < labels.length; j++) {
        const [a, b] = [labels[i][1], labels[j][1]];
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 4) found.push(`${svg.closest('figure').id}: ${labels[i][0]} on ${labels[j][0]}`);
      }
  }
  return found;
}"""

# The lowest contrast of any text with the page, by WCAG's formula; text on coloured cells is left out.
CONTRAST = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = colour => {
    const [r, g, b] = numbers(colour).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = luminance(getComputedStyle(document.body).backgroundColor);
  const ratio = colour => {
    const ink = luminance(colour);
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
  };
  const text = [...document.querySelectorAll('h1, h2, h3, p, dt, dd, td, th, nav a, .tile *')]
    .map(e => getComputedStyle(e).color);
  const labels = [...document.querySelectorAll('.damage text, .ratios text, .distance text, .wall text')]
    .map(e => getComputedStyle(e).fill);
  return Math.min(...[...text, ...labels].map(ratio));
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    subjects = [read_subject(PROFILES / f"{name}.json") for name in ("smollm2-135m", "gemma3-270m")]
    written = {subject.name: write_report([subject], folder / f"{subject.name}.html") for subject in subjects}
    return {**written, "both": write_report(subjects, folder / "both.html")}


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m", "both"])
def test_a_report_is_legible_and_fetches_nothing(name, theme, width, browser, pages):
    viewport = {"width": width, "height": 900}
    with opened(browser, pages[name], viewport=viewport, color_scheme=theme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert (
            page.evaluate(
                "[...document.querySelectorAll('.table')].filter(t => t.scrollWidth > t.clientWidth + 1).length"
            )
            == 0
        )
        assert page.evaluate(COLLISIONS) == []
        assert page.evaluate(CONTRAST) >= 4.5
        shown = {"wide" if width == 1280 else "narrow"} | ({"both"} if name == "both" else set())
        visible = page.evaluate(
            "[...document.querySelectorAll('figure > div')].filter(d => d.offsetParent).map(d => d.className)"
        )
        assert set(visible) == shown


def test_the_button_changes_the_theme_and_print_is_light(browser, pages):
    context = browser.new_context(color_scheme="light")
    page = context.new_page()
    page.goto(pages["smollm2-135m"].as_uri())
    paper = "getComputedStyle(document.body).backgroundColor"
    curve = "getComputedStyle(document.querySelector('.damage path[style*=\"light-dark\"]')).stroke"
    light, drawn = page.evaluate(paper), page.evaluate(curve)
    page.click("#theme")
    assert page.evaluate(paper) != light
    assert page.evaluate(curve) != drawn
    page.emulate_media(media="print")
    assert page.evaluate(paper) == light
    page.emulate_media(media="screen")
    page.click("#theme")
    assert page.evaluate(paper) == light
    context.close()


def test_the_text_of_figures_can_be_selected(browser, pages):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(pages["smollm2-135m"].as_uri())
    page.keyboard.press("Control+A")
    selected = page.evaluate("getSelection().toString()")
    for words in ("budget: slots kept", "mean cosine of keys", "slots kept"):
        assert words in selected
    context.close()
