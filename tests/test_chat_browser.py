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


def test_a_person_talks_with_the_doctor(lab):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, (
        "install Debian's chromium for this test (apt-get install chromium)"
    )
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{lab}/lab/tree/notebooks/06_live_chat.ipynb?reset")
        page.wait_for_function("window.jupyterapp !== undefined", timeout=60_000)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        page.wait_for_timeout(3000)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        window = page.locator(
            ".jp-OutputArea-output", has_text="For real complaints"
        ).last
        window.wait_for(state="attached", timeout=240_000)
        box = window.locator("input[type=text]").first
        page.wait_for_timeout(3000)
        expect(window).to_contain_text("Not medical advice")
        expect(window).to_contain_text("What brings you here today?")

        box.fill("I have an itchy skin")
        box.press("Enter")
        expect(window).to_contain_text("you: I have an itchy skin", timeout=30_000)
        expect(window.locator("text=doctor:")).to_have_count(2, timeout=30_000)
        expect(window).to_contain_text("Belief if it had to decide now")
        expect(box).to_have_value("", timeout=30_000)  # ready for the next message

        box.fill("yes <b>bold</b>, and a crushing chest pain")
        window.get_by_role("button", name="Send").click()
        expect(window).to_contain_text("<b>bold</b>", timeout=30_000)
        expect(window.locator("text=you:")).to_have_count(2)  # said once, not twice
        expect(window).to_contain_text("This can be an emergency", timeout=30_000)
        for _ in range(6):
            if box.is_disabled():
                break
            box.fill("no")
            box.press("Enter")
            page.wait_for_timeout(1500)
        expect(window).to_contain_text("Final diagnosis:", timeout=30_000)
        window.scroll_into_view_if_needed()
        shot = ROOT / "runs" / "06_live_chat.png"
        shot.parent.mkdir(exist_ok=True)
        window.screenshot(path=str(shot))
        assert shot.stat().st_size > 10_000

        window.get_by_role("button", name="New patient").click()
        expect(window.locator("text=doctor:")).to_have_count(1, timeout=30_000)
        expect(window).not_to_contain_text("This can be an emergency")
        browser.close()
