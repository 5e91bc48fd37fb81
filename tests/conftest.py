"What the tests share: which of them run, and a browser."
import functools
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / ".ci"))
from browser import find as find_browser  # noqa: E402


def pytest_addoption(parser): parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


@functools.cache
def has_gpu():
    import torch
    return torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    wants = {
        "slow": (lambda: config.getoption("--slow"), "slow: run with --slow"),
        "cuda": (has_gpu, "no GPU here"),
        "browser": (find_browser, "no Chromium here"),
    }
    for item in items:
        for mark, (met, why) in wants.items():
            if item.get_closest_marker(mark) and not met(): item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def browser(tmp_path):
    "Opens a page in headless Chromium, lets its scripts run and gives the DOM as text: `browser(path_or_url, shot=None)`."
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
        --disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=5000""".split()

    def show(page, shot=None, size=(1280, 1600)):
        url = page if "://" in str(page) else Path(page).resolve().as_uri()
        command = [find_browser(), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--window-size={},{}".format(*size)]
        run = lambda *what: subprocess.run([*command, *what, url], capture_output=True, text=True, timeout=120, check=True).stdout
        if shot: run(f"--screenshot={Path(shot).resolve()}")
        return run("--dump-dom")

    return show
