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


def run_of(after, before=None, n=300, **facts):
    "A `Result` that was never trained: only its figures are real."
    import numpy as np
    from types import SimpleNamespace

    from nixietune.comparison import compare
    from test_comparison import evaluation

    before = np.linspace(0, 0.5, n) if before is None else before
    facts = {"full_length": {"query": 0.0, "document": 0.0}, "max_length": 128} | facts
    return SimpleNamespace(comparison=compare(evaluation(before), after(before)), facts={"training": facts})


def test_next_steps():
    "Each thing that the figures call for is said, and nothing else."
    import numpy as np
    from types import SimpleNamespace

    from nixietune.reporting import next_steps
    from test_comparison import evaluation

    rng = np.random.default_rng(0)
    said = lambda after, n=300, more={}, **facts: " ".join(next_steps(run_of(after, n=n, **facts), **more))
    better, worse = lambda o: evaluation(o + 0.1), lambda o: evaluation(o - 0.1)
    assert "Do not use this model" in said(worse) and "Do not use" not in said(better)
    assert "seeds=3" in said(better) and "Several training runs agree" in said(lambda o: [evaluation(o + 0.1)] * 3)
    nothing = said(lambda o: evaluation(o + rng.normal(0.003, 0.1, len(o))))
    assert "would need about" in nothing and "Use it" not in nothing
    assert "Judge more test queries: 100" in said(better, n=100) and "Judge more" not in said(better)
    assert "30% of the documents fill the 128 tokens" in said(better, full_length={"query": 0.0, "document": 0.3})
    lost, sweep = SimpleNamespace(outcome="forgotten"), SimpleNamespace(best=0.5)
    assert "merge_sweep" in said(better, more={"forgetting": lost}) and "nt.forgetting" not in said(better, more={"forgetting": lost})
    assert "take 0.5 of the tuned model" in said(better, more={"forgetting": lost, "sweep": sweep})
