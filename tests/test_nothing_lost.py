"""A property: whatever stands where a command is told to write, and whatever it is told to write, nothing that was there is gone or
changed but what the command is for, nothing appears elsewhere, and a failure is one line that says what to do.

The suite draws a few hundred commands. By hand: `python tests/test_nothing_lost.py 10000`."""
import contextlib, io, json, os, re, shutil, sys, tempfile
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from merginguriel.cli import main
from merginguriel.core import file_digest
from merginguriel.merge import merge
from merginguriel.outputs import foreign, record_name
from merginguriel.toy import toy_base, toy_sources

NAMES = ['out', 'runs', 'm.csv', 'link', 'x/out', './out', 'a b', 'ü', '-o', '.hidden', '.', '..', '../up', 'in/en-US', 'in', 'base',
    'x/../out', 'out/deep', '', 'n'*300]
KINDS = ['nothing', 'empty folder', 'earlier merge', 'earlier merge', 'merge with note', 'merge edited', 'notes', 'store', 'file', 'table',
    'link to folder', 'link to merge', 'link to file', 'link to nothing', 'torn', 'read-only']
WEIGHTS = [None, '.5,.5', '1,0', 'en-US=.7,de-DE=.3', '1e308,1e308', 'nan,1', '-1,2', 'x', '1', 'en-US=1', '', '0,0', 'fr-FR=1,de-DE=0']
METHODS = ['linear', 'ties', 'task_arithmetic', 'dare', 'breadcrumbs', 'slerp', 'tis', '', '../x']
HP = ['', 'density=.3', 'density=20', 'scale=nan', 'nosuch=1', 'density', 'scale=.5,density=.2']


def world(root):
    "Base, two models and an earlier merge, made once"
    base, models = toy_base(root/'base'), toy_sources(root/'models', ['de-DE', 'en-US'])
    merge(base, models, root/'merge')
    return root


def place(w, name, kind, work):
    "Put something of `kind` at `name` of the sandbox"
    p = work/name if name else None
    if p is None or os.path.lexists(p) or not (p.parent.is_dir() or kind != 'nothing'): return
    if kind == 'nothing' or len(p.name) > 200: return
    p.parent.mkdir(parents=True, exist_ok=True)
    def put(q, what='months of work'): q.parent.mkdir(parents=True, exist_ok=True); q.write_text(what)
    if kind == 'empty folder': p.mkdir()
    elif 'merge' in kind and not kind.startswith('link'):
        shutil.copytree(w/'merge', p)
        if kind == 'merge with note': put(p/'notes.md')
        if kind == 'merge edited': put(p/'README.md', 'mine')
    elif kind == 'notes': put(p/'thesis.tex')
    elif kind == 'store': put(p/'store.sqlite')
    elif kind == 'file': put(p)
    elif kind == 'table': put(p, 'source,de-DE\nde-DE,.5\n')
    elif kind == 'torn':
        put(p.parent/f'.{p.name[:100]}.abcd1234.tmp'/'model.safetensors', 'half')
    elif kind == 'read-only': put(p/'thesis.tex')
    else:
        if kind == 'link to folder': put(work/'target/thesis.tex')
        if kind == 'link to merge' and not (work/'target').exists(): shutil.copytree(w/'merge', work/'target')
        if kind == 'link to file': put(work/'target.txt')
        p.symlink_to('target.txt' if kind == 'link to file' else 'target')


def tree(root):
    return {str(p.relative_to(root)): ('link', os.readlink(p)) if p.is_symlink() else
        ('file', p.stat().st_size, file_digest(p)) if p.is_file() else ('folder',) for p in sorted(root.rglob('*'))}


