"""Writes constraints.txt: the exact version of everything that .[cpu,demo,dev] brings, as this environment has it.

`make constraints` runs it. To move to newer versions: upgrade in .venv with pip, run the tests, then write the file.
Local suffixes (torch's +cpu) are left out, since other machines cannot install them.
"""
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRAS = ("cpu", "demo", "dev")
todo, seen, pins = [("nixietune", EXTRAS)], set(), {}
while todo:
    name, extras = todo.pop()
    if (name, extras) in seen: continue
    seen.add((name, extras))
    try: package = distribution(name)
    except PackageNotFoundError: continue  # for another platform
    pins[name] = Version(package.version).public
    for need in map(Requirement, package.requires or []):
        if not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            todo.append((canonicalize_name(need.name), tuple(sorted(need.extras))))
del pins["nixietune"]

head = "# The versions that `make` installs, all of them; written by `make constraints`, not by hand.\n"
lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
(Path(__file__).parents[1] / "constraints.txt").write_text(head + "".join(lines))
print(f"constraints.txt: {len(pins)} packages")
