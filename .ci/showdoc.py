"""Mends what nbdev's docs lose in signatures: the comments on the fields of classes, and names that become raw links;
and takes out what they add: a default of None says nothing of the type.

nbdev runs a notebook's classes as `__main__`, where their source, and the comments in it, cannot be found: they are
shown from the module instead. And it turns backticked names into Markdown links even inside a block of code.
Named in settings.ini as `procs`.
"""
import re
from dataclasses import is_dataclass
from importlib import import_module

from nbdev.showdoc import show_doc

SIGNATURE = re.compile(r"```python\n.*?\n```", re.S)
LINK = re.compile(r"\[`([^`]+)`\]\([^)]*\)")
SHOWN = re.compile(r"^\[source\]\(\S+?/(\w+)/(\w+)\.py#.*?^### (\w+)$", re.S | re.M)


def from_module(package, module, name):
    "The signature of a dataclass, from its module; what its quoted type hints name is imported into that."
    home = import_module(f"{package}.{module}")
    shown = getattr(home, name, None)
    while is_dataclass(shown):
        try: return SIGNATURE.search(show_doc(shown)._repr_markdown_())[0]
        except NameError as error: setattr(home, error.name, import_module(error.name))


def mended(signature): return LINK.sub(r"\1", signature).replace(":NoneType=None", "=None")


def mend_signatures(cell):
    "Runs after nbdev's own processors."
    if cell.cell_type != "code" or "show_doc(" not in cell.source: return
    for out in cell.get("outputs", []):
        text = "".join(out.get("data", {}).get("text/markdown", []))
        what = SHOWN.search(text)
        signature = what and from_module(*what.groups())
        if text: out["data"]["text/markdown"] = [SIGNATURE.sub(lambda o: mended(signature or o[0]), text, count=1)]
