"""The chat of notebook 06, in a real headless Chromium through JupyterLab."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync""".split()
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on loopback, started and stopped here; yields its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    home = tmp_path_factory.mktemp("lab")
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
        "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
        "--IdentityProvider.token=", "--ServerApp.password=",
        "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={ROOT}",
    ]  # fmt: skip
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(home)}
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail((home / "lab.log").read_text()[-2000:])
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture(scope="module")
def page(lab):
    """A copy of the notebook in a browser, with all its cells run. (JupyterLab saves
    what it has open, so it does not get the original.)"""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, (
        "install Debian's chromium for this test (apt-get install chromium)"
    )
    from playwright.sync_api import sync_playwright

    (ROOT / "runs").mkdir(exist_ok=True)
    shutil.copy(ROOT / "notebooks/06_live_chat.ipynb", ROOT / "runs/06_browser.ipynb")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{lab}/lab/tree/runs/06_browser.ipynb?reset")
        page.wait_for_function("window.jupyterapp !== undefined", timeout=60_000)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        # Before its kernel is ready, JupyterLab drops what it is told to run.
        page.wait_for_function(
            "window.jupyterapp.shell.currentWidget?.sessionContext?.isReady"
            " && window.jupyterapp.shell.currentWidget.sessionContext"
            ".kernelDisplayStatus === 'idle'",
            timeout=120_000,
        )
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        find_window(page).wait_for(state="attached", timeout=240_000)
        page.wait_for_timeout(3000)
        yield page
        browser.close()


def find_window(page):
    return page.locator(".jp-OutputArea-output", has_text="For real complaints").last


@pytest.fixture
def window(page):
    """The chat window with a new patient."""
    from playwright.sync_api import expect

    window = find_window(page)
    expect(window).to_contain_text("Not medical advice")
    wait_for_the_doctor(window)
    button(window, "New patient").click()
    expect(window.locator("text=doctor:")).to_have_count(1, timeout=30_000)
    expect(window).to_contain_text("What brings you here today?")
    expect(window.locator("textarea")).to_have_value("")
    return window


def save_picture(window, name):
    shot = ROOT / "runs" / f"{name}.png"
    window.scroll_into_view_if_needed()
    window.screenshot(path=str(shot))
    assert shot.stat().st_size > 10_000


def button(window, name):
    return window.get_by_role("button", name=name, exact=True)


def wait_for_the_doctor(window):
    """Until the doctor has spoken and another message can be sent."""
    from playwright.sync_api import expect

    expect(button(window, "Stop")).to_be_hidden(timeout=30_000)


def test_a_person_talks_with_the_doctor(page, window):
    from playwright.sync_api import expect

    box = window.locator("textarea")
    box.fill("I have an itchy skin")
    box.press("Enter")
    expect(window).to_contain_text("you: I have an itchy skin", timeout=30_000)
    expect(button(window, "Stop")).to_be_visible()
    expect(window.locator("text=doctor:")).to_have_count(2, timeout=30_000)
    wait_for_the_doctor(window)
    expect(window).to_contain_text("Belief if it had to decide now")
    expect(window).to_contain_text("Question 1 of 5")
    expect(box).to_have_value("")  # ready for the next message

    box.fill("yes <b>bold</b>, and a crushing chest pain")
    button(window, "Send").click()
    expect(window).to_contain_text("<b>bold</b>", timeout=30_000)
    expect(window.locator("text=you:")).to_have_count(2)  # said once, not twice
    expect(window).to_contain_text("This can be an emergency", timeout=30_000)
    expect(window.locator("text=doctor:")).to_have_count(2)  # it asks no more
    save_picture(window, "06_red_flag")
    button(window, "I have read this, go on").click()
    expect(window.locator("text=doctor:")).to_have_count(3, timeout=30_000)
    for n in range(4, 7):
        wait_for_the_doctor(window)
        button(window, "No").click()
        expect(window.locator("text=doctor:")).to_have_count(n, timeout=30_000)
    wait_for_the_doctor(window)
    for _ in range(2):  # the first press may add a second emergency, confirmed here
        if button(window, "No").is_visible() and button(window, "No").is_enabled():
            button(window, "No").click()
        if (confirm := button(window, "I have read this, go on")).is_visible():
            confirm.click()
        page.wait_for_timeout(1000)
        wait_for_the_doctor(window)
    expect(window).to_contain_text("The end", timeout=30_000)
    save_picture(window, "06_live_chat")

    button(window, "New patient").click()
    expect(window.locator("text=doctor:")).to_have_count(1, timeout=30_000)
    expect(window).not_to_contain_text("This can be an emergency")


