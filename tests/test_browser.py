"""The pages that the scripts write, opened in Chromium at the width of a desktop and of a phone.

They need chromium (or google-chrome) and chromedriver, Debian's chromium and chromium-driver, and are skipped without
them; with BROWSER=required in the environment that is a failure.
"""

import importlib.util
import os
import shutil

import pytest
from conftest import run

WIDTHS = {"desktop": 1280, "phone": 360}
OFF = ("gpu", "background-networking", "component-update", "sync")
FLAGS = ["--headless=new", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in OFF)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
    if not all(programs) or not importlib.util.find_spec("selenium"):
        how = "needs chromium, chromedriver and selenium"
        assert os.environ.get("BROWSER") != "required", how
        pytest.skip(how)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(trained, birds, tmp_path_factory):
    """{name: path} of a page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    best, images = f"--pretrained_model={trained / 'ResNet8' / 'best'}", os.path.join(birds.root, "images")
    run("eval.py", best, f"--report={folder / 'report.html'}", "--use_gpu=False")
    flags = [f"--input={birds.val_list}", f"--gallery={images}", f"--neighbours_file={folder / 'sheet.html'}"]
    run("infer.py", best, *flags, "--use_gpu=False")
    return {name: folder / f"{name}.html" for name in ("report", "sheet")}


def show(browser, path, width):
    """Opens a page, `width` pixels wide, as a phone does where that is little."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")  # forgets what was there
    browser.get(f"file://{path}")


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("page", ["report", "sheet"])
def test_page_fits_and_is_complete(browser, pages, page, width):
    show(browser, pages[page], width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return innerWidth") == width
    sizes = browser.execute_script("const r = document.documentElement; return [r.scrollWidth, r.clientWidth]")
    assert sizes[0] == sizes[1]
    wide = "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg') && "
    assert (
        browser.execute_script(wide + "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)") == []
    )
    loaded = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(loaded) > 20 and all(loaded)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_text_in_charts_can_be_read(browser, pages, width):
    show(browser, pages["report"], width)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect())"
        ".map(r => Math.min(r.width, r.height)).filter(s => s > 0)"
    )
    assert len(heights) > 20 and min(heights) >= 5
    size = browser.execute_script(
        "const s = document.querySelector('svg'); return s.getBoundingClientRect().width / 480 * 13"
    )
    assert size >= 9


def test_report_is_reachable_by_keyboard(browser, pages):
    from selenium.webdriver.common.keys import Keys

    show(browser, pages["report"], WIDTHS["phone"])
    links = browser.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.textContent)")
    reached, focused = [], "return [document.activeElement.tagName, document.activeElement.textContent]"
    for _ in range(len(links) + 2):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(tuple(browser.execute_script(focused)))
    assert reached[: len(links)] == [("A", name) for name in links]
    assert [tag for tag, _ in reached[len(links) :]] == ["DIV", "DIV"]  # the two tables, which scroll by themselves
    # A link goes to its section.
    show(browser, pages["report"], WIDTHS["phone"])
    for _ in links:
        browser.switch_to.active_element.send_keys(Keys.TAB)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    place = browser.execute_script("return document.querySelector('#map').getBoundingClientRect().top")
    at_end = browser.execute_script("return scrollY + innerHeight >= document.documentElement.scrollHeight - 2")
    assert browser.execute_script("return location.hash") == "#map" and (abs(place) < 5 or at_end)
