"Every link of the built site into itself must lead somewhere: `python .ci/links.py _docs`."
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from nbdev.config import get_config


class Page(HTMLParser):
    "The ids of a page and what it links to."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links = {"", "top"}, set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in {"id", "name"}: self.ids.add(value)
            if key in {"href", "src"} and value: self.links.add(value)


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
print(*broken, f"{len(pages)} pages, {len(broken)} broken links", sep="\n")
sys.exit(bool(broken) or not pages)
