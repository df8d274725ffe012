"""The site is checked at its source, without Quarto: pages are staged in a copy of the repository as `nbdev-docs` stages them,
then every target, link, anchor, image, setting, skill page and command is looked up. Each check is seen to catch a planted fault."""
import hashlib, importlib.util, json, os, re, shlex, shutil, subprocess, sys, textwrap
from pathlib import Path
import pytest, warm, yaml
from papermill import inspect_notebook

ROOT = Path(__file__).parent.parent
NBS = ROOT/'nbs'
DOC_HOST = 'https://merginguriel.github.io/merginguriel/'
PAGES = ('.ipynb', '.qmd', '.md')
STAGE = """
import functools, nbdev.config
nbdev.config._load_toml = functools.cache(nbdev.config._load_toml) # Asked for each cell
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
refresh_quarto_yml()
proc_nbs(n_workers=0)
"""


@pytest.fixture(scope='session')
def copy(tmp_path_factory):
    "A copy of the repository with its pages staged in `_proc`; nothing in the checkout changes"
    out = tmp_path_factory.mktemp('site')/'repository'
    shutil.copytree(ROOT, out, symlinks=True, ignore=shutil.ignore_patterns('.git', 'runs', '_proc', '_docs', 'build', 'dist',
        '.venv', 'venv', '__pycache__', '*.egg-info', '.pytest_cache', '.ipynb_checkpoints'))
    env = dict(os.environ, PYTHONDONTWRITEBYTECODE='1', MPLBACKEND='agg', **warm.VARIABLES)
    r = subprocess.run([*warm.python(), '-c', STAGE], cwd=out, env=env, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, (r.stdout+r.stderr)[-6000:]
    return out


@pytest.fixture(scope='session')
def staged(copy): return copy/'_proc'


# ---- what the sidebar, the navbar and the listings point to

def load(path): return yaml.safe_load(Path(path).read_text(encoding='utf-8'))

def targets(o):
    "Files named in a `contents`, `left` or `right` of a Quarto navigation, in order"
    if isinstance(o, str): return [] if re.match(r'\w+:', o) or o=='---' else [o]
    if isinstance(o, list): return [t for x in o for t in targets(x)]
    if isinstance(o, dict): return [t for k in ('href','file','contents','left','right','menu') for t in targets(o.get(k))]
    return []

def automatic(o):
    "Globs of the `auto` items of a Quarto navigation, in order"
    if isinstance(o, list): return [t for x in o for t in automatic(x)]
    if isinstance(o, dict): return [*([o['auto']] if 'auto' in o else []), *automatic(o.get('contents'))]
    return []

def expand(site, glob):
    "Pages that Quarto puts in the place of an `auto` item: those of the folder, without its index"
    there = pages(site)
    return [str(p.relative_to(site)) for p in sorted(Path(site).glob(glob)) if p in there and p.stem!='index']

def pages(site): return sorted(p for p in Path(site).rglob('*') if p.suffix in PAGES and not p.name.startswith('_'))

def front_matter(path):
    text = Path(path).read_text(encoding='utf-8')
    m = re.match(r'---\n(.*?)\n---\n', text, re.S)
    return (yaml.safe_load(m[1]) if m else {}), (text[m.end():] if m else text)

def dangling_targets(site):
    "Targets of sidebar, navbar and listings under `site` that do not exist"
    web,side = load(site/'_quarto.yml')['website'],load(site/'sidebar.yml')['website']['sidebar']
    bad = [t for t in targets(side)+targets(web['navbar']) if not (site/t).is_file()]
    bad += [f'auto: {g}' for g in automatic(side) if not expand(site, g)]
    for p in pages(site):
        if p.suffix=='.ipynb': continue
        listing = front_matter(p)[0].get('listing') or []
        for o in listing if isinstance(listing, list) else [listing]:
            globs = o['contents'] if isinstance(o['contents'], list) else [o['contents']]
            bad += [f'{p.relative_to(site)}: {g}' for g in globs if not list(p.parent.glob(g))]
    return bad

def unlisted(site):
    "Pages under `site` that the sidebar does not have, and those that it has twice"
    side = load(site/'sidebar.yml')['website']['sidebar']
    named = targets(side)+[p for g in automatic(side) for p in expand(site, g)]
    return [str(p.relative_to(site)) for p in pages(site) if named.count(str(p.relative_to(site)))!=1]


def test_navigation_targets_exist(staged): assert dangling_targets(staged) == []
def test_every_page_is_in_the_sidebar(staged): assert unlisted(staged) == []

def test_every_floor_is_a_section_made_from_its_folder(staged):
    reference = load(staged/'sidebar.yml')['website']['sidebar']['contents'][-1]['contents']
    there = sorted(p.name for p in staged.iterdir() if p.is_dir() and re.match(r'\d_', p.name))
    assert [o['contents'] for o in reference] == [[dict(auto=f'{name}/*')] for name in there] and len(there)==8
    assert [o['section'][0] for o in reference] == [name[0] for name in there]

def test_the_architecture_page_shows_every_notebook_of_a_floor():
    "Its table and picture are computed when it is executed, and kept: execute it again when a notebook comes or goes"
    cells = json.loads((NBS/'explanations/architecture.ipynb').read_text(encoding='utf-8'))['cells']
    data = [o.get('data', {}) for c in cells for o in c.get('outputs', [])]
    shown = '\n'.join(''.join(o.get('text/markdown', '')) for o in data)
    there = sorted(str(p.relative_to(NBS)) for p in NBS.glob('[0-9]_*/*.ipynb'))
    linked = re.findall(r'\]\(\.\./(\d_\w+/\w+\.ipynb)\)', shown)
    assert linked[:len(there)] == there and set(linked) == set(there) and there # The table of the house comes first

def test_every_notebook_is_staged(staged):
    there = {p.relative_to(NBS) for p in NBS.rglob('*.ipynb') if not any(o.startswith(('.','_')) for o in p.relative_to(NBS).parts)}
    assert there == {p.relative_to(staged) for p in staged.rglob('*.ipynb')} and there

def test_a_missing_and_an_unlisted_page_are_reported(staged, tmp_path):
    site = Path(shutil.copytree(staged, tmp_path/'site'))
    (site/'index.ipynb').rename(site/'07_planted.ipynb')
    for p in [*(site/'skills').glob('*.md'), *(site/'7_command').glob('*')]: p.unlink()
    (site/'8_attic').mkdir()
    for name in ('8_attic/10_planted.ipynb', '0_ground/11_new.ipynb', '0_ground/_notes.ipynb', '0_ground/index.ipynb'):
        shutil.copy(site/'0_ground/10_core.ipynb', site/name)
    bad = dangling_targets(site)
    assert 'index.ipynb' in bad and any(o.startswith('skills/index.qmd: ') for o in bad)
    assert 'auto: 7_command/*' in bad and 'auto: skills/*' in bad
    # the new page of a floor is listed by itself
    assert unlisted(site) == ['07_planted.ipynb', '0_ground/index.ipynb', '8_attic/10_planted.ipynb']
    side = load(site/'sidebar.yml')
    side['website']['sidebar']['contents'][0]['contents'].append('0_ground/11_new.ipynb')
    (site/'sidebar.yml').write_text(yaml.dump(side))
    assert '0_ground/11_new.ipynb' in unlisted(site) # twice


# ---- links, anchors and images

LINK = re.compile(r'!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+["\'][^)]*)?\)|^\s*\[[^\]]+\]:\s+(\S+)'
    r'|<(?:a|img)\b[^>]*?\b(?:href|src)\s*=\s*["\']([^"\']+)', re.M)
FENCE = re.compile(r'^(\s*)(`{3,}|~{3,})[^\n]*\n.*?^\1\2\s*$', re.M|re.S)
CODE = re.compile(r'(`+)(?!`).*?(?<!`)\1(?!`)', re.S)

def prose(path):
    "Markdown of a page without its code; of a notebook, the markdown cells and outputs"
    if path.suffix!='.ipynb': return FENCE.sub('', front_matter(path)[1])
    out = []
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if c['cell_type']!='code': out.append(''.join(c['source']))
        for o in c.get('outputs', []):
            out.append(''.join(o.get('data', {}).get('text/markdown', '')))
    return FENCE.sub('', '\n\n'.join(out))

def links(path): return [next(filter(None, m)) for m in LINK.findall(CODE.sub('', prose(path)))]

def anchors(path):
    "Identifiers that pandoc gives to the headings of a page, and explicit ones"
    ids,text = [],prose(path)
    for h in re.findall(r'^#{1,6}\s+(.+?)\s*#*$', text, re.M):
        if m:=re.search(r'\{[^}]*#([\w.:-]+)[^}]*\}\s*$', h): ids.append(m[1]); continue
        h = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', re.sub(r'\{[^}]*\}\s*$', '', h))
        h = re.sub(r'[^\w\s.-]', '', re.sub(r'<[^>]+>', '', h).lower().replace('*',''))
        h = re.sub(r'^[\W\d_]+', '', '-'.join(h.split())) or 'section'
        n = sum(o==h or re.fullmatch(re.escape(h)+r'-\d+', o) is not None for o in ids)
        ids.append(h if not n else f'{h}-{n}')
    return set(ids) | set(re.findall(r'\b(?:id|name)\s*=\s*["\']([^"\']+)', text)) | set(re.findall(r'\]\{[^}]*#([\w.:-]+)', text))

