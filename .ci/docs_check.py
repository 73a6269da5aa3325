"""Check the built site: every link leads to a page, an anchor or a file that is there, nothing is loaded from elsewhere, no id is there twice,
no Markdown is shown as it was written, and what users look for comes first in the search. (What depends on the width of the window, as code that
is cut, is looked at by .ci/browser.mjs.)

`python .ci/docs_check.py [folder]` prints what is wrong, and exits with 1 if that is anything."""
import json, re, sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

raw = re.compile(r'\]\([^)\s]*\)|\*\*\S|`|^#+ \S|\|[ :-]*--[ :-]*\||:::|\{#[\w-]+\}|^\s*- search:', re.M)

class Page(HTMLParser):
    """What a page has and wants: `ids`, `links` (addresses in `<a>`), `loads` (what a browser fetches for it), `bare` images without `alt`, `raw`
    Markdown in its text, outside of code and formulas"""
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.bare, self.raw, self.within = Counter(), [], [], 0, [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_data(self, data):
        if not self.within: self.raw += raw.findall(data)

    def handle_endtag(self, tag):
        if self.within and self.within[-1] == tag: self.within.pop()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ('pre', 'code', 'script', 'style') or 'math' in (attrs.get('class') or '').split() or (self.within and tag == self.within[-1]):
            self.within.append(tag)
        if 'id' in attrs: self.ids[attrs['id']] += 1
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag == 'link' and attrs.get('rel') in ('stylesheet', 'icon'): self.loads.append(attrs['href'])
        if attrs.get('src'): self.loads.append(attrs['src'])
        self.bare += tag == 'img' and not attrs.get('alt')

def problem(folder, pages, page, address):
    "What is wrong with `address` on the page `page`, if anything is"
    url = urlsplit(address)
    if url.scheme or url.netloc: return
    target = (page.parent/unquote(url.path)).resolve() if url.path else page
    if target.is_dir(): target = target/'index.html'
    if folder not in target.parents: return 'leads out of the site'
    if not target.is_file(): return 'leads nowhere'
    if url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids: return 'has no such anchor'

def check(folder):
    "Everything that is wrong with the site in `folder`, as pairs of a page's name and a message"
    folder = folder.resolve()
    pages = {o: Page(o) for o in sorted(folder.rglob('*.html'))}
    for path, page in pages.items():
        for address in dict.fromkeys(page.links + page.loads):
            if (what := problem(folder, pages, path, address)): yield path.name, f'{address} {what}'
        for address in page.loads:
            if urlsplit(address).netloc: yield path.name, f'{address} is loaded from another server'
        for name, n in page.ids.items():
            if n > 1: yield path.name, f'id {name} is there {n} times'
        for what in dict.fromkeys(page.raw): yield path.name, f'shows Markdown as it was written: {what}'
        if page.bare: yield path.name, f'{page.bare} images have no alternative text (#| fig-alt: ...)'
    for css in folder.rglob('*.css'):
        if '@import url("http' in (text := css.read_text(encoding='utf-8')) or '@import url(http' in text: yield css.name, 'imports from another server'
    for entry in json.loads((folder/'search.json').read_text(encoding='utf-8')):
        if (what := problem(folder, pages, folder/'index.html', entry['href'])): yield 'search.json', f'{entry["href"]} {what}'
    if not pages: yield str(folder), 'has no pages'

if __name__ == '__main__':
    problems = list(check(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent/'_docs')))
    print(*(f'{page}: {what}' for page, what in problems), f'{len(problems)} problems', sep='\n')
    sys.exit(bool(problems))
