"What `make` says to an interpreter that it cannot use, and that a second run installs nothing."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("sh"), reason="no sh here")


def install(folder, python="", **variables):
    "Run .ci/venv in a copy, with an interpreter that is this one after running `python`: exit status, everything said."
    for name in (".ci", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"):
        if not (folder / name).exists(): (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    fake = folder / "python"
    fake.write_text(f"#!{sys.executable}\nimport platform, sys\n{python}\nexec(sys.argv[2])\n")
    fake.chmod(0o755)
    variables = {"PYTHON": str(fake), "SYSTEM_TORCH": "", **variables}
    done = subprocess.run(["sh", ".ci/venv", "demo"], cwd=folder, capture_output=True, text=True, env={**os.environ, **variables})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("python, said", [
    ("sys.version_info = (3, 10, 13)", ["is Python 3.10.13", "3.11 to 3.14", "make demo PYTHON="]),
    ("sys.version_info = (3, 15, 0)", ["is Python 3.15.0"]),
    ("sys.version_info = (3, 12, 3); sys.modules['ensurepip'] = None", ["Python 3.12", "ensurepip", "install python3.12-venv"]),
    ("sys.modules['lzma'] = None", ["built without: lzma"]),
    ("import ensurepip, venv; sys.platform = 'darwin'; platform.machine = lambda: 'x86_64'", ["Intel Mac"]),
])
def test_refuses(tmp_path, python, said):
    status, text = install(tmp_path, python)
    assert status == 1
    assert [word for word in said if word not in text] == [], text
    assert not (tmp_path / ".venv").exists()


def test_refuses_what_does_not_run(tmp_path):
    status, text = install(tmp_path, PYTHON="/no/such/python")
    assert status == 1 and "/no/such/python does not run" in text


def test_second_run_installs_nothing(tmp_path):
    "A stand-in for pip counts its calls; a changed pin installs anew."
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
    python, calls = tmp_path / ".venv" / "bin" / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\ncase "$*" in "-m pip install"*) echo "$@" >> {calls}; exit 0;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    counts = []
    for _ in range(2):
        assert install(tmp_path, PATH="/usr/bin:/bin")[0] == 0
        counts.append(len(calls.read_text().splitlines()))
    assert counts[0] == counts[1] == 2
    with (tmp_path / "constraints.txt").open("a") as pins: pins.write("other==1\n")
    assert install(tmp_path)[0] == 0
    status, text = install(tmp_path, "sys.version_info = (3, 12, 99)")
    assert status == 1 and "not 3.12.99" in text
    assert len(calls.read_text().splitlines()) == 4