def output_name(path):
    "Name of the `.html` made from a page; nbdev takes the number off a notebook's name and says so in the staged front matter"
    head = ''.join(json.loads(path.read_text(encoding='utf-8'))['cells'][0]['source']) if path.suffix=='.ipynb' else ''
    m = re.search(r'^output-file: (\S+)$', head, re.M)
    return m[1] if m else f'{path.stem}.html'

def find_page(path):
    "The source of a page, of the `.html` made from it, or of a folder's index; None when there is none"
    if path.suffix=='.html' and path.parent.is_dir():
        return next((p for p in sorted(path.parent.iterdir()) if p.suffix in PAGES and output_name(p)==path.name), None)
    tries = [path/f'index{s}' for s in PAGES] if path.is_dir() else [path]
    return next((p for p in tries if p.is_file()), None)

def broken_links(path, site):
    "Links of the page `path` that lead nowhere inside `site`"
    bad = []
    for link in links(path):
        inner = link.removeprefix(DOC_HOST) if link.startswith(DOC_HOST) else link
        if re.match(r'\w[\w+.-]*:|//', inner): continue
        name,_,anchor = inner.partition('#')
        name = name.split('?')[0]
        base = site if inner!=link or name.startswith('/') else path.parent
        page = find_page(base/name.lstrip('/')) if name else path
        if page is None and inner!=link and not name: page = find_page(site)
        if page is None or not page.resolve().is_relative_to(site.resolve()): bad.append(f'{path.relative_to(site)}: {link}')
        elif inner!=link and anchor.startswith('_'): pass # nbdev links private names, which have no entry, to the page as a whole
        elif anchor and page.suffix in PAGES and anchor not in anchors(page): bad.append(f'{path.relative_to(site)}: {link} (no such heading)')
    return bad


