"""How the house is kept: the sizes, the packed lines, the private seams and the long signatures of one tree of this repository or
of several, side by side. Nothing of a tree is imported or run. What counts as a fault is what `tests/test_style.py` counts.

    python benchmarks/house.py before=PATH/OF/A/WORKTREE after=. --seconds 690 360
"""
import argparse, ast, json, re, statistics, sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tests'))
import test_style as style # noqa: E402: found by the line above


def numbered(tree):
    "Notebook -> floor, of the notebooks that export a module: by folder, or by the first digit as it was once"
    nbs = tree/'nbs'
    folders = {p: p.parent.name for p in sorted(nbs.glob('[0-9]_*/*.ipynb'))}
    return folders or {p: p.name[0] for p in sorted(nbs.glob('[0-9][0-9]_*.ipynb'))}


def notebooks(tree): return sorted(p for p in (tree/'nbs').rglob('*.ipynb') if not any(o.startswith('.') for o in p.parts))


def exported_code(path): return [style.code(c) for c in style.codes(path) if style.exported(c)]


def parsed(path): return [ast.parse(o) for o in exported_code(path)]


def module_lines(tree):
    "Lines of all modules; `_modidx` is an index that nbdev writes"
    modules = [p for p in (tree/'merginguriel').glob('*.py') if p.stem != '_modidx']
    return [o for p in modules for o in p.read_text(encoding='utf-8').splitlines()]


# ---- exports without a user

def top_names(tree):
    """Public names that a cell defines: functions, classes and values. A function with a decorator belongs to its class, or to the
    registry that uses it"""
    for o in tree.body:
        if isinstance(o, ast.ClassDef) or isinstance(o, ast.FunctionDef) and not o.decorator_list: yield o.name
        if isinstance(o, ast.Assign): yield from (t.id for t in o.targets if isinstance(t, ast.Name))


def words(text): return set(re.findall(r'\w+', text))


def texts(tree):
    "Path -> words of everything that may use an export: notebooks, tests, benchmarks, pages, the command line's settings"
    out = {p: words('\n'.join(style.text(c) for c in style.load(p))) for p in notebooks(tree)}
    others = [*(tree/'benchmarks').glob('*.py'), *tree.glob('*.md'), *(tree/'nbs').rglob('*.md'), *(tree/'nbs').rglob('*.qmd')]
    others += [tree/'pyproject.toml', tree/'merginguriel/__init__.py', *(tree/'tests').glob('*.py')]
    return out | {p: words(p.read_text(encoding='utf-8')) for p in others}


def unused(tree):
    "(exports that their own page and tests alone use, exports that serve inside their module alone)"
    said = texts(tree)
    pages, inside = [], []
    for path in numbered(tree):
        trees = parsed(path)
        users = [w for p, w in said.items() if p != path and p.parent.name != 'tests']
        uses = Counter(o.id for t in trees for o in ast.walk(t) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Load))
        for name in (o for t in trees for o in top_names(t) if not o.startswith('_')):
            if any(name in w for w in users): continue
            (inside if uses[name] else pages).append(f'{path.stem}.{name}')
    return pages, inside


# ---- the table

def counts(tree, *checks):
    "How many faults the checkers find in all notebooks"
    return sum(len(check(p)) for p in notebooks(tree) for check in checks)


def functions(tree):
    "Numbers of parameters of all functions that are exported, private ones and methods among them"
    found = [o for p in numbered(tree) for t in parsed(p) for o in ast.walk(t) if isinstance(o, ast.FunctionDef)]
    return [style.n_parameters(o) for o in found]


def rows(tree, seconds):
    "What is counted -> its value in `tree`"
    pages = numbered(tree)
    cells = [len(style.lines(c)) for p in pages for c in style.codes(p) if style.exported(c)]
    code_lines = [o for p in notebooks(tree) for c in style.codes(p) for o in style.text(c).splitlines()]
    modules = module_lines(tree)
    packs = sum(style.is_packed(o) for p in pages for t in parsed(p) for o in ast.walk(t))
    parameters = functions(tree)
    dead, inside = unused(tree)
    floors = Counter(pages.values())
    return {
        'pages that export a module': len(pages),
        'pages of each floor': ' '.join(f'{k[0]}:{n}' for k, n in sorted(floors.items())),
        'exported lines': sum(cells),
        'exported cell, median lines': statistics.median(cells),
        'exported cells over 12 lines': f'{sum(o > 12 for o in cells)} of {len(cells)}',
        'lines over 110 characters in code cells': sum(len(o) > 110 for o in code_lines),
        'lines over 120 characters in modules': sum(len(o) > 120 for o in modules),
        'packed assignments in exported code': packs,
        'packed assignments per 1,000 exported lines': f'{1000*packs/sum(cells):.1f}',
        'private names of another module': counts(tree, style.seams),
        'uses of locals()': counts(tree, style.tricks),
        'calls with more than six positional arguments': counts(tree, style.calls),
        'functions with more than eight parameters': sum(o > 8 for o in parameters),
        'public ones of them without options': counts(tree, style.functions),
        'most parameters of a function': max(parameters),
        'exports that their own page and tests alone use': len(dead),
        'exports that serve inside their module alone': len(inside),
        'seconds of the test suite': '' if seconds is None else f'{seconds:g}'}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('trees', nargs='*', default=['now=.'], help='name=folder of a checkout, or a folder')
    p.add_argument('--seconds', nargs='*', type=float, default=[], help='what the tests took in each tree')
    p.add_argument('--names', action='store_true', help='also name the exports without a user, in the last tree')
    a = p.parse_args()
    named = [o.partition('=')[::2] if '=' in o else (Path(o).name or 'now', o) for o in a.trees]
    seconds = [*a.seconds, *[None]*len(named)]
    tables = [rows(Path(folder).resolve(), s) for (_, folder), s in zip(named, seconds)]
    print('| | '+' | '.join(name for name, _ in named)+' |\n|---|'+'---|'*len(named))
    for k in tables[0]: print(f'| {k} | '+' | '.join(str(t[k]) for t in tables)+' |')
    if a.names:
        dead, inside = unused(Path(named[-1][1]).resolve())
        print('\nTheir own page and tests alone:', *dead, '\nInside their module alone:', *inside)


if __name__ == '__main__': main()
