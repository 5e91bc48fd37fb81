"The package as a whole: what an import costs, what it stands on, what is installed."
import configparser
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nixietune
from nixietune.core import HOME

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numpy", "datasets", "transformers", "sentence_transformers", "pandas", "scipy", "matplotlib", "faiss", "ir_measures", "pytrec_eval",
         "fastcore", "execnb", "IPython", "nbdev", "ipywidgets"}
MODULES = sorted(p.stem for p in (ROOT / "nixietune").glob("[a-z]*.py"))


def imported(code):
    "The top-level modules that a fresh interpreter has after `code`."
    tail = "\nimport json, sys; sys.stderr.write('MODULES' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.rpartition("MODULES")[2]))


def test_import_brings_nothing_heavy(): assert not imported("import nixietune; dir(nixietune)") & HEAVY


def test_help_brings_nothing_heavy():
    code = """
import sys; sys.argv = ['nixietune', '--help']
from nixietune.cli import main
try: main()
except SystemExit as done: assert not done.code"""
    assert not imported(code) & HEAVY


@pytest.mark.parametrize("name", sorted(nixietune._NAMES))
def test_public_names(name):
    "Each lives where the table says, is exported by its notebook, and says what it does."
    module = importlib.import_module(f"nixietune.{nixietune._NAMES[name]}")
    symbols = importlib.import_module("nixietune._modidx").d["syms"]
    assert getattr(nixietune, name) is getattr(module, name)
    assert name in module.__all__
    assert f"{module.__name__}.{name}" in symbols[module.__name__]
    assert (getattr(nixietune, name).__doc__ or "").strip()


def test_dir_and_unknown_names():
    assert set(nixietune.__all__) <= set(dir(nixietune))
    with pytest.raises(AttributeError, match="no_such_name"): nixietune.no_such_name


def test_modules_stand_without_the_notebook_tools():
    "Everything imports where nbdev, fastcore and IPython cannot be imported."
    blocked = sorted({"fastcore", "execnb", "IPython", "nbdev", "ghapi", "ipywidgets"})
    code = f"""
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split('.')[0] in {blocked}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from importlib import import_module
for name in {MODULES}: import_module('nixietune.' + name)
"""
    assert not imported(code) & set(blocked)


def test_imports_go_downwards():
    "Number order is import order: a module imports only modules of notebooks with a smaller number."
    default_exp = re.compile(r"default_exp (\w+)")
    order = {default_exp.search(nb.read_text())[1]: nb.stem for nb in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    for name in MODULES:
        lines = (ROOT / "nixietune" / f"{name}.py").read_text().splitlines()
        for line in (line.split() for line in lines):
            if line[:1] == ["from"] and line[1].startswith(".") and len(line[1]) > 1:
                assert order[line[1][1:].split(".")[0]] < order[name], f"{name}: {' '.join(line)}"


def test_builds(tmp_path):
    "The sdist builds, offline, and the wheel from it holds every module, the licence and the command."
    for name in ("nixietune", "nbs"): shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = zipfile.ZipFile(next(tmp_path.glob("dist/*.whl")))
    files = {name: wheel.read(name).decode() for name in wheel.namelist()}
    assert {f"nixietune/{module}.py" for module in MODULES} <= set(files)
    assert {name.split("/")[0].split("-")[0] for name in files} == {"nixietune"}
    assert any(name.endswith("/LICENSE") for name in files)
    assert "nixietune = nixietune.cli:main" in next(text for name, text in files.items() if name.endswith("entry_points.txt"))


def test_versions_agree():
    "Everything that an installation brings is pinned, within the bounds of settings.ini, without a local suffix."
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["torch"] == "2.13.0" and not [version for version in pins.values() if "+" in version]
    for key, value in ini["DEFAULT"].items():
        if key == "gpu_requirements" or not key.endswith("requirements"): continue
        for need in map(Requirement, shlex.split(value)):
            assert need.specifier.contains(pins[canonicalize_name(need.name)]), f"{key}: {need}"
    assert nixietune.__version__ == ini["DEFAULT"]["version"]


def test_installs_from_home():
    "Whoever is told to install nixietune is told from where: the name on PyPI belongs to another package."
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    assert HOME == ini["DEFAULT"]["git_url"]
    files = [p for pattern in ("*.md", "nbs/**/*.ipynb", "nixietune/*.py", "benchmarks/*.*") for p in ROOT.glob(pattern)]
    told = {str(p.relative_to(ROOT)): re.findall(r"pip3? install (?:-\S+ )*['\"]?nixietune.*", p.read_text(encoding="utf-8")) for p in files}
    assert {"README.md", "nbs/index.ipynb", "nbs/tutorials/01_quickstart.ipynb", "nixietune/core.py"} <= {name for name, lines in told.items() if lines}
    assert [(name, line) for name, lines in told.items() for line in lines if " @ git" not in line] == []
    assert {str(p.relative_to(ROOT)) for p in ROOT.glob("nbs/tutorials/*.ipynb")} <= {name for name, lines in told.items() if lines}
    for name in ("README.md", *(o for o in told if "tutorials" in o)): assert all(f" @ git+{HOME}'" in line for line in told[name])
