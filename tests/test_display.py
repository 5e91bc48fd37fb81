"What a fresh process says in a terminal, in a pipe and beside other processes: a notebook cannot try these."
import os
import subprocess
import sys

import pytest

JOB = """
import time
from nixietune.display import Progress, say
say("begin")
with Progress(40, "pairs", "training") as bar:
    for i in range(40):
        time.sleep(0.01)
        bar.update(loss=1/(i + 1))
        if i == 20: say("between")
        if i == 30 and {fails}: raise KeyboardInterrupt
"""


def piped(fails=False, **env):
    command = [sys.executable, "-c", JOB.format(fails=fails)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


def test_pipe():
    "A log gets one plain line for a short job, however often it is updated."
    run = piped()
    assert run.stdout == "begin\nbetween\n"
    assert run.stderr.count("\n") == 1 and "\r" not in run.stderr and "\x1b" not in run.stderr
    assert run.stderr.startswith("training 100% 40/40 pairs [00:00<00:00, ") and run.stderr.endswith("loss=0.025]\n")


def test_interrupted():
    "A job that is stopped says how far it came, before the traceback."
    assert piped(fails=True).stderr.startswith("training  78% 31/40 pairs [")


def test_other_processes_are_quiet():
    run = piped(RANK="1", WORLD_SIZE="2")
    assert run.stdout == run.stderr == ""


def test_narrow_encoding():
    "An output that cannot show a character replaces it; the run goes on."
    code = "from nixietune.display import *; say(Table([{'query': '\u8cea\u554f', 'n': None}])); say('end')"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0 and run.stdout.splitlines()[-2:] == ["??   ?", "end"]


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals here")
def test_terminal():
    "A live bar on one line; a message in between gets a line of its own."
    import pty
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", JOB.format(fails=False)], stdout=follower, stderr=follower,
                               env=os.environ | {"COLUMNS": "90"})
    os.close(follower)
    seen = b""
    try:
        while more := os.read(leader, 4096): seen += more
    except OSError: pass # what Linux raises when the other side has closed
    assert process.wait() == 0
    rows = seen.decode().replace("\r\n", "\n").rstrip("\n").split("\n")
    lines = [row.split("\r")[-1].rstrip() for row in rows] # what stays visible
    assert lines[:2] == ["begin", "between"] and len(lines) == 3
    assert lines[2].startswith("training 100%|####") and lines[2].endswith("loss=0.025]") and len(lines[2]) == 89
    assert seen.count(b"training") > 3