def test_links_of_every_page_resolve(staged):
    assert [o for p in pages(staged) for o in broken_links(p, staged)] == []

def test_links_of_the_repository_files_resolve():
    "README.md and its siblings are read on the code host, where links are relative to the repository"
    assert [o for p in sorted(ROOT.glob('*.md')) for o in broken_links(p, ROOT)] == []

@pytest.mark.parametrize('link', ['nowhere.ipynb', 'explanations/none.html', '#no-such-heading', 'other.md#absent', '../../outside.md',
    f'{DOC_HOST}nothing.html#f', f'{DOC_HOST}other.html#f', '![](images/none.png)', '<img src="images/none.png">', '<a href="gone.md">'])
def test_a_broken_link_is_reported(tmp_path, link):
    (tmp_path/'other.md').write_text('# Other\n\n## Part *one*, `code` & more\n\ntext\n')
    text = link if link.startswith(('!','<')) else f'see [there]({link})'
    (tmp_path/'page.md').write_text(f'# Page\n\n{text}\n')
    assert len(broken_links(tmp_path/'page.md', tmp_path)) == 1
    nb = dict(cells=[dict(cell_type='markdown', source=['# Page\n', '\n', text])])
    (tmp_path/'page.ipynb').write_text(json.dumps(nb))
    assert len(broken_links(tmp_path/'page.ipynb', tmp_path)) == 1

