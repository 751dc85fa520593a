"""A real browser: JupyterLab runs a lesson from top to bottom, sliders redraw pictures, pages work without a kernel."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager

import nbconvert
import nbformat
import pytest

from course_lib import paths
from course_lib.course import build, kernels, report

from .conftest import NAMES, ROOT, SOURCES

CHROMIUM = shutil.which("chromium")
TOKEN = "course"
SHOTS = ROOT / "build" / "shots"
# Every slider of every lesson is moved, without a browser, where the solved lesson is executed (`test_lessons.slid`);
# what a browser does with them is the same in all, so a real lesson and the miniature one show it.
WITH_WIDGETS = [
    (source, name)
    for source, name in zip(SOURCES, NAMES)
    if "widgets.live(" in source.read_text("utf-8") and source.stem.startswith(("00_", "01_"))
]
LESSONS = pytest.mark.parametrize("source_of, name", WITH_WIDGETS, ids=[name for _, name in WITH_WIDGETS])
# One worker, one JupyterLab. Waiting ends only what hangs: on a busy machine a lesson takes many times its seconds.
pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.timeout(1800)]
WAIT = 600  # seconds


@pytest.fixture(scope="module", autouse=True)
def chromium():
    if not CHROMIUM:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is missing, and in CI the browser tests may not be skipped: apt-get install chromium")
        pytest.skip("chromium is missing: apt-get install chromium")
    SHOTS.mkdir(parents=True, exist_ok=True)


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-quic"],
            timeout=1000 * WAIT,
        )
        yield started
        started.close()


def opened(browser, **options):
    """A new page, and all the time that it needs."""
    page = browser.new_page(**options)
    page.set_default_timeout(1000 * WAIT)
    return page


@pytest.fixture(scope="module")
def lab(tmp_path_factory, chromium):
    """Address of a JupyterLab with all solved lessons, without news, saved settings, or a home folder of its own."""
    work = tmp_path_factory.mktemp("lab")
    build.build_solved(ROOT / "tests" / "lessons" / "miniature", work / "miniature")
    build.build_solved(ROOT / "notebooks" / "src", work / "notebooks")
    (work / "config" / "labconfig").mkdir(parents=True)
    (work / "config" / "labconfig" / "default_setting_overrides.json").write_text(
        json.dumps(
            {
                "@jupyterlab/apputils-extension:notification": {
                    "fetchNews": "false",
                    "checkForUpdates": False,
                    "doNotDisturbMode": True,
                },
                "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
            }
        )
    )  # every cell is part of the page
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "COURSE_RESULTS": "results",
    }
    environment = {
        **os.environ,
        **{name: str(work / folder) for name, folder in folders.items()},
        "OMP_NUM_THREADS": "1",
        "COURSE_PROFILE": "smoke",
        "COURSE_DEVICE": "cpu",
        "COURSE_STRICT": "1",
        "COURSE_DATA": str(paths.data_root()),
    }
    command = ["jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--ServerApp.root_dir={work}"]
    with served(
        [*command, f"--IdentityProvider.token={TOKEN}", "--LabApp.extension_manager=readonly"], environment
    ) as at:
        yield at


@contextmanager
def served(command, environment, folder=None):
    """Address of a JupyterLab that a module of Python starts; it is ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *command, f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + WAIT
            while not answers(f"http://127.0.0.1:{port}/api?token={TOKEN}"):
                log.seek(0)
                assert server.poll() is None and time.monotonic() < deadline, log.read()[-3000:]
                time.sleep(0.25)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=10).status == 200
    except OSError:
        return False


def wait_until(true):
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline, "the page did not change in time"
        time.sleep(0.05)


@LESSONS
def test_a_lesson_runs_in_jupyterlab_and_its_sliders_redraw(lab, browser, source_of, name):
    page = opened(browser, viewport={"width": 1280, "height": 1400})
    folder = "miniature" if source_of.parent.name == "miniature" else "notebooks"
    page.goto(f"{lab}/lab/tree/{folder}/{source_of.stem}.ipynb?token={TOKEN}&reset")
    page.wait_for_selector('.jp-NotebookPanel .jp-Toolbar-kernelName:has-text("Python 3")')
    page.wait_for_selector("#jp-main-statusbar >> text=| Idle")  # before that, a busy machine loses the order to run
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    finished, stopped = (
        '.jp-OutputArea-output:has-text("written to")',
        '[data-mime-type="application/vnd.jupyter.error"]',
    )
    try:
        page.wait_for_selector(f"{finished}, {stopped}", state="attached")  # of lesson.finish, or an error
    finally:
        page.screenshot(path=SHOTS / f"{name}-ran.png")
    assert page.locator(stopped).all_inner_texts() == []

    live = page.locator(".widget-vbox:has(.noUi-handle):has(img)").first
    picture = live.locator("img").first
    before, alt = picture.get_attribute("src"), picture.get_attribute("alt")
    assert len(alt) >= 10
    handle = live.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    wait_until(lambda: live.locator("img").first.get_attribute("src") != before)
    live.screenshot(path=SHOTS / f"{name}-slid.png")

    if page.locator("figure.flipbook").count():
        book = page.locator("figure.flipbook").first
        book.scroll_into_view_if_needed()
        turn_and_look(page, book)
        book.screenshot(path=SHOTS / f"{name}-flipbook.png")
    page.close()


