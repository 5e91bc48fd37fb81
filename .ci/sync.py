"""Are package and notebooks in step? `python .ci/sync.py COPY`

Exports and cleans in a copy of the project and compares with what stands here, so that nothing here is touched and
files that git does not know count as well. The copy is left for the docs to be built in.
"""
import difflib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT, COPY = Path(__file__).resolve().parents[1], Path(sys.argv[1])
IGNORE = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs")
CURES = {".py": "not what the notebooks export: run nbdev_export", ".ipynb": "not clean: run nbdev_clean"}

for name in ("nbs", "nixietune", ".ci"): shutil.copytree(ROOT / name, COPY / name, ignore=IGNORE)
for name in ("settings.ini", "_quarto.yml"): shutil.copy(ROOT / name, COPY)
for module in COPY.glob("nixietune/**/*.py"):
    if module.name != "__init__.py": module.unlink()  # that one is written by hand
for command in ("nbdev_export", "nbdev_clean"): subprocess.run([command], cwd=COPY, check=True)

files = {f.relative_to(top) for top in (ROOT, COPY) for pattern in ("nixietune/**/*.py", "nbs/**/*.ipynb") for f in top.glob(pattern)
         if ".ipynb_checkpoints" not in f.parts}
wrong = 0
for name in sorted(files):
    have, want = ((top / name).read_text(encoding="utf-8").splitlines() if (top / name).exists() else [] for top in (ROOT, COPY))
    if have == want: continue
    wrong += 1
    print(f"{name}: {CURES[name.suffix] if want else 'no notebook exports it'}")
    print(*[line[:160] for line in difflib.unified_diff(have, want, "here", "as it should be", lineterm="", n=1)][:20], sep="\n")
print(f"{len(files)} files, {wrong} out of step")
sys.exit(bool(wrong))