def test_good_links_and_code_are_not_reported(tmp_path):
    (tmp_path/'other.md').write_text('# Other\n\n## Part *one*, `code` & more\n\n## 2. Twice\n\n## 2. Twice\n\n[x]{#here}\n')
    (tmp_path/'a.png').write_bytes(b'')
    (tmp_path/'page.md').write_text('# Page\n\n[a](other.md) [b](other.html#part-one-code-more) [c](#page) [d](https://example.org/x)'
        f' [e](other.md#twice-1) [f](other.md#here) [i]({DOC_HOST}other.html#_private) ![](a.png) `[g](none.md)`\n\n```\n[h](none.md)\n```\n')
    assert broken_links(tmp_path/'page.md', tmp_path) == []
    assert len(links(tmp_path/'page.md')) == 8


# ---- settings

def wrong_settings(quarto, scss, sidebar):
    "What in the settings would make a page depend on another host, or make a second copy of every page"
    html,bad = quarto['format'].get('html') or {},[]
    if html.get('html-math-method')!='mathml': bad.append('formulas are not MathML')
    if set(quarto['format'])!={'html'}: bad.append('a format besides html')
    if not re.search(r'^\$web-font-path:\s*false\s*;', scss, re.M): bad.append('the theme may load a web font')
    if not any(str(o).endswith('.scss') for o in html.get('theme') or []): bad.append('the theme is not used')
    if '_local_scripts.py' not in str(quarto['project'].get('post-render')): bad.append('scripts are left on other hosts')
    if set(quarto.get('metadata-files') or [])!={'nbdev.yml','sidebar.yml'}: bad.append('nbdev.yml or sidebar.yml is not read')
    if [o['section'] for o in sidebar['website']['sidebar']['contents']]!=['Start','Explanations','Skills','Experiments','Reference']:
        bad.append('sections of the sidebar')
    return bad

def test_settings(staged):
    quarto,side,scss = load(staged/'_quarto.yml'),load(staged/'sidebar.yml'),(staged/'theme.scss').read_text()
    assert wrong_settings(quarto, scss, side) == []
    for theme in quarto['format']['html']['theme'][1:]: assert (staged/theme).is_file()
    assert (staged/quarto['project']['post-render']).resolve().is_file()
    assert load(staged/'nbdev.yml')['project']['output-dir'] == '_docs'

def test_wrong_settings_are_reported():
    quarto = dict(project={}, format=dict(html=dict(theme=['cosmo']), commonmark='default'))
    assert len(wrong_settings(quarto, '$web-font-path: "x";', dict(website=dict(sidebar=dict(contents=[]))))) == 7

def test_the_yml_at_the_top_is_the_one_nbdev_reads_and_nothing_generated_is_stale(copy):
    assert (NBS/'_quarto.yml').is_symlink() and (NBS/'_quarto.yml').resolve() == (ROOT/'_quarto.yml').resolve()
    assert (ROOT/'skills').is_symlink() and (ROOT/'skills').resolve() == (NBS/'skills').resolve()
    assert (copy/'_quarto.yml').read_text() == (ROOT/'_quarto.yml').read_text()
    assert (copy/'nbs/nbdev.yml').read_text() == (NBS/'nbdev.yml').read_text(), 'commit nbs/nbdev.yml as nbdev makes it'


# ---- scripts come with the site

QUARTO_HEAD = """<html><head>
<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="sha512-x==" crossorigin="anonymous"></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js" integrity="sha512-y==" crossorigin="anonymous" data-relocate-top="true"></script>
<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>
<script src="https://unpkg.com/@jupyter-widgets/html-manager@*/dist/embed-amd.js" crossorigin="anonymous"></script>
<script src="site_libs/quarto.js"></script><link href="site_libs/a.css" rel="stylesheet">
</head><body><a href="https://example.org">a link is not a load</a> <code>&lt;script src="https://x.y/z.js"&gt;</code></body></html>"""

