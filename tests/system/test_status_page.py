"""The status page in a real headless Chromium: a page with much of everything, and that of a real service."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1 import enums_pb2 as enums
from support.browser import ENTER, NARROW, TAB, WIDE, Browser, chromium
from support.processes import serve, status, stub_of
from support.status_page import IMAGE, MARKUP, SPIKE, MadeUp, made_up_page
from tolaria.config import ControlSettings
from tolaria.security.watched import WatchedFiles
from tolaria.security.web_config import WebConfig
from tolaria.status_page import site
from tolaria.status_page.curves import POINTS_MAX

CSS = Path(site.__file__).parent / "assets" / "page.css"
NODES = "return document.querySelectorAll(arguments[0]).length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests."""
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[MadeUp]:
    """The page of a run that is made up, with a million steps."""
    with made_up_page(stride=1) as served:
        yield served


@pytest.fixture
def opened(browser: Browser, page: MadeUp) -> Browser:
    """A browser that shows the page, live."""
    browser.emulate()
    browser.open(page.url)
    browser.until(lambda: browser.text("#link") == "live" and browser.run(NODES, ".incident") == 3)
    return browser


def test_texts_of_people_are_never_markup(opened: Browser) -> None:
    """Names of runs, seeds, tags, reasons: shown as they are, nothing is executed, and the policy is not violated."""
    assert opened.text("h1") == f"vision {MARKUP}"
    assert opened.run("return document.title") == f"running: vision {MARKUP} \u2013 Tolaria"
    assert IMAGE in opened.text("#run-facts")
    names = opened.run("return [...document.querySelectorAll('.seed-name strong')].map((it) => it.textContent)")
    assert set(names) == {"seed-1", f"seed-2 {MARKUP}", IMAGE}
    assert MARKUP in opened.text("#incidents")
    assert MARKUP in opened.text("#safety")
    assert opened.run(NODES, "main script, main img, body script") == 0
    assert opened.console() == []


def test_the_policy_forbids_what_an_injected_script_would_do(opened: Browser) -> None:
    """Even if a text became markup: inline scripts do not run, and markup cannot be assigned."""
    refused = opened.run(
        "window.ran = 0; const it = document.createElement('script');"
        "try { it.text = 'window.ran = 1'; document.body.append(it); } catch (error) {}"
        "try { document.body.innerHTML = '<b>x</b>'; return 'assigned'; } catch (error) { return error.name; }"
    )
    assert refused == "TypeError"
    assert opened.run("return window.ran") == 0
    assert any("Content Security Policy" in line or "TrustedScript" in line for line in opened.console())


def test_curves_of_a_million_steps_are_few_points_with_their_extremes(opened: Browser) -> None:
    """The spike of one step is in the table behind the curve; the marks say where the run went back and why."""
    path = str(opened.run("return document.querySelector('#chart-loss .curve.tone-a').getAttribute('d')"))
    assert 100 < len(re.findall("[ML]", path)) <= POINTS_MAX
    label = str(opened.run("return document.querySelector('#chart-loss svg').getAttribute('aria-label')"))
    assert "from 0.3" in label
    assert f"to {SPIKE}" in label
    opened.run("document.querySelector('#chart-loss summary').click()")
    opened.until(lambda: opened.run(NODES, "#chart-loss tbody tr") > 100)
    highest = opened.run(
        "return [...document.querySelectorAll('#chart-loss tbody td:last-child')].map((it) => it.textContent)"
    )
    assert str(SPIKE) in highest
    titles = opened.run("return [...document.querySelectorAll('#chart-loss .mark title')].map((it) => it.textContent)")
    assert titles[1] == f"Rolled back from step 820,000 to 800,000: health: loss 1e9 {MARKUP}"
    assert titles[0].startswith("Lane restarted from step 400,000 to 399,990: crashed")
    assert opened.run(NODES, "#chart-boundary .limit") == 1
    assert opened.run(NODES, "figure.chart details") == 4


