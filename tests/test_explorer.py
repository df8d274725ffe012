"""The script of the static explorer, run by node: its arithmetic is that of the module, and on a made-up document it says of each
point what Python says. Without node these tests are skipped; what the script is given is tested on the module's page."""
import json, re, shutil, subprocess
from pathlib import Path
import numpy as np, pandas as pd, pytest
from merginguriel.data import load_intents
from merginguriel.evaluate import wilson
from merginguriel.explorer import _place, _slice, class_changes, move, on_simplex, static_explorer, surface
from merginguriel.toy import toy_base, toy_locales, toy_sources
from merginguriel.trials import Trials

SCRIPT = Path(__file__).resolve().parent.parent/'merginguriel/assets/explorer.js'
NODE = shutil.which('node')
pytestmark = pytest.mark.skipif(not NODE, reason='node is not installed; the script of the static explorer is not run')

# What of a document the script touches: a tree with attributes, and its text
DOCUMENT = """
class Element {
  constructor(tag) { this.tag = tag; this.attributes = {}; this.children = [] }
  setAttribute(k, v) { this.attributes[k] = `${v}`; if (k === 'value' && this.tag === 'input') this.value = v }
  append(...o) { this.children.push(...o) }
  replaceChildren(...o) { this.children = o }
  get textContent() { return this.children.map(o => o instanceof Element ? o.textContent : o).join('') }
  set textContent(t) { this.children = [t] }
  find(tag) { return this.children.flatMap(o => o instanceof Element ? [...(o.tag === tag ? [o] : []), ...o.find(tag)] : []) }
}
const root = new Element('div')
globalThis.document = { createElement: t => new Element(t), createElementNS: (ns, t) => new Element(t), querySelectorAll: q => [root] }
const live = () => root.find('div').find(o => o.attributes['aria-live']).textContent
const pick = (i, value) => root.find('select')[i].onchange({ target: { value } })
const slide = (i, value) => { const o = root.find('input')[i]; o.value = value; o.oninput() }
const shares = () => root.find('input').map(o => +o.value)
"""


def node(code):
    "What `code` prints, as JSON"
    r = subprocess.run([NODE, '-'], input=code, capture_output=True, text=True, timeout=60)
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads(r.stdout)

def call(name, *cases):
    "Results of one function of the script"
    return node(f'const e = require({json.dumps(str(SCRIPT))}); console.log(JSON.stringify({json.dumps(cases)}.map(a => e.{name}(...a))))')

def page(html, code):
    "What `code` prints after the scripts of `html` have run on an empty document"
    scripts = '\n'.join(re.findall(r'<script>(.*?)</script>', html.data, re.S))
    return node(f'{DOCUMENT}\n{scripts}\nconsole.log(JSON.stringify((() => {{ {code} }})()))')


@pytest.fixture(scope='module')
def surfaces(tmp_path_factory):
    "Number of sources -> surface of the toy world"
    tmp = tmp_path_factory.mktemp('explorer')
    base, data = toy_base(tmp/'base'), load_intents('toy', 'vi-VN', 'dev').select(range(47)) # a prime: no share is a tie when rounded
    models = toy_sources(tmp/'sources', toy_locales, scale=.1)
    return {k: surface(Trials(base, {o: models[o] for o in toy_locales[:k]}, data), steps=4) for k in (2, 3, 4, 5)}


# ---- arithmetic

def test_a_slider_moves_as_in_python():
    cases = [([.5, .3, .2], 0, .75), ([1, 0, 0], 0, .4), ([0, 0, 1], 1, 1), ([.25, .25, .5, 0], 2, 0)]
    for (w, i, v), got in zip(cases, call('move', *cases)):
        names = list('abcd'[:len(w)])
        assert got == pytest.approx(list(move(pd.Series(w, names, dtype=float), names[i], v))) and sum(got) == pytest.approx(1)

def test_intervals_are_those_of_python():
    cases = [(0, 7), (7, 7), (85, 100), (1234, 2033)]
    assert call('wilson', *cases) == [pytest.approx(wilson(*c)) for c in cases]

def test_the_nearest_point():
    assert call('nearest', ([[0, 1], [.5, .5], [1, 0]], [.6, .4]), ([[0, 1], [1, 0]], [.5, .5])) == [1, 0]

def test_classes_that_gained_and_lost_most():
    "+3, +1, 0, −2, −1 of 10 texts each, and +2 of 2, which is more of its texts but fewer answers than 3"
    got, = call('changes', ([8, 6, 5, 3, 4, 2], [5, 5, 5, 5, 5, 0], [10]*5+[2], 2))
    assert [o['c'] for o in got] == [0, 5, 4, 3] and [round(o['change'], 9) for o in got] == [.3, 1, -.1, -.2]

