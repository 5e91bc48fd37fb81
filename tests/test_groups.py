"What groups promise across processes."
import json
import os
import subprocess
import sys

CODE = """
import sys
from nixietune.groups import load_groups
groups = load_groups("data.jsonl")
print(len(groups), groups._fingerprint, groups[len(groups) - 1]["query"])
"""


def test_processes_share_the_cache(tmp_path):
    "Several processes that load a new file at once, as under torchrun, all get it, and it is kept once."
    row = {"pos": [{"doc": "a document of some length " * 20}], "neg": [{"doc": "another"}]}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"query": f"q{i}", **row}) + "\n" for i in range(20_000)))
    env = os.environ | {"NIXIETUNE_CACHE": str(tmp_path / "cache")}
    start = lambda: subprocess.Popen([sys.executable, "-c", CODE], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    running = [start() for _ in range(3)]
    said = [o.communicate()[0].splitlines() for o in running] + [start().communicate()[0].splitlines()]
    assert all(o.returncode == 0 for o in running)
    assert all(o == said[0] and o[-1].startswith("20000 ") and o[-1].endswith(" q19999") for o in said), said
    (kept,) = (tmp_path / "cache/groups").iterdir()
    assert sorted(o.name for o in kept.iterdir()) == ["notes.json", "rows.arrow"]