def test_everything_that_is_asked_of_the_page_is_there(opened: Browser) -> None:
    """Seeds with stage and alpha, breakers, incidents with their cause, both tiers, ranks, metrics of the job."""
    seeds = opened.text("#seeds")
    for words in ("fossilized · alpha 1", "blending · alpha 0.7", "lora in layer2", "20 % of the gradient norms"):
        assert words in seeds
    assert opened.run(NODES, ".breakers li") == 6
    incidents = opened.text("#incidents")
    for words in (
        "Rollback to step 800,000 by health, fast, 12.5 ms",
        "Emergency elevated, cleared",
        "Lane restarted: crashed",
    ):
        assert words in incidents
    opened.until(lambda: all(word in opened.text("#points") for word in ("memory", "disk", "proven", "not proven yet")))
    assert opened.run(NODES, "#ranks tbody tr") == 8
    assert "grad.noise" in opened.text("#figures")
    assert "50 / 60 epochs" in opened.text(".progress")


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits(opened: Browser, scheme: str, size: tuple[int, int], tmp_path: Path) -> None:
    """axe-core finds nothing, contrast included, with tables open; nothing is wider than the window."""
    opened.emulate(size, prefers_color_scheme=scheme)
    opened.run("for (const it of document.querySelectorAll('#chart-accuracy details, #seeds details')) it.open = true")
    opened.until(lambda: opened.run(NODES, "figure.chart tbody") == 1)
    assert opened.violations() == []
    assert opened.run("return document.documentElement.scrollWidth") <= size[0]
    ground = opened.run("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", str(ground)))) < 64) == (scheme == "dark")
    picture = opened.screenshot(tmp_path / f"{scheme}-{size[0]}.png")
    assert picture[:4] == b"\x89PNG"
    assert int.from_bytes(picture[16:20]) == size[0]


def test_the_page_is_usable_by_keyboard(opened: Browser) -> None:
    """The first tab stop skips the head; a table opens with Enter; a box that scrolls can be reached and has a name."""
    active = "const it = document.activeElement; return it.className || it.id || it.textContent"
    opened.press(TAB)
    assert opened.run(active) == "skip"
    opened.press(ENTER)
    assert opened.run(active) == "main"
    opened.press(TAB)
    assert opened.run(active) == "Table: Loss"
    opened.press(ENTER)
    opened.until(lambda: opened.run(NODES, "#chart-loss tbody tr") > 100)
    opened.press(TAB)
    assert opened.run("return document.activeElement.getAttribute('aria-label')") == "Loss by step, newest first"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert opened.run(outline) == "solid"


def test_the_focus_and_what_is_open_survive_updates(opened: Browser, page: MadeUp) -> None:
    """A page that is built anew each second would throw its readers out."""
    opened.run(
        "const it = document.querySelector('#seeds details'); it.open = true; it.querySelector('summary').focus()"
    )
    page.run.status.global_step += 1
    page.call(page.run.core.history.seeds.advance, page.run.status.global_step)
    opened.until(lambda: opened.text(".key-figures dd") == f"{page.run.status.global_step:,}")
    assert opened.run("return document.querySelector('#seeds details').open")
    assert opened.run("return document.activeElement.textContent") == "Table: stages of seeds"


def test_the_live_region_says_what_matters_and_no_more(opened: Browser, page: MadeUp) -> None:
    """Steps and seconds pass in silence; a change of state is said once."""
    assert opened.run("return document.querySelector('#announcer').getAttribute('role')") == "status"
    opened.run(
        "window.said = []; new MutationObserver(() => window.said.push(document.querySelector('#announcer')"
        ".textContent)).observe(document.querySelector('#announcer'), {childList: true, subtree: true})"
    )
    before = opened.text("#footer")
    page.run.status.global_step += 1
    opened.until(
        lambda: (
            opened.text("#footer") != before and opened.text(".key-figures dd") == f"{page.run.status.global_step:,}"
        )
    )
    assert opened.run("return window.said") == []
    page.run.status.state, page.run.status.state_reason = admin.RUN_STATE_PAUSED, f"have a look {MARKUP}"
    opened.until(lambda: opened.text("#state") == "paused")
    time.sleep(2.5)
    assert opened.run("return window.said") == [f"The run is paused: have a look {MARKUP}."]
    page.run.status.state, page.run.status.state_reason = admin.RUN_STATE_RUNNING, ""


def test_nothing_moves_for_those_who_do_not_want_it() -> None:
    """Transitions and animations are for those who have no preference."""
    still = re.sub(r"@media \(prefers-reduced-motion: no-preference\) \{.*\}", "", CSS.read_text(encoding="utf-8"))
    assert len(still) < len(CSS.read_text(encoding="utf-8"))
    assert "transition" not in still
    assert "animation" not in still


def test_a_lost_and_a_stopped_service_are_shown_as_such(browser: Browser) -> None:
    """The last state stays with its time; a service that is back on the port is shown at once, with its values."""
    with made_up_page() as first:
        port = int(first.url.rstrip("/").rpartition(":")[2])
        browser.open(first.url)
        browser.until(lambda: browser.text("#link") == "live")
        first.stop()
        browser.until(lambda: browser.text("#link") == "stopped")
        assert browser.text("#banner").startswith("The service has stopped. This is its last state. Last data: ")
        assert browser.run("return document.title").startswith("stopped: ")
        assert browser.text("h1") == f"vision {MARKUP}"
    with made_up_page(port=port):
        browser.until(lambda: browser.text("#link") == "live")
        assert browser.run("return document.querySelector('#banner').hidden")
    browser.until(lambda: browser.text("#link") in {"lost", "stopped"})