def test_words_appear_one_by_one_and_can_be_stopped(page, window):
    """What the transcript shows while the doctor speaks, seen from the page."""
    from playwright.sync_api import expect

    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            for (const log of document.querySelectorAll('[role=log]'))
                window.seen.push([Date.now(), log.innerText.split('\\n').pop()]);
        }).observe(document.body, {subtree: true, childList: true}) }"""
    )
    start = page.evaluate("Date.now()")
    button(window, "I have a headache.").click()
    expect(window.locator("text=doctor:")).to_have_count(2, timeout=30_000)
    wait_for_the_doctor(window)
    seen = page.evaluate("window.seen")
    growing = list(dict.fromkeys(x for _, x in seen if x.endswith("…")))
    assert len(growing) >= 3 and growing[0] == "doctor: …", growing
    print("first word after", min(t for t, x in seen if x.endswith("…")) - start, "ms")

    button(window, "Yes").click()
    button(window, "Stop").click()
    expect(window.locator("textarea")).to_have_value("Yes.", timeout=30_000)
    expect(window.locator("text=you:")).to_have_count(1)
    button(window, "Send").click()
    expect(window.locator("text=you:")).to_have_count(2, timeout=30_000)
    wait_for_the_doctor(window)
    button(window, "Undo").click()
    expect(window.locator("text=you:")).to_have_count(1, timeout=30_000)


def test_many_quick_clicks_send_once(window):
    from playwright.sync_api import expect

    window.locator("textarea").fill("I have a headache")
    window.get_by_role("checkbox").first.focus()
    button(window, "Send").evaluate("b => { for (let i = 0; i < 50; i++) b.click() }")
    expect(window.locator("text=doctor:")).to_have_count(2, timeout=30_000)
    wait_for_the_doctor(window)
    expect(window.locator("text=you:")).to_have_count(1)


def test_keyboard_alone_narrow_and_dark(page, window):
    from playwright.sync_api import expect

    button(window, "I have a headache.").focus()
    page.keyboard.press("Enter")
    expect(window.locator("text=doctor:")).to_have_count(2, timeout=30_000)
    wait_for_the_doctor(window)
    button(window, "No").focus()
    page.keyboard.press("Space")
    expect(window.locator("text=you:")).to_have_count(2, timeout=30_000)
    wait_for_the_doctor(window)
    page.set_viewport_size({"width": 700, "height": 1000})
    theme = "window.jupyterapp.commands.execute('apputils:change-theme', {theme: '%s'})"
    page.evaluate(theme % "JupyterLab Dark")
    page.wait_for_timeout(2500)
    halves = [window.get_by_role("log"), window.get_by_text("Belief if it had to")]
    upper, lower = (half.bounding_box() for half in halves)
    assert lower["y"] > upper["y"] + upper["height"]  # one above the other
    save_picture(window, "06_narrow_dark")
    page.evaluate(theme % "JupyterLab Light")
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.wait_for_timeout(1500)


def test_only_enter_and_send_send(page, window):
    from playwright.sync_api import expect

    box, mine = window.locator("textarea"), window.locator("text=you:")
    tick = window.get_by_role("checkbox").first

    def nothing_happened(text, said):
        page.wait_for_timeout(2500)  # long enough for an answer
        expect(box).to_have_value(text)
        expect(mine).to_have_count(said)

    box.click()
    page.keyboard.type("I have a head")
    tick.click()
    nothing_happened("I have a head", 0)
    box.click()
    page.keyboard.press("End")
    page.keyboard.type("ache")
    page.keyboard.press("Tab")
    nothing_happened("I have a headache", 0)
    box.click()
    page.keyboard.press("Enter")  # nothing was typed since the box lost the focus
    expect(window).to_contain_text("you: I have a headache", timeout=30_000)
    wait_for_the_doctor(window)
    nothing_happened("", 1)

    box.click()
    page.keyboard.type("no", delay=0)
    tick.click()
    window.get_by_text("Not medical advice").click()
    nothing_happened("no", 1)
    button(window, "Send").click()
    expect(mine).to_have_count(2, timeout=30_000)
    nothing_happened("", 2)
    wait_for_the_doctor(window)

    box.click()
    long = "yes, it has been like this since last Monday"
    page.keyboard.type(long, delay=0)  # at once, as fast as it goes
    page.keyboard.press("Enter")
    expect(window).to_contain_text(f"you: {long}", timeout=30_000)  # no letter lost
    nothing_happened("", 3)
    wait_for_the_doctor(window)
    page.keyboard.type("no")
    window.get_by_role("button", name="Send").click()
    expect(mine).to_have_count(4, timeout=30_000)
    nothing_happened("", 4)


def test_a_crisis_gets_its_own_calm_notice(window):
    from playwright.sync_api import expect

    box = window.locator("textarea")
    box.fill("I’m not suicidal, I have a headache")
    box.press("Enter")
    expect(window.locator("text=doctor:")).to_have_count(2, timeout=30_000)
    wait_for_the_doctor(window)
    expect(window).not_to_contain_text("You are not alone")
    box.fill("no. I DONT WANT TO LIVE ANY MORE")
    box.press("Enter")
    expect(window).to_contain_text("You are not alone", timeout=30_000)
    for line in ("988", "116 123", "your emergency number"):
        expect(window).to_contain_text(line)
    expect(window).not_to_contain_text("This can be an emergency")
    save_picture(window, "06_crisis")
