"What a saved notebook may hold: it is read on the site and on GitHub, exported, and compared by git."
import ast
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").glob("**/*.ipynb")) if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)]
notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path, kind="code"): return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell): return "".join(cell["source"])


def directives(cell): return set(re.findall(r"^#\|\s*(\S+)", source(cell), re.M))


def code(cell):
    "The syntax tree, without the lines that only a notebook knows."
    return ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", source(cell), flags=re.M)).body


def texts(cell):
    "The text of a cell's saved outputs."
    for out in cell["outputs"]:
        yield from ["".join(out.get("text", []))] + ["".join(v) for k, v in out.get("data", {}).items() if k.startswith("text/")]


@notebook
def test_shows_everywhere(path):
    "Widget state breaks GitHub's viewer and static pages; errors and giant pictures are left-overs."
    assert "widgets" not in json.loads(path.read_text())["metadata"]
    assert path.stat().st_size < 1_000_000
    for cell in cells(path):
        for out in cell["outputs"]:
            assert out["output_type"] != "error", source(cell)
            assert "application/vnd.jupyter.widget-view+json" not in out.get("data", {}), source(cell)


@notebook
def test_outputs_say_the_same_anywhere(path):
    "No object ids, no paths of the machine it ran on, no progress bars, nothing from stderr: they differ with every run."
    for cell in cells(path):
        assert all(out.get("name") != "stderr" for out in cell["outputs"]), source(cell)
        for text in texts(cell):
            assert not re.search(r"\bat 0x[0-9a-f]{6,}", text), text
            assert not re.search(r"(?<![\w.:/])/(home|root|Users|tmp|work|content|kaggle|private|var)/\w", text), text
            assert "\r" not in text and "it/s]" not in text, text


@notebook
def test_cells_have_ids(path):
    "The exported module names each cell by its id: missing or doubled ones make every export differ."
    nb = json.loads(path.read_text())
    ids = [cell.get("id") for cell in nb["cells"]]
    assert all(ids) and len(set(ids)) == len(ids)
    assert (nb["nbformat"], nb["nbformat_minor"]) >= (4, 5)
    assert all(cell["execution_count"] is None for cell in cells(path))


@notebook
def test_exported_cells_are_short(path):
    for cell in cells(path):
        if directives(cell) & {"export", "exports", "exporti"}:
            lines = sum(bool(line.strip()) for line in source(cell).splitlines())
            assert lines <= 40, f"{lines} lines:\n{source(cell)}"


@notebook
def test_imports_stand_alone(path):
    "nbdev runs cells that import, and only those, when it builds the docs: what else is in them would run without the cells before."
    for cell in cells(path):
        if re.search(r"^#\|\s*eval:\s*false", source(cell), re.M) or "nbdev_export()" in source(cell): continue
        body = code(cell)
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in body):
            others = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
            assert not others, source(cell)


@notebook
def test_title_cell_is_a_title(path):
    "What stands beside title and subtitle in the first Markdown cell does not appear on the site."
    title, *rest = [line for line in source(cells(path, "markdown")[0]).splitlines() if line.strip()]
    assert title.startswith("# ")
    assert rest and all(line.startswith(("> ", "- ")) for line in rest), rest


def test_every_page_is_in_the_sidebar():
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]
    flat = lambda x: [x] if isinstance(x, str) else [y for c in x for y in flat(c["contents"] if isinstance(c, dict) else c)]
    listed = flat(site["sidebar"]["contents"])
    pages = [str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS]
    assert [p for p in pages if p not in listed and f"{Path(p).parent}/*" not in listed] == []
    assert [p for p in listed if p.endswith(".ipynb") and p not in pages] == []
    reference = [p for p in listed if p[0].isdigit()]
    assert reference == sorted(reference)


def test_pages_have_names_of_their_own():
    "52_losses.ipynb is published as losses.html: a 30_index.ipynb would take the place of the home page."
    names = [str(p.parent / re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem)) for p in NOTEBOOKS]
    assert [name for name in names if names.count(name) > 1] == []


@notebook
def test_something_is_seen_to_happen(path):
    "A page with code shows a result."
    assert not cells(path) or any(o["outputs"] for o in cells(path))