def test_a_viewer_too_many_is_given_the_reason(browser: Browser) -> None:
    """And gets in once another has left."""
    with made_up_page(viewers_max=1) as full:
        browser.open(full.url)
        browser.until(lambda: browser.text("#link") == "live")
        browser.run("window.open(location.href)")
        first, second = browser.windows()
        browser.switch(second)
        browser.until(lambda: browser.text("#link") == "waiting")
        assert "there are 1 viewers already (metrics.viewers_max)" in browser.text("#banner")
        browser.switch(first)
        browser.close_window()
        browser.switch(second)
        browser.until(lambda: browser.text("#link") == "live")


def test_a_browser_with_the_password_sees_the_page(browser: Browser, tmp_path: Path) -> None:
    """It uses the password for scripts and for the stream too; without it there is nothing but the refusal."""
    digest = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    (tmp_path / "web.yml").write_text(f"basic_auth_users: {{ana: '{digest}'}}\n")
    config = WatchedFiles("web", lambda: WebConfig.read(str(tmp_path / "web.yml")))
    with made_up_page(config=config) as guarded:
        browser.open(guarded.url)
        assert browser.text("body").strip() in {"", "Unauthorized"}
        browser.open(guarded.url.replace("://", "://ana:secret@"))
        browser.until(lambda: browser.text("#link") == "live" and browser.text("h1") == f"vision {MARKUP}")


def test_a_run_without_accuracy_and_controller_has_no_empty_charts(browser: Browser) -> None:
    """What the run cannot have is left out; a chart that waits for its first value says so."""
    with made_up_page(control=ControlSettings(enabled=False)) as other:
        accuracy = other.run.core.history.curves["accuracy"]
        other.call(accuracy.rewind, -1)
        browser.open(other.url)
        browser.until(lambda: browser.text("#link") == "live")
        hidden = browser.run("return [...document.querySelectorAll('figure.chart[hidden]')].map((it) => it.id)")
        assert hidden == ["chart-accuracy", "chart-boundary"]
        assert "Tamiyo" not in browser.text("#safety")


def test_the_page_of_a_real_service_in_all_its_states(browser: Browser, tmp_path: Path) -> None:
    """It is up while the run trains, is paused, goes back, is halted, ends, and says that the service has stopped."""
    browser.open("about:blank")
    browser.console()  # what a page of another test has said
    settings = ["training.epochs=100000", f"training.run_name={MARKUP}", f"state.dir={tmp_path / 'state'}"]
    browser.emulate()
    with serve(*settings, cwd=tmp_path, reference_peers=True) as service:
        browser.open(f"http://{service.addresses()[1]}/")
        browser.until(lambda: browser.text("#link") == "live")
        with stub_of(service) as stub:
            browser.until(
                lambda: browser.text("#state") == "running" and browser.run(NODES, "#chart-accuracy .curve") == 1
            )
            assert browser.text("h1") == MARKUP
            stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="look at this"))
            browser.until(
                lambda: browser.text("#state") == "paused" and browser.text("#state-reason") == "look at this"
            )
            browser.until(lambda: browser.text("#key-figures dd").replace(",", "") == str(status(stub).global_step))
            points = stub.ListRestorePoints(admin.ListRestorePointsRequest(), timeout=180).restore_points
            # Which it is depends on how long the browser took; before the first step there is no loss to be shown.
            oldest = min(point.global_step for point in points if point.global_step)
            stub.TriggerRollback(admin.TriggerRollbackRequest(request_id="r", reason=IMAGE, target_step=oldest))
            browser.until(lambda: IMAGE in browser.text("#incidents") and browser.run(NODES, "#chart-loss .mark") == 1)
            stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="q", reason="go"))
            browser.until(lambda: browser.text("#state") == "running")
            halt = admin.RaiseEmergencyRequest(request_id="e", reason="smoke", level=enums.EMERGENCY_LEVEL_HALT)
            stub.RaiseEmergency(halt)
            browser.until(lambda: browser.text("#state") == "halted" and "smoke" in browser.text("#incidents"))
            assert "Emergency halt, not cleared" in browser.text("#incidents")
            stub.StopTraining(admin.StopTrainingRequest(request_id="s", reason="enough"))
            browser.until(lambda: browser.text("#state") == "finished" and "enough" in browser.text("#state-reason"))
        assert browser.console() == []
        service.terminate()
        browser.until(lambda: browser.text("#link") == "stopped")
        assert service.wait() == 0