def test_colours_go_from_dark_to_light():
    assert call('colour', [0], [.5], [1], [7]) == ['rgb(68,1,84)', 'rgb(33,145,140)', 'rgb(253,231,37)', 'rgb(253,231,37)']

@pytest.mark.parametrize('k', [3, 4, 5])
def test_triangles_are_those_of_python(surfaces, k):
    s = surfaces[k]
    grid, (shown,) = [list(p.weights) for p in s.points], call('triples', [k])
    rows = np.random.default_rng(0).dirichlet([1]*k, 5)
    for t in shown:
        names = [s.names[i] for i in t]
        got = call('slice', *((grid, list(w), t) for w in rows))
        assert got == [list(_slice(s, on_simplex(s.names, w), names)) for w in rows]
        np.testing.assert_allclose(call('place', *((list(w), t) for w in rows)), _place(pd.DataFrame(rows, columns=s.names), names), atol=1e-9)


# ---- the page

def said(surface, point, against='uniform'):
    "The beginning of what the page says of a point"
    a = point.accuracy
    return f'accuracy {100*a.value:.1f} % [{100*a.low:.1f}, {100*a.high:.1f}], entropy {point.entropy:.3f}'

def test_it_starts_at_equal_weights(surfaces):
    text, w = page(static_explorer(surfaces[3]), 'return [live(), shares()]')
    assert text.startswith('uniform: '+said(surfaces[3], surfaces[3].marks['uniform'])) and w == pytest.approx([1/3]*3)
    assert '+0.0 points [+0.0, +0.0] over uniform' in text and 'No class changes' in text

@pytest.mark.parametrize('k', [2, 3, 4, 5])
def test_a_slider_leads_to_a_point_of_the_grid(surfaces, k):
    s = surfaces[k]
    for i in range(k):
        text, w = page(static_explorer(s), f'slide({i}, .75); return [live(), shares()]')
        assert w[i] == .75 and sum(w) == pytest.approx(1)
        p = next(p for p in s.points if np.allclose(p.weights, w))
        assert text.startswith(said(s, p))

def test_the_other_model_is_what_one_compares_with(surfaces):
    s = surfaces[3]
    text = page(static_explorer(s), "pick(2, 'best source'); slide(0, 1); return live()")
    ref, a = s.references['best source'].accuracy, s.at([1, 0, 0]).accuracy
    assert f'{100*(a.value-ref.value):+.1f}'.replace('-', '−')+' points' in text and 'over best source' in text
    d = class_changes(s.labels, ref.correct, a.correct)
    assert all(f'{n}{r.texts:.0f}{100*r.before:.1f}{100*r.now:.1f}' in text for n, r in d[d.change != 0].iterrows())

def test_a_click_on_a_cell_and_on_a_mark(surfaces):
    s = surfaces[3]
    cell, mark = page(static_explorer(s), """const cells = root.find('polygon'); cells[0].onclick(); const a = shares()
        root.find('button')[0].onclick(); return [a, shares()]""")
    assert cell == list(s.points[0].weights) and mark == pytest.approx([1/3]*3)

def test_the_picture_has_a_cell_for_each_merge_and_the_path(surfaces):
    path = pd.DataFrame([[.2, .4, .4, 1.], [0, .5, .5, 1.2]], columns=[*surfaces[3].names, 'sum'])
    cells, lines, note = page(static_explorer(surfaces[3], path), "return [root.find('polygon').length, root.find('polyline').length, root.textContent]")
    assert cells == 15 and lines == 2 and 'Σλ from 1.00 to 1.20' in note
    assert page(static_explorer(surfaces[5]), "slide(4, 1); return root.find('polygon').length") == 1 # Nothing is left for the triangle
    assert page(static_explorer(surfaces[2]), "return root.find('circle').length") == 5+1 # A line of five merges, and the ring

def test_colours_follow_the_score(surfaces):
    fills = "return root.find('polygon').map(o => o.attributes.fill)"
    a, b = (page(static_explorer(surfaces[3]), f"pick(1, '{o}'); {fills}") for o in ('accuracy', 'entropy'))
    d = surfaces[3].scores()
    for got, score in ((a, d.accuracy), (b, d.entropy)): assert got[score.argmax()] == 'rgb(253,231,37)' and got[score.argmin()] == 'rgb(68,1,84)'

def test_two_explorers_share_a_page(surfaces):
    html = static_explorer(surfaces[3])
    html.data += static_explorer(surfaces[2]).data
    assert len(page(html, 'return shares()')) == 2 # The stub has one root, which the second took over
