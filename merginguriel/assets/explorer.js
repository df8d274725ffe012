// The coefficient explorer of a page without a kernel: what `static_explorer` computed, drawn and moved through.
// Weights are lists in the order of the sources and sum to 1. Nothing is loaded from anywhere.
const explorer = (() => {
  const sum = a => a.reduce((s, x) => s + x, 0)

  // ---- arithmetic, tested without a browser

  // One weight set to `v`, the others scaled so that all sum to 1; others that are all 0 share what is left
  const move = (w, i, v) => {
    const rest = 1 - w[i]
    return w.map((x, j) => j === i ? v : rest > 1e-9 ? x * (1 - v) / rest : (1 - v) / (w.length - 1))
  }
  // Index of the point nearest to `w` among those that `allowed` accepts
  const nearest = (points, w, allowed = () => true) => {
    let best = -1, least = Infinity
    points.forEach((p, i) => {
      const d = sum(p.map((x, j) => (x - w[j]) ** 2))
      if (allowed(p, i) && d < least - 1e-12) { best = i; least = d }
    })
    return best
  }
  // Wilson's 95 % interval of `k` right in `n`
  const wilson = (k, n) => {
    const z = 1.959963984540054, p = k / n, m = 1 + z * z / n
    const half = z * Math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / m, mid = (p + z * z / (2 * n)) / m
    return [Math.max(0, mid - half), Math.min(1, mid + half)]
  }
  // Numbers of right answers in each class at point `i`
  const counts = (s, i) => s.right[i].map((d, c) => s.references.uniform[c] + d)
  // The classes that gained and lost most answers, at most `k` of each; accuracies are shares of their texts
  const changes = (now, before, sizes, k = 3) => {
    const all = now.map((x, c) => ({ c, before: before[c] / sizes[c], now: x / sizes[c], change: (x - before[c]) / sizes[c] }))
      .filter(o => o.change).sort((a, b) => b.change * sizes[b.c] - a.change * sizes[a.c])
    return all.filter(o => o.change > 0).slice(0, k).concat(all.filter(o => o.change < 0).slice(-k))
  }
  // Where `w` lies in the triangle of the sources `shown`, as [x, y] in the unit triangle
  const place = (w, shown) => {
    const t = sum(shown.map(i => w[i])), [, b, c] = shown.map(i => t > 1e-9 ? w[i] / t : 1 / 3)
    return [b + c / 2, c * Math.sqrt(3) / 2]
  }
  // Grid points whose sources outside `shown` weigh as they do at the grid point nearest to `w`
  const slice = (grid, w, shown) => {
    const here = grid[nearest(grid, w)]
    return grid.map((p, i) => i).filter(i => here.every((x, j) => shown.includes(j) || Math.abs(grid[i][j] - x) < 1e-9))
  }
  const triples = n => {
    const out = []
    for (let a = 0; a < n; a++) for (let b = a + 1; b < n; b++) for (let c = b + 1; c < n; c++) out.push([a, b, c])
    return out
  }
  const ramp = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]
  const colour = t => {
    const x = Math.min(Math.max(t, 0), 1) * 4, i = Math.min(Math.floor(x), 3)
    return `rgb(${ramp[i].map((a, k) => Math.round(a + (ramp[i + 1][k] - a) * (x - i)))})`
  }

  // ---- the page

  const make = (ns, tag, attributes, ...children) => {
    const e = ns ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
    for (const [k, v] of Object.entries(attributes)) k.startsWith('on') ? e[k] = v : e.setAttribute(k, v)
    e.append(...children)
    return e
  }
  const html = (...o) => make(false, ...o), svg = (...o) => make(true, ...o)
  const shapes = '◆■▲▼●★' // Of the marks, as in `plot_surface`
  const points = x => `${x >= 0 ? '+' : '−'}${Math.abs(100 * x).toFixed(1)}`, percent = x => (100 * x).toFixed(1)

  function mount(root, data) {
    const K = data.sources.length, all = data.points.map(p => p.map(x => x / data.steps)), grid = all.slice(0, data.grid)
    const state = { at: data.marks.uniform, method: Object.keys(data.surfaces)[0], score: 'accuracy', against: 'uniform', shown: [0, 1, 2] }
    const surface = () => data.surfaces[state.method]
    const value = i => state.score === 'entropy' ? surface().entropy[i] : sum(counts(surface(), i)) / data.n
    const choose = (name, options, act) => html('label', { style: 'margin-right:1em' }, `${name} `, html('select', { onchange: e => { act(e.target.value); draw() } },
      ...Object.entries(options).map(([v, text]) => html('option', { value: v }, text))))
    const same = list => Object.fromEntries(list.map(o => [o, o]))
    const go = i => { state.at = i; draw() }

    const controls = html('div', {}, choose('method', same(Object.keys(data.surfaces)), v => state.method = v),
      choose('colour', { accuracy: 'accuracy (looks at labels)', entropy: 'entropy (looks at none)' }, v => state.score = v),
      choose('compared with', same(Object.keys(surface().references)), v => state.against = v))
    const planes = triples(K)
    if (K > 3) controls.append(choose('triangle of', planes.map(t => t.map(i => data.sources[i]).join(', ')), v => state.shown = planes[v]))
    const sliders = data.sources.map((name, i) => {
      const input = html('input', { type: 'range', min: 0, max: 1, step: 1 / data.steps, style: 'width:100%', oninput: () => {
        const v = Math.round(input.value * data.steps) / data.steps
        go(nearest(grid, move(all[state.at], i, v), p => Math.abs(p[i] - v) < 1e-9))
      } })
      const shown = html('span', { style: 'font-variant-numeric:tabular-nums' })
      return { input, shown, row: html('label', { style: 'display:grid;grid-template-columns:4.5em 1fr 3em;gap:.5em' }, name, input, shown) }
    })
    const buttons = html('div', { style: 'margin:.4em 0' }, 'go to ', ...Object.entries(data.marks).map(([name, i], k) =>
      html('button', { type: 'button', style: 'margin-right:.4em', onclick: () => go(i) }, `${shapes[k % 6]} ${name}`)))
    const picture = html('div', { style: 'flex:0 1 24em' }), words = html('div', { 'aria-live': 'polite' })
    root.replaceChildren(controls, html('div', { style: 'display:flex;flex-wrap:wrap;gap:1em 2em' }, picture,
      html('div', { style: 'flex:1 1 18em' }, ...sliders.map(s => s.row), buttons, words)), html('p', { style: 'font-size:.85em' }, data.note))

    function draw() {
      sliders.forEach((s, i) => {
        s.input.value = all[state.at][i]
        s.shown.textContent = all[state.at][i].toFixed(3)
        s.input.setAttribute('aria-valuetext', s.shown.textContent)
      })
      picture.replaceChildren(K === 2 ? line() : triangle())
      words.replaceChildren(...report())
    }

    function report() {
      const s = surface(), now = counts(s, state.at), k = sum(now), [low, high] = wilson(k, data.n)
      const [d, l, h] = s.versus[state.against][state.at].map(x => x / 1e4)
      const mark = Object.entries(data.marks).find(([, i]) => i === state.at)
      const rows = changes(now, s.references[state.against], data.sizes).map(o => html('tr', {}, ...[data.classes[o.c], data.sizes[o.c],
        percent(o.before), percent(o.now), points(o.change)].map((t, i) => html('td', { style: i ? 'text-align:right;padding-left:1em' : '' }, `${t}`))))
      const head = html('tr', {}, ...['class', 'texts', 'before', 'now', 'change'].map((t, i) => html('th', { style: i ? 'text-align:right;padding-left:1em' : 'text-align:left' }, t)))
      return [html('p', {}, mark ? `${mark[0]}: ` : '', html('b', {}, `accuracy ${percent(k / data.n)} %`), ` [${percent(low)}, ${percent(high)}], entropy ${s.entropy[state.at].toFixed(3)}`,
        html('br', {}), `${points(d)} points [${points(l)}, ${points(h)}] over ${state.against}`),
      rows.length ? html('table', { style: 'font-size:.9em' }, head, ...rows) : html('p', {}, `No class changes against ${state.against}.`)]
    }

    const range = use => { const v = use.map(value); return [Math.min(...v), Math.max(...v)] }
    const text = (x, y, t, anchor = 'middle') => svg('text', { x, y, 'text-anchor': anchor, 'font-size': 12, fill: 'currentColor' }, t)
    const label = i => state.score === 'entropy' ? value(i).toFixed(3) : `${percent(value(i))} %`
    const frame = (...o) => svg('svg', { viewBox: '0 0 360 360', width: '100%', role: 'img', 'aria-label': `${state.score} of merges of ${data.sources.join(', ')}` }, ...o)
    const cell = (shape, attributes, i, ...inside) => {
      const e = svg(shape, { ...attributes, style: 'cursor:pointer', onclick: () => go(i) }, ...inside)
      e.append(svg('title', {}, `${all[i].map((x, j) => `${data.sources[j]} ${x.toFixed(2)}`).join(', ')}: ${label(i)}`))
      return e
    }
    const ends = (e, show, at) => [Math.min(...e), Math.max(...e)].map((v, k) => text(at[k][0], at[k][1], show(v), at[k][2]))

    function triangle() {
      const use = slice(grid, all[state.at], state.shown), [lo, hi] = range(use)
      const left = Math.max(Math.round(data.steps * sum(state.shown.map(i => grid[use[0]][i]))), 1)
      const side = Math.min(330 / (1 + 1 / left), 275 / (Math.sqrt(.75) + 2 / left / Math.sqrt(3))), r = side / left / Math.sqrt(3) // All hexagons fit
      const xy = w => { const [x, y] = place(w, state.shown); return [180 + side * (x - .5), 300 - r - side * y] }
      const hexagon = ([x, y]) => [30, 90, 150, 210, 270, 330].map(a => `${x + r * Math.cos(a * Math.PI / 180)},${y + r * Math.sin(a * Math.PI / 180)}`).join(' ')
      const cells = use.map(i => cell('polygon', { points: hexagon(xy(grid[i])), fill: colour(hi > lo ? (value(i) - lo) / (hi - lo) : .5) }, i))
      const names = [[180 - side / 2, 316], [180 + side / 2, 316], [180, 294 - 2 * r - side * Math.sqrt(.75)]].map(([x, y], k) => text(x, y, data.sources[state.shown[k]]))
      const route = (stroke, width) => svg('polyline', { points: data.path.map(w => xy(w).join(',')).join(' '), fill: 'none', stroke, 'stroke-width': width, 'pointer-events': 'none', ...K > 3 && { 'stroke-dasharray': '5 3' } })
      const path = data.path.length ? [route('#000', 4), route('#fff', 2)] : []
      const marks = Object.values(data.marks).map((i, k) => [i, k]).filter(([i]) => K === 3 || slice(grid, all[i], state.shown).includes(use[0])).map(([i, k]) => {
        const [x, y] = xy(all[i])
        return cell('text', { x, y, 'text-anchor': 'middle', 'dominant-baseline': 'central', 'font-size': 15, fill: '#fff', stroke: '#000' }, i, shapes[k % 6])
      })
      const [x, y] = xy(all[state.at]), bar = Array.from({ length: 40 }, (_, i) => svg('rect', { x: 120 + 3 * i, y: 340, width: 3.2, height: 10, fill: colour(i / 39) }))
      const show = v => state.score === 'entropy' ? v.toFixed(3) : `${percent(v)} %`
      return frame(...cells, ...path, ...marks, svg('circle', { cx: x, cy: y, r: 8, fill: 'none', stroke: '#d55e00', 'stroke-width': 3, 'pointer-events': 'none' }),
        ...names, ...bar, ...ends([lo, hi], show, [[114, 350, 'end'], [246, 350, 'start']]))
    }

    function line() {
      const use = grid.map((p, i) => i), band = i => state.score === 'entropy' ? [value(i), value(i)] : wilson(sum(counts(surface(), i)), data.n)
      const e = use.flatMap(band), lo = Math.min(...e), hi = Math.max(...e), x = w => 60 + 280 * w[1], y = v => 280 - 250 * (hi > lo ? (v - lo) / (hi - lo) : .5)
      const at = (k, list) => list.map(i => `${x(grid[i])},${y(band(i)[k])}`), order = use.slice().sort((a, b) => grid[a][1] - grid[b][1])
      const dots = use.map(i => cell('circle', { cx: x(grid[i]), cy: y(value(i)), r: 5, fill: '#0072b2' }, i))
      const path = data.path.map(w => svg('circle', { cx: x(w), cy: 292, r: 3, fill: '#cc79a7' }))
      const show = v => state.score === 'entropy' ? v.toFixed(3) : `${percent(v)} %`
      return frame(svg('polygon', { points: [...at(0, order), ...at(1, order.slice().reverse())].join(' '), fill: '#0072b2', opacity: .2 }), ...dots, ...path,
        svg('circle', { cx: x(all[state.at]), cy: y(value(state.at)), r: 8, fill: 'none', stroke: '#d55e00', 'stroke-width': 3, 'pointer-events': 'none' }),
        text(60, 320, data.sources[0]), text(340, 320, data.sources[1]), ...ends(e, show, [[52, 284, 'end'], [52, 34, 'end']]))
    }
    draw()
  }
  return { move, nearest, wilson, counts, changes, place, slice, triples, colour, mount }
})()
if (typeof module === 'object' && module.exports) module.exports = explorer
