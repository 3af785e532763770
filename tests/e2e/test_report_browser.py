"""The page of a run in a real browser: light, dark, on a phone, printed; skipped where there is no Chromium."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forge_cli.report.page import write_comparison, write_page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
]
VERDICT = "held-out loss 2.4000 before, 1.3104 after"
ATTACK = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'>"
FIGURES = 7


class Browser:
    """Talks with Chromium by its protocol over two pipes."""

    def __init__(self, folder: Path) -> None:
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        # Chromium reads descriptor 3 and writes descriptor 4; copies above them cannot be in the way there.
        ends = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (to_read, to_write)]
        start = f"import os, sys; os.dup2({ends[0]}, 3); os.dup2({ends[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for one in (to_read, to_write, *ends):
            os.close(one)
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def _read(self) -> dict:
        deadline = time.monotonic() + 60
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            part = os.read(self._in, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def ask(self, method: str, **parameters: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, expression: str) -> object:
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def show(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Opens a page as a screen of a width (CSS pixels) would, and waits until it is drawn."""
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=812, deviceScaleFactor=1, mobile=width < 500)
        self.ask("Page.navigate", url=page.as_uri())
        deadline = time.monotonic() + 30
        while self.run("document.readyState") != "complete" or self.run("location.href") != page.as_uri():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")

    def picture(self, file: Path) -> None:
        """Saves a picture of the whole page."""
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    def complaints(self) -> list[dict]:
        """Returns errors and warnings of the console, and exceptions."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        found = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in found]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._in)
        os.close(self._out)


def make_report() -> tuple[dict, list[dict]]:
    """Makes a run that measured everything, with texts that would like to be markup."""
    phases = {"load": (5, 5), "forward and backward": (21, 20), "optimizer step": (12, 12), "evaluation": (15, 14)}
    split = {"format": "messages", "rows_read": 280, "rows_kept": 280, "tokens": 16485, "trained_tokens": 11460}
    report = {
        "run": "tried",
        "losses": {},
        "method": {"name": "sft", "model": "forge-tiny", "lora": True, "ema": True},
        "memory": {
            "phases": {
                name: {"predicted_bytes": predicted << 30, "measured_bytes": measured << 30}
                for name, (predicted, measured) in phases.items()
            }
        },
        "alarms": [{"step": 40, "alarm": "skipped", "message": f"{ATTACK} {'/a/long/path' * 12}"}],
        "samples": [{"shown": ATTACK, "wanted": "x" * 300, "before": "one two " * 40, "after": ATTACK}] * 2,
        "data": {
            "splits": [{"name": one, "histogram": [[8, 3], [16, 9], [24, 4]], **split} for one in ("train", "eval")]
        },
        "plan": {
            **{f"training.some_rather_long_setting_{place}": {"value": place, "from": "--set"} for place in range(20)},
            "data.train": {"value": "/a/long/path" * 12, "from": "run.yaml:3:4"},
        },
        "environment": {"system": "Linux-6.18.44-with-a-name-that-has-no-break-in-it-x86_64-with-glibc2.36"},
        "next": "forge recipes copy qlora-7b my-run.yaml",
    }
    records: list[dict] = [{"step": 0, "eval_loss": 2.4}]
    for step in range(1, 121):
        measured = {"loss": 2.4 - step / 120, "grad_norm": 1 + step % 7, "tokens_per_second": 900.0 + step % 11}
        records.append({"step": step, **measured, "learning_rate": 1e-4 * (1 - step / 120)})
        if step % 4 == 0:
            records[-1]["group_norms"] = {f"layer {layer}": 0.1 + (step * layer) % 13 for layer in range(32)} | {
                ATTACK: 1.0
            }
        if step % 40 == 0:
            records.append({"step": step, "eval_loss": 2.4 - step / 110, "eval_ema_loss": 2.4 - step / 112})
    return report, [*records, *report["alarms"]]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    report, records = make_report()
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(write_page(report, records, [VERDICT, "120 steps"], Path("runs/tried")), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = Browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


def check_page(browser: Browser, page: Path, width: int, figures: int) -> None:
    assert browser.complaints() == []
    # Pictures that plotly.js draws by itself are data; nothing else is asked for.
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]
    assert browser.run("document.querySelectorAll('figure').length") == figures
    assert (
        browser.run("[...document.querySelectorAll('figure')].filter((f) => f.querySelector('.main-svg')).length")
        == figures
    )
    assert browser.run("document.documentElement.scrollWidth") == width  # a phone would zoom out of a wider one


def paper(browser: Browser) -> float:
    """Returns how light the plots' paper is, 0 to 1."""
    fill = browser.run("getComputedStyle(document.querySelector('.main-svg')).backgroundColor")
    return sum(int(part) for part in fill.strip("rgb()").split(",")[:3]) / 765


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_is_drawn(browser, page, tmp_path, width, dark):
    browser.show(page, width, dark=dark)
    check_page(browser, page, width, FIGURES)
    text = browser.run("document.querySelector('.verdict').innerText")
    assert VERDICT in text and "120 steps" in text
    assert browser.run("window.hit") is None
    assert (paper(browser) < 0.3) is dark
    columns = browser.run("getComputedStyle(document.querySelector('.pair')).gridTemplateColumns.split(' ').length")
    assert columns == (1 if width == 375 else 2)
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_plots_follow_a_change_of_theme_and_the_printer(browser, page):
    browser.show(page, 1280)
    assert paper(browser) > 0.9
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.ask("Emulation.setEmulatedMedia", features=[dark])
    browser.run("new Promise((done) => setTimeout(done, 200))")
    assert paper(browser) < 0.3
    browser.ask("Page.printToPDF")  # sends beforeprint and afterprint
    assert browser.run("document.querySelector('details').open") is False and paper(browser) < 0.3
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("document.querySelector('details').open") is True and paper(browser) > 0.9
    assert browser.complaints() == []


def test_settings_can_be_searched(browser, page):
    browser.show(page, 1280)
    shown = "[...document.querySelectorAll('#settings tbody tr')].filter((row) => !row.hidden).length"
    assert browser.run(shown) == 21
    browser.run("filter.value = 'DATA.train'; filter.dispatchEvent(new Event('input'))")
    assert browser.run(shown) == 1


def test_the_page_of_an_empty_run_and_of_a_comparison(browser, page):
    page = page.with_name("empty.html")
    page.write_text(write_page({}, [], ["not finished, step 0: stopped"], Path("runs/x")), encoding="utf-8")
    browser.show(page, 375)
    check_page(browser, page, 375, 0)
    page = page.with_name("compare.html")
    records = make_report()[1]
    page.write_text(write_comparison({"a": records, ATTACK: records}, [], [["steps", "1", "2"]]), encoding="utf-8")
    browser.show(page, 375, dark=True)
    check_page(browser, page, 375, 6)
    assert browser.run("window.hit") is None
