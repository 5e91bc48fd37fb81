"Every tutorial runs from top to bottom on a CPU, offline, with its `#| params` cell made small."
from pathlib import Path

import pytest
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from nbdev.process import extract_directives

TUTORIALS = sorted((Path(__file__).parents[1] / "nbs" / "tutorials").glob("*.ipynb"))
# what stands in the `#| params` cell of each for this test
SMALL = {
    "01_quickstart": "epochs, batch_size, queries = 1, 16, 48",
    "02_your_own_data": "searches = 300",
    "03_hard_negatives": "queries, number, steps, seeds = 150, 3, 3, 2",
    "04_losses_compared": "queries, steps, seeds = 60, 3, 2",
    "05_distil": "queries, known, steps, seeds, lessons = 60, 20, 5, 1, 16",
    "06_smaller_vectors_and_merging": "queries, steps, seeds, longer = 60, 3, 1, 5",
    "07_survive_a_disconnect": "steps, every, dies_at = 9, 3, 5",
    "08_two_gpus_and_beyond": "queries, epochs, batch = 150, 1, 32",
    "09_use_it": "steps, queries = 1, 40",
}


@pytest.fixture(autouse=True)
def one_thread():
    "What is so small gains nothing from a second thread, and waits long for it where another process has that core."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a tutorial writes, it writes here
    nb, shell, seen = read_nb(path), CaptureShell(), False
    if any('"wordllama"' in cell.source for cell in nb.cells): pytest.importorskip("wordllama")  # has no wheel for every Python
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        flags = extract_directives(cell, remove=False)
        if flags.get("eval:") == ["false"]: continue
        if "params" in flags: cell.source, seen = SMALL[path.stem], True
        shell.cell(cell)
        assert not shell.exc, f"{cell.source}\n{shell.prettytb(fname=path.name)}"
    assert seen, "a tutorial has a `#| params` cell: what makes it big or small"