def turn_and_look(page, book):
    """Turn a flipbook by keyboard: one frame is seen before and after, and not the same one."""
    seen = lambda: book.locator("img").evaluate_all("frames => frames.filter(f => !f.hidden).map(f => f.alt)")
    before = seen()
    book.locator("input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    wait_until(lambda: seen() != before)
    assert len(before) == len(seen()) == 1


ANSWER = "def class_map(features, weight):\n    return maps.cam(features, weight)  # my own answer"


def test_an_answer_given_in_make_lab_survives_build_and_update(browser, tmp_path):
    """The student's way, with the real commands, in a copy of the course in an odd folder without git."""
    course = tmp_path / "Kurs für Anfänger"
    for part in ("course_lib", "notebooks"):
        shutil.copytree(ROOT / part, course / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "HELP.md"):
        shutil.copy(ROOT / name, course)
    (course / "data").symlink_to(ROOT / "data")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "COURSE_"))}
    environment = {**kept, "JUPYTER_TOKEN": TOKEN, "PYTHONPATH": str(course), "OMP_NUM_THREADS": "1"}
    lesson = "01_class_activation_maps"

    with served(["course_lib", "lab"], environment, course) as address:
        page = opened(browser, viewport={"width": 1280, "height": 1400})
        page.goto(f"{address}/lab/tree/{lesson}.ipynb?token={TOKEN}&reset")
        page.wait_for_selector('.jp-NotebookPanel .jp-Toolbar-kernelName:has-text("Python 3")')
        page.wait_for_selector("#jp-main-statusbar >> text=| Idle")
        page.wait_for_selector(f'.jp-DirListing-itemText:has-text("{lesson}")')
        listed = set(page.locator(".jp-DirListing-itemText").all_inner_texts())
        assert listed == {f"{source.stem}.ipynb" for source in SOURCES if source.parent.name == "src"}  # no src
        menus = set(page.locator("#jp-MainMenu .lm-MenuBar-itemLabel").all_inner_texts())
        assert {"File", "Run"} <= menus and "Nbgrader" not in menus
        assert not page.locator('[title*="nbgrader" i], [aria-label*="Create Assignment" i]').count()

        cell = page.locator(".jp-CodeCell:has-text('def class_map(features')").first
        cell.scroll_into_view_if_needed()
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(ANSWER)
        page.keyboard.press("Control+S")
        copy = course / "work" / f"{lesson}.ipynb"
        wait_until(lambda: "my own answer" in copy.read_text("utf-8"))
        page.screenshot(path=SHOTS / "answered.png")
        page.close()

    def command(*words):
        done = subprocess.run(
            [sys.executable, "-m", "course_lib", *words], cwd=course, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def cells():
        return {cell.metadata.get("nbgrader", {}).get("grade_id"): cell for cell in nbformat.read(copy, 4).cells}

    assert cells()["exercise-01-1"].source == ANSWER
    assert "up to date" in command("build") and cells()["exercise-01-1"].source == ANSWER
    source = course / "notebooks" / "src" / f"{lesson}.py"
    source.write_text(
        source.read_text("utf-8").replace("### BEGIN HIDDEN TESTS", "# corrected\n### BEGIN HIDDEN TESTS")
    )
    assert f"Built anew: {lesson}.ipynb" in command("build") and cells()["exercise-01-1"].source == ANSWER
    assert "1 answers kept" in command("update")
    assert cells()["exercise-01-1"].source == ANSWER and cells()["check-01-1"].source.endswith("# corrected")
    assert "NotImplementedError" in (course / "notebooks" / f"{lesson}.ipynb").read_text("utf-8")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The miniature lesson with pictures, executed, and its result."""
    work = tmp_path_factory.mktemp("executed")
    notebook = build.build_solved(ROOT / "tests" / "lessons" / "miniature", work / "solved")[1]
    kernels.execute(
        notebook, work / "run" / notebook.name, "smoke", {"COURSE_STRICT": "1", "COURSE_RESULTS": str(work / "results")}
    )
    return work


def test_a_web_page_of_a_lesson_turns_without_a_kernel(executed, browser):
    html, _ = nbconvert.HTMLExporter().from_notebook_node(nbformat.read(executed / "run" / "01_pictures.ipynb", 4))
    (executed / "page.html").write_text(html)
    page = opened(browser)
    page.route("http*://**", lambda route: route.abort())  # no network: the flipbook needs none
    page.goto((executed / "page.html").as_uri(), wait_until="domcontentloaded")
    turn_and_look(page, page.locator("figure.flipbook").first)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_fits_a_phone(executed, browser, scheme):
    target = report.write(executed / "results", executed / "run", executed / "report.html", "smoke")
    page = opened(browser, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    wanted = []
    page.on("request", lambda request: wanted.append(request.url))
    page.goto(target.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not [url for url in wanted if not url.startswith(("file:", "data:"))]
    turn_and_look(page, page.locator("figure.flipbook").first)
    page.screenshot(path=SHOTS / f"report-{scheme}.png", full_page=True)
    page.close()