@st.composite
def commands(draw):
    out = draw(st.sampled_from(NAMES) | st.text(min_size=1, max_size=8).filter(lambda o: '\x00' not in o and not o.startswith('~')
        and not o.startswith('/') and not any(0xD800 <= ord(c) < 0xE000 for c in o)))
    name = draw(st.sampled_from(['merge']*5+['nxn', 'audit', 'bases fit', 'match-base', 'compat', 'report', 'bases expand', 'run']))
    argv = name.split()
    src = draw(st.sampled_from(['in', 'en-US=in/en-US,de-DE=in/de-DE', 'nowhere', 'en-US=nowhere', 'en-US=in/en-US', '']))
    base = draw(st.sampled_from(['base']*4+['nowhere', '']))
    if name == 'merge':
        argv += [out, f'--base={base}', f'--sources={src}', f'--method={draw(st.sampled_from(METHODS))}', f'--hp={draw(st.sampled_from(HP))}']
        if w := draw(st.sampled_from(WEIGHTS)): argv += [f'--weights={w}']
        if draw(st.booleans()): argv += ['--replace']
    elif name == 'nxn': argv += [src, '--dataset=toy', '--locales=sq-AL', f'--out={out}', '--split=dev']
    elif name == 'audit': argv += ['in/en-US', f'--base={base}', f'--sources={src}', f'--json={out}']
    elif name == 'bases fit':
        argv += [out, f'--base={base}', f'--sources={src}', '--n-bases=1', f"--kind={draw(st.sampled_from(['pca', 'svd', 'subset', 'x']))}"]
        if draw(st.booleans()): argv += ['--replace']
    elif name == 'bases expand': argv += [out, '--task=en-US', f'--out={draw(st.sampled_from(NAMES))}']
    elif name == 'match-base': argv += [base, 'in/en-US', f'--out={out}']
    elif name == 'compat': argv += ['--models-dir=in', f'--pretrained={base}', f'--output-dir={out}', '--metric=task_vector_cosine']
    elif name == 'report': argv += [f'--out={out}', '--store=in/s.sqlite']
    elif name == 'run': argv += ['report', f'--world={out}', f'--target={out}', '--out=runs', '--nosuch=1']
    return out, argv, draw(st.sampled_from(KINDS))


def ours(where):
    "What a replacement may take: folders that hold an earlier result alone"
    return {p for p in where.rglob('*') if p.is_dir() and not p.is_symlink() and (p/record_name).is_file() and foreign(p) is None}


def check(w, out, argv, kind):
    top = Path(tempfile.mkdtemp(prefix='lost-'))
    work, here = top/'work', os.getcwd()
    try:
        shutil.copytree(w/'models', work/'in')
        shutil.copytree(w/'base', work/'base')
        (top/'up').write_text('a neighbour')
        os.chdir(work)
        with contextlib.suppress(OSError, ValueError): place(w, out, kind, work)
        before, may = tree(top), ours(top)
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()): code = main(argv)
        assert Path.cwd() == work
        after, said = tree(top), err.getvalue().strip().splitlines()
        named = {o.partition('=')[2] if o.startswith('--') else o for o in argv[1:]}
        places = [Path(os.path.normpath(work/o)) for o in named if o and '\x00' not in o]
        if argv[0] in ('compat', 'report'): places += [p.resolve() for p in places] # A folder of files may be given by a link
        within = lambda k: any(top/k == p or p in (top/k).parents for p in places)
        torn = lambda k: re.search(r'(^|/)\.[^/]+\.[a-z0-9_]{8}\.tmp(/|$)', k)
        replaced = lambda k: any(p == top/k or p in (top/k).parents for p in may)
        for k, v in before.items():
            if after.get(k) == v or torn(k): continue
            assert '--replace' in argv and code == 0 and replaced(k) and within(k), f'{k}: {v} became {after.get(k)}'
        new = [k for k in after if k not in before]
        if code == 2: assert new == [] or argv[0] in ('compat',), f'failed, and left {new[:3]}'
        for k in new:
            assert within(k) or any(p.is_relative_to(top/k) for p in places), f'{k} appeared'
            assert not torn(k)
        if code == 2:
            lines = [o for o in said if not o.startswith('removed ')]
            assert len(lines) == 1 and lines[0].startswith(f'merginguriel {argv[0]}: ') and len(lines[0]) > 30, said
        assert code in (0, 1, 2)
        return code, said
    finally:
        os.chdir(here)
        shutil.rmtree(top)


@pytest.fixture(scope='module')
def made(tmp_path_factory): return world(tmp_path_factory.mktemp('lost'))


@settings(max_examples=int(os.environ.get('NOTHING_LOST_DRAWS', 250)), deadline=None, derandomize='NOTHING_LOST_DRAWS' not in os.environ,
    suppress_health_check=list(HealthCheck), database=None)
@given(commands())
def test_nothing_is_lost(made, drawn):
    out, argv, kind = drawn
    check(made, out, argv, kind)


def test_a_planted_fault_is_found(made, monkeypatch):
    "With the check of what is replaced switched off, a few draws are enough"
    import merginguriel.outputs as o
    monkeypatch.setattr(o, '_taken', lambda p, replace: None)
    with pytest.raises(AssertionError, match='became'):
        check(made, 'runs', ['merge', 'runs', '--base=base', '--sources=in', '--replace'], 'store')


if __name__ == '__main__':
    os.environ['NOTHING_LOST_DRAWS'] = sys.argv[1]
    raise SystemExit(pytest.main([__file__, '-q', '-k', 'test_nothing_is_lost', '-p', 'no:cacheprovider']))
