"The widgets in a running Jupyter server, clicked in headless Chromium: JupyterLab and the classic notebook."
import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browser import find as find_browser

CELLS = ["""
import numpy as np, pandas as pd
import nixietune as nt
from nixietune.merging import MergeSweep
texts = ["how to bake bread at home", "how to bake a cake", "how to cook rice", "a loaf from flour and yeast", "onion soup with bread"]
corpus = [{"doc_id": f"r{i}", "text": text} for i, text in enumerate(texts)]
words = sorted({word for text in texts for word in text.split()} | {"need"})
def base(texts, role): return np.array([[1e-3 + text.split().count(word) for word in words] for text in texts])
def tuned(texts, role): return base([text + " flour yeast loaf loaf"*("bread" in text and role == "query") for text in texts], role)
groups = nt.make_groups([{"query": "how to bake bread", "pos": [{"doc": texts[3]}]}, {"query": "cook rice", "pos": [{"doc": texts[2]}]}], "nixietune")
nt.search_box(base, tuned, corpus, groups, n=3, progress=False)""", """
found = nt.find_false_negatives(groups, tuned, corpus, relative=0.3, progress=False)
found.widget()""", """
frame = pd.DataFrame({"query": ["one", "one", "two"], "doc": ["near", "nearer", "far"], "answer": "answer", "score": [0.8, 0.93, 0.1], "positive": 1.0})
nt.margin_slider(frame)""", """
rows = [{"share": o, "target": 0.4 + 0.3*o, "others": 0.5 - 0.1*o*o} for o in (0, 0.25, 0.5, 0.75, 1)]
nt.merge_slider(MergeSweep(rows, 0.25, "ndcg@10", 0.01, None))"""]

FRONTS = { # name -> (path of the page, is it ready?, run all cells)
    "lab": ("doc/tree/{}", "[...jupyterapp.shell.widgets('main')][0].sessionContext.session.kernel.status == 'idle'", "jupyterapp.commands.execute('notebook:run-all-cells')"),
    "classic": ("notebooks/{}", "Jupyter.notebook.kernel.info_reply.status == 'ok' && !!Jupyter.notebook.kernel.widget_manager", "Jupyter.notebook.execute_all_cells()"),
}