@pytest.fixture
def local_scripts(monkeypatch):
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    spec = importlib.util.spec_from_file_location('local_scripts', NBS/'_local_scripts.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m

def small_site(m, tmp_path, monkeypatch):
    "A site of two pages, and copies of the scripts whose digests are the expected ones"
    site,copies = tmp_path/'site',tmp_path/'copies'
    (site/'deep/er').mkdir(parents=True); (site/'site_libs').mkdir(); copies.mkdir()
    for p in ('index.html','deep/er/page.html'): (site/p).write_text(QUARTO_HEAD)
    (site/'site_libs/a.css').write_text('body { background: url("data:image/png;base64,AA") } @import "b.css";')
    scripts = {k:(n,u,hashlib.sha256(n.encode()).hexdigest()) for k,(n,u,_) in m.SCRIPTS.items()}
    for n,_,_ in scripts.values(): (copies/n).write_bytes(n.encode())
    monkeypatch.setattr(m, 'SCRIPTS', scripts)
    return site,copies

def test_scripts_are_swapped_for_copies(local_scripts, tmp_path, monkeypatch):
    site,copies = small_site(local_scripts, tmp_path, monkeypatch)
    local_scripts.main([str(site), '--copies', str(copies)])
    html = (site/'deep/er/page.html').read_text()
    assert local_scripts.outside(html) == [] and 'integrity' not in html and 'crossorigin' not in html
    for name in ('require.js','jquery.min.js','embed-amd.js'):
        assert f'src="../../site_libs/local/{name}"' in html and (site/'site_libs/local'/name).read_text() == name
    assert 'src="site_libs/local/require.js"' in (site/'index.html').read_text()
    assert 'data-relocate-top="true"' in html and 'https://example.org' in html
    again = html
    local_scripts.main([str(site), '--copies', str(copies)])
    assert (site/'deep/er/page.html').read_text() == again

def test_a_site_without_tables_gets_no_scripts(local_scripts, tmp_path):
    (tmp_path/'index.html').write_text('<html><script src="site_libs/quarto.js"></script></html>')
    local_scripts.main([str(tmp_path)])
    assert not (tmp_path/'site_libs').exists()

@pytest.mark.parametrize('page,load', [('index.html','<script src="https://x.org/plot.js"></script>'),
    ('index.html','<link rel="stylesheet" href="//fonts.org/f.css">'), ('index.html','<img alt="" src="https://x.org/badge.svg">'),
    ('site_libs/b.css','@import url("https://fonts.org/css");'), ('site_libs/b.css','a { src: url(https://fonts.org/f.woff2) }')])
def test_anything_else_from_another_host_is_reported(local_scripts, tmp_path, monkeypatch, page, load):
    site,copies = small_site(local_scripts, tmp_path, monkeypatch)
    (site/page).write_text(load)
    with pytest.raises(SystemExit, match=page.split('/')[-1]): local_scripts.main([str(site), '--copies', str(copies)])

def test_a_changed_copy_is_refused(local_scripts, tmp_path, monkeypatch):
    site,copies = small_site(local_scripts, tmp_path, monkeypatch)
    (copies/'require.js').write_text('something else')
    with pytest.raises(SystemExit, match='not the script that was pinned'): local_scripts.main([str(site), '--copies', str(copies)])


# ---- skill pages

SECTIONS = ['When to use', 'How', 'What was measured here', 'Failure modes']
SKILLS = sorted(p for p in (NBS/'skills').glob('*.md'))

def skill_faults(path):
    "What a skill page lacks of its form"
    meta,body = front_matter(path)
    bad = [f'{k} is missing' for k in ('name','description') if not str(meta.get(k) or '').strip()]
    if meta.get('name')!=path.stem: bad.append('name is not the name of the file')
    more = meta.get('metadata') or {}
    if not str(more.get('short-description') or '').strip(): bad.append('metadata.short-description is missing')
    if not more.get('tags') or not all(isinstance(o, str) for o in more['tags']): bad.append('metadata.tags is missing')
    if len(re.findall(r'^# .+', FENCE.sub('', body), re.M))!=1: bad.append('one title')
    if [h for h in re.findall(r'^## (.+?)\s*$', FENCE.sub('', body), re.M)]!=SECTIONS: bad.append('the four sections, in order')
    for h,text in zip(SECTIONS, re.split(r'^## .+$', body, flags=re.M)[1:]):
        if len(text.split())<20: bad.append(f'{h} says nothing')
    return bad

@pytest.mark.parametrize('path', SKILLS, ids=lambda p: p.stem)
def test_skill_pages_have_their_form(path): assert skill_faults(path) == []

def test_the_skills_are_there():
    assert {p.stem for p in SKILLS} >= {'task-vector-base-model', 'adamerging-cross-lingual', 'source-compatibility',
        'source-selection-cross-lingual', 'merging-when-constructive'}

def test_a_faulty_skill_page_is_reported(tmp_path):
    (tmp_path/'a.md').write_text('---\nname: b\nmetadata:\n  tags: [x, 1]\n---\n\n# A\n\n## How\n\nfew words\n')
    assert len(skill_faults(tmp_path/'a.md')) == 6


# ---- what skill pages tell a reader to type

def blocks(path, *languages):
    text = path.read_text(encoding='utf-8')
    found = re.findall(r'^( *)```\{?\.?(\w+)[^\n]*\n(.*?)^\1```\s*$', text, re.M|re.S)
    return [textwrap.dedent(b) for _,lang,b in found if lang in languages]

def commands(path):
    "Lines of shell blocks, without prompts and comments, split at &&, as lists of words"
    lines = [l for b in blocks(path, 'bash','sh','shell','console') for l in b.replace('\\\n', ' ').splitlines()]
    lines = [c.strip() for l in lines for c in re.split(r'&&|;|\|', l.removeprefix('$ '))]
    return [shlex.split(c, comments=True) for c in lines if re.match(r'(merginguriel|papermill|python -m merginguriel)\b', c)]

def run_cli(*args):
    code = 'import sys; from merginguriel.cli import main; sys.argv[0]="merginguriel"; sys.exit(main())'
    r = subprocess.run([sys.executable, '-c', code, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return r.returncode, r.stdout+r.stderr

def template_faults(path, flags):
    "Parameters in `flags` that the notebook at `path` does not have"
    if not path.is_file(): return [f'no template {path.name}']
    return [f'{path.name} has no parameter {f}' for f in flags if f not in inspect_notebook(str(path))]

def command_faults(words):
    "What in the command `words` does not exist in this package"
    if words[0]=='papermill':
        flags = [words[i+1] for i,w in enumerate(words) if w in ('-r','-p','-y')]
        return template_faults(ROOT/words[1], flags)
    if words[0]=='python':
        return [] if importlib.util.find_spec(words[2]) else [f'no module {words[2]}']
    sub,rest = words[1],words[2:]
    flags = [w.split('=')[0] for w in rest if w.startswith('--')]
    code,text = run_cli(sub, '--help')
    if code: return [f'no command merginguriel {sub}: {text[-300:]}']
    known = text.replace('_', '-')
    if sub=='run':
        template = NBS/f'experiments/{rest[0]}.ipynb'
        if faults:=template_faults(template, []): return faults
        known += ' '.join('--'+o.replace('_', '-') for o in inspect_notebook(str(template)))
    return [f'merginguriel {sub} has no {f}' for f in flags if not re.search(re.escape(f.replace('_', '-'))+r'(?![\w-])', known)]

@pytest.mark.parametrize('path', SKILLS, ids=lambda p: p.stem)
def test_commands_of_skill_pages_exist(path):
    assert [f for c in commands(path) for f in command_faults(c)] == []

def test_every_skill_page_says_what_to_type():
    assert [p.stem for p in SKILLS if not commands(p) and not blocks(p, 'python')] == []

def test_a_command_that_does_not_exist_is_reported(tmp_path):
    (tmp_path/'a.md').write_text('```bash\n$ merginguriel frobnicate --x 1\npapermill nbs/experiments/none.ipynb \\\n  out.ipynb -r a b\n'
        'python -m merginguriel.nothing && merginguriel run exctar --no-such-flag 1\nls\n```\n')
    found = commands(tmp_path/'a.md')
    assert [c[0] for c in found] == ['merginguriel','papermill','python','merginguriel']
    assert [bool(command_faults(c)) for c in found] == [True]*4

@pytest.mark.parametrize('path', SKILLS, ids=lambda p: p.stem)
def test_python_of_skill_pages_runs(path, tmp_path):
    "The snippets of a page, one after another, in an empty folder"
    code = '\n'.join(blocks(path, 'python'))
    if not code: pytest.skip('no Python on this page')
    env = dict(os.environ, **warm.VARIABLES)
    r = subprocess.run([*warm.python(), '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
