"A report in a real browser: complete without a network, and readable on a phone."
import json
import re
from html import escape, unescape

import pytest

from nixietune.display import Table
from nixietune.plots import plot_loss, save_plot
from nixietune.reporting import Code, Heading, Raw, page

LONG = "Nasal congestion, " * 40
FRAME = """<!DOCTYPE html><iframe id="page" width="400" height="800" srcdoc="{}"></iframe><pre id="found"></pre>
<script>
addEventListener("load", () => {{
  const inner = page.contentDocument, image = inner.querySelector("img")
  found.textContent = JSON.stringify({{
    width: inner.documentElement.scrollWidth, image: image.naturalWidth, shown: image.clientWidth,
    ran: page.contentWindow.ran || false, outside: inner.querySelector("#outside").naturalWidth }})
}})
</script>"""


@pytest.mark.browser
def test_phone(browser, tmp_path):
    save_plot(plot_loss([1, 2], [2, 1]), tmp_path / "outside.png")
    blocks = [*(Heading(f"Section {i}") for i in range(5)), LONG, Code(LONG), "nose" * 50,
              Table([{"query": "nose" * 50, "document": LONG, "n": 1}]), plot_loss(range(1, 9), range(8, 0, -1)),
              Raw('<script>ran = 1</script><img id="outside" src="outside.png">')]
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(escape(page("A <title>", blocks))), encoding="utf-8")
    found = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', browser(frame), re.S)[1]))
    assert found["width"] <= 400, "the page scrolls sideways"
    assert found["image"] > 1000 and 300 < found["shown"] <= 400
    assert not found["outside"] and not found["ran"], "the policy lets nothing in, and nothing runs"
