"""Swap the script addresses that Quarto writes into pages for copies that are shipped with the site.

Quarto runs this after rendering (`post-render` in _quarto.yml), with the folder of the site in QUARTO_PROJECT_OUTPUT_DIR.
A page with a table or a widget asks other hosts for up to three scripts. Each is copied into `site_libs/local/`, once, from
--copies when the folder has it, otherwise from its pinned address, and only when its SHA-256 is the one below. A page that
would still load anything from elsewhere is an error, so a new dependency is noticed when the site is built."""
import argparse, hashlib, os, re, sys
from pathlib import Path
from urllib.request import urlopen

# file name in an address -> (name of the copy, pinned address, SHA-256)
SCRIPTS = {
    r'require(\.min)?\.js': ('require.js', 'https://cdn.jsdelivr.net/npm/requirejs@2.3.6/require.js',
        '9485f0917f97fcf4f63a5ea365200ffd57f123f451382a2f9a1ad2e2fd51ac9b'),
    r'jquery(\.min)?\.js': ('jquery.min.js', 'https://cdn.jsdelivr.net/npm/jquery@3.5.1/dist/jquery.min.js',
        'f7f6a5894f1d19ddad6fa392b2ece2c5e578cbf7da4ea805b6885eb6985b6e3d'),
    r'embed-amd\.js': ('embed-amd.js', 'https://cdn.jsdelivr.net/npm/@jupyter-widgets/html-manager@1.0.14/dist/embed-amd.js',
        'c159d8154aff82681307e4a6cd55d8d5de4715b4b4df868c943e82b9e4c28ee0'),
}
SCRIPT = re.compile(r'<script\b[^>]*?\bsrc\s*=\s*["\'](?P<src>(?:https?:)?//[^"\']+)["\'][^>]*>', re.I)
OUTSIDE = re.compile(r'<(?:script\b[^>]*?\bsrc|img\b[^>]*?\bsrc|iframe\b[^>]*?\bsrc'
    r'|link\b(?=[^>]*\brel\s*=\s*["\']?(?:stylesheet|preload|modulepreload))[^>]*?\bhref)\s*=\s*["\']((?:https?:)?//[^"\']+)', re.I)
CSS = re.compile(r'@import\s+(?:url\()?["\']?((?:https?:)?//[^"\')\s;]+)|url\(\s*["\']?((?:https?:)?//[^"\')\s]+)', re.I)


def copy_of(src):
    "The entry of `SCRIPTS` that stands in for the address `src`, or None"
    name = src.split('?')[0].rsplit('/', 1)[-1]
    return next((v for k,v in SCRIPTS.items() if re.fullmatch(k, name)), None)


def swap(
    html, # Text of a page
    up='', # '../' for each folder between the page and the top of the site
): # The page with local addresses, and the entries of `SCRIPTS` it needs
    "Point the known scripts of `html` to `site_libs/local`, without the attributes that belong to another host"
    needed = set()
    def local(m):
        entry = copy_of(m['src'])
        if entry is None: return m[0]
        needed.add(entry)
        tag = m[0].replace(m['src'], f'{up}site_libs/local/{entry[0]}')
        return re.sub(r'\s+(?:integrity|crossorigin)(?:\s*=\s*(?:"[^"]*"|\'[^\']*\'))?', '', tag)
    return SCRIPT.sub(local, html), needed


def outside(text, css=False):
    "Addresses on other hosts from which a page (or a style sheet) would load something"
    return sorted({a or b for a,b in CSS.findall(text)} if css else set(OUTSIDE.findall(text)))


def fetch(entry, copies=None):
    "Bytes of the script `entry` from the folder `copies` or its pinned address, after checking the digest"
    name,url,digest = entry
    here = Path(copies)/name if copies else None
    if here is not None and here.is_file(): data,where = here.read_bytes(),here
    else:
        with urlopen(url, timeout=60) as r: data,where = r.read(),url
    if (got:=hashlib.sha256(data).hexdigest())!=digest:
        raise SystemExit(f'{where} is not the script that was pinned: SHA-256 {got}, expected {digest}')
    return data


def main(argv=None):
    "Rewrite every page under the site folder; exit with an error when a page would still load something from elsewhere"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('site', nargs='?', default=os.environ.get('QUARTO_PROJECT_OUTPUT_DIR'), help='folder of the rendered site')
    p.add_argument('--copies', default=os.environ.get('SITE_SCRIPTS'), help='folder with copies of the scripts, to build offline')
    a = p.parse_args(argv)
    if not a.site or not Path(a.site).is_dir(): raise SystemExit(f'no such site folder: {a.site!r}')
    site,needed,left = Path(a.site),set(),{}
    for page in sorted(site.rglob('*.html')):
        old = page.read_text(encoding='utf-8')
        new,scripts = swap(old, '../'*(len(page.relative_to(site).parts)-1))
        needed |= scripts
        if new!=old: page.write_text(new, encoding='utf-8')
        if bad:=outside(new): left[str(page.relative_to(site))] = bad
    for sheet in sorted(site.rglob('*.css')):
        if bad:=outside(sheet.read_text(encoding='utf-8', errors='replace'), css=True): left[str(sheet.relative_to(site))] = bad
    for entry in sorted(needed):
        out = site/'site_libs/local'/entry[0]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(fetch(entry, a.copies))
    if left:
        raise SystemExit('pages that load something from another host:\n' + '\n'.join(f'{k}: {", ".join(v)}' for k,v in left.items()))
    print(f'{len(needed)} scripts are shipped with the site')


if __name__ == '__main__': main()
