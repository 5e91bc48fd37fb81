"""Run notebooks and save their outputs: `python .ci/outputs.py nbs/52_losses.ipynb ...`

Skips the cells that `nbdev_test` skips (their saved outputs stay), runs each notebook in a process of its own,
stops at the first error without saving, and leaves out what goes to stderr: warnings and progress are for the one
who runs the notebook, who sees them here, not for its readers.
"""
import os
import subprocess
import sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import extract_directives


def skipped(cell):
    if cell.cell_type != "code" or "nbdev_export(" in cell.source: return True
    directives = extract_directives(cell, remove=False)
    return bool(directives.keys() & set(get_config().tst_flags.split())) or directives.get("eval:") == ["false"]


def save(path):
    path = path.resolve()
    nb, shell, here = read_nb(path), CaptureShell(path), os.getcwd()
    os.chdir(path.parent)
    for cell in nb.cells:
        if skipped(cell): continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc: sys.exit(shell.prettytb(path))
        for out in cell.outputs:
            if out.get("name") == "stderr": sys.stderr.write("".join(out["text"]))
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    os.chdir(here)
    write_nb(nb, path)
    nbdev_clean(str(path))


paths = [Path(p) for p in sys.argv[1:]]
if not paths: sys.exit(__doc__)
if len(paths) == 1: save(paths[0])
else:
    for path in paths:
        print(path, flush=True)
        if subprocess.run([sys.executable, __file__, path]).returncode: sys.exit(1)