class Page:
    "A page of a browser, driven by the Chrome DevTools protocol."
    def __init__(self, port):
        import websocket
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
        self.socket, self.n = websocket.create_connection(next(o["webSocketDebuggerUrl"] for o in pages if o["type"] == "page"), timeout=60), 0

    def ask(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps({"id": self.n, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.n: pass
        assert "error" not in answer, answer
        return answer["result"]

    def js(self, code): return self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)["result"].get("value")

    def wait(self, code, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.js(f"(() => {{ try {{ return {code} }} catch (e) {{ return null }} }})()"): return found
            time.sleep(0.1)
        if shots := os.environ.get("WIDGET_SHOTS"): self.shot(f"{shots}/failed.png")
        raise AssertionError(f"never true: {code}\n{self.js('document.body.innerText')}")

    def see(self, text, where=""): return self.wait(f"[...document.querySelectorAll('.widget-html {where}')].map(o => o.innerText).join('').includes({json.dumps(text)})")

    def click(self, selector, text=""):
        "A real click in the middle of the first element that matches and holds the text."
        x, y = self.wait(f"(() => {{ const o = [...document.querySelectorAll({json.dumps(selector)})].find(o => o.innerText.includes({json.dumps(text)}) && o.getClientRects().length); "
                         "o.scrollIntoView({block: 'center'}); const r = o.getBoundingClientRect(); return [r.x + r.width/2, r.y + r.height/2] })()")
        for kind in ("mousePressed", "mouseReleased"): self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name, code, **more):
        for kind in ("keyDown", "keyUp"): self.ask("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **more)

    def shot(self, path): Path(path).write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))


def stopped(process):
    process.terminate()
    try: process.wait(20)
    except subprocess.TimeoutExpired: process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "The address of a Jupyter server, and its folder."
    folder = tmp_path_factory.mktemp("jupyter")
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=source.strip()) for i, source in enumerate(CELLS)]
    kernel = dict(name="python3", display_name="python3", language="python")
    for name in FRONTS: (folder/f"{name}.ipynb").write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    own = {f"JUPYTER_{o}_DIR": str(folder/o.lower()) for o in ("CONFIG", "DATA", "RUNTIME")} | {"IPYTHONDIR": str(folder/"ipython"), "PYTHONPATH": str(Path(__file__).parents[1])}
    (folder/"config"/"labconfig").mkdir(parents=True)  # no question about news in the way
    (folder/"config"/"labconfig"/"page_config.json").write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    options = f"--no-browser --allow-root --ServerApp.ip=127.0.0.1 --ServerApp.port={port} --ServerApp.root_dir={folder} --IdentityProvider.token= --LabApp.expose_app_in_browser=True".split()
    with open(folder/"log", "w") as log: process = subprocess.Popen([sys.executable, "-m", "jupyter_server", *options], env=os.environ | own, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(300):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5); break
            except OSError: time.sleep(0.1)
        else: raise AssertionError((folder/"log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally: stopped(process)


@pytest.fixture
def page(tmp_path):
    "A page of headless Chromium that can reach nothing but this machine."
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
        --disable-sync --remote-debugging-port=0 --remote-allow-origins=* --window-size=1200,1500""".split()
    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    process = subprocess.Popen([find_browser(), *flags, nowhere, f"--user-data-dir={tmp_path}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        at = tmp_path/"DevToolsActivePort"
        for _ in range(300):
            if at.exists() and at.read_text().strip(): break
            time.sleep(0.1)
        yield Page(at.read_text().split()[0])
    finally: stopped(process)


@pytest.mark.browser
@pytest.mark.parametrize("front", FRONTS)
def test_widgets(server, page, front):
    "Type, click, move: the view below follows."
    path, ready, run = FRONTS[front]
    page.ask("Page.navigate", url=f"{server}/{path.format(f'{front}.ipynb')}")
    page.wait(ready)
    time.sleep(2)  # widgets ask the kernel for what it has, and give no sign when they are done: what runs meanwhile is not shown
    page.click(".jp-Cell .cm-content, .cell .CodeMirror")  # the page has the focus
    page.js(run)
    page.wait("document.querySelectorAll('.widget-vbox').length >= 4")

    page.click("input[placeholder^='type a query']")
    page.ask("Input.insertText", text="bread please")
    page.key("Enter", 13, text="\r")
    page.see("“bread please”"); page.see("▲ from"); page.see("▼ to")
    page.click("button", "A known query")
    page.see("“how to bake bread”"); page.see("✓ known answer"); page.see("first known answer: 2")

    page.see("1 of 4 (0 of 4 decided)")
    page.click("button", "Make positive")
    page.see("2 of 4 (1 of 4 decided · Make positive: 1)")
    page.click("button", "Back")
    page.see("1 of 4 (1 of 4 decided")

    page.see("relative=0.95 refuses 0 of 3 candidates")
    page.js("[...document.querySelectorAll('.widget-slider')].filter(o => o.getClientRects().length)[0].querySelector('.noUi-handle').focus()")
    for _ in range(5): page.key("ArrowLeft", 37)
    page.see("relative=0.9 refuses 1 of 3 candidates")
    page.click("button", "margin")
    page.see("margin=0 refuses 0 of 3 candidates")

    page.see("0.25 of the tuned model: the best")
    page.js("[...document.querySelectorAll('.widget-slider')].filter(o => o.getClientRects().length).at(-1).querySelector('.noUi-handle').focus()")
    page.key("ArrowRight", 39)
    page.see("0.5 of the tuned model")
    if shots := os.environ.get("WIDGET_SHOTS"): page.shot(f"{shots}/{front}.png")
