"Every link of the built site into itself must lead somewhere, and must have become one: `python .ci/links.py _docs`."
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from nbdev.config import get_config

VERBATIM = {"code", "pre", "script", "style"}


class Page(HTMLParser):
    "The ids of a page, what it links to, and links that stand there in Markdown: nbdev makes one of a name in backticks, inside another, too."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.raw, self.code = {"", "top"}, set(), [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.code += tag in VERBATIM
        for key, value in attrs:
            if key in {"id", "name"}: self.ids.add(value)
            if key in {"href", "src"} and value: self.links.add(value)

    def handle_endtag(self, tag): self.code -= tag in VERBATIM

    def handle_data(self, data):
        if "](" in data and not self.code: self.raw.append(data.strip()[:60])


def leads_to(path, link):
    "The file inside the site that `link` on the page `path` means, and the anchor; nothing for links to elsewhere."
    url, anchor = urldefrag(link)
    if url.startswith(base): target = root / unquote(url[len(base):]).lstrip("/")
    elif urlsplit(url).scheme or url.startswith("//"): return None, anchor
    else: target = path.parent / unquote(url.split("?")[0]) if url else path
    return (target / "index.html" if target.is_dir() else target).resolve(), unquote(anchor)


config, root = get_config(), Path(sys.argv[1]).resolve()
base = f"{config.doc_host}{config.doc_baseurl}".rstrip("/")
pages = {path: Page(path) for path in sorted(root.rglob("*.html"))}
broken = []
for path, page in pages.items():
    for link in sorted(page.links):
        target, anchor = leads_to(path, link)
        if target and (not target.exists() or target in pages and anchor not in pages[target].ids):
            broken.append(f"{path.relative_to(root)}: {link} leads nowhere")
    broken += [f"{path.relative_to(root)}: {text!r} is no link" for text in page.raw]
print(*broken, f"{len(pages)} pages, {len(broken)} broken links", sep="\n")
sys.exit(bool(broken) or not pages)
