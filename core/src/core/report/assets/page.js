"use strict";
// The page of a report. `data` is what core.report.page makes; every text is set as text, never as HTML.
const state = { axis: "step", scale: "linear", smoothing: 0.8, hidden: new Set() };
const TITLES = {
  loss: "loss (nats)", mtp_loss: "loss of further predictions", validation_loss: "validation loss (nats)",
  validation_bits_per_byte: "validation, bits per byte", grad_norm: "gradient norm", lr: "learning rate",
  tokens_per_second: "tokens per second", mfu: "model FLOPs utilisation", memory_gib: "memory (GiB)",
  step_time_s: "time of a step (s)", data_wait_s: "of that, waiting for data (s)",
};
const AXES = { step: "step", tokens: "tokens", time: "training time" };
const PLAIN = new Set(["lr", "memory_gib", "tokens"]);
const N_COLOURS = 6, DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]], HEIGHT = 230;
let data = JSON.parse(document.getElementById("data").textContent);
const charts = new Map();
const byId = (id) => document.getElementById(id);

function make(tag, text, parent, attributes = {}) {
  const node = document.createElement(tag);
  if (text != null) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (i) => css(`--c${i % N_COLOURS}`);
const dash = (i) => DASHES[Math.floor(i / N_COLOURS) % DASHES.length];

function short(value) {
  if (value == null) return "";
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
  return size && size < 1e-3 ? value.toExponential(2) : `${+value.toPrecision(5)}`;
}
function clock(seconds) {
  if (seconds == null) return "";
  const h = Math.floor(seconds / 3600), m = Math.floor((seconds % 3600) / 60), s = Math.round(seconds % 60);
  return h ? `${h} h ${String(m).padStart(2, "0")}` : m ? `${m} min ${String(s).padStart(2, "0")}` : `${s} s`;
}
const across = (value) => (state.axis === "time" ? clock(value) : short(value));

// A curve of a run over the chosen axis: [xs, ys, smoothed or null].
function points(run, name) {
  const curve = run.curves[name], axis = run.axes[state.axis];
  if (!curve || !axis) return null;
  const xs = curve.rows.map((row) => axis[row]);
  const ys = state.scale === "linear" ? curve.values : curve.values.map((y) => (y > 0 ? y : null));
  const smooths = state.smoothing > 0 && curve.values.length > 20 && !PLAIN.has(name) && !name.startsWith("validation");
  if (!smooths) return { xs, ys, smooth: null };
  const rows = curve.mean_rows ?? curve.rows, means = curve.means ?? curve.values;
  let weight = 0, sum = 0;
  const smooth = means.map((mean) => {
    sum = state.smoothing * sum + (1 - state.smoothing) * mean;
    weight = state.smoothing * weight + (1 - state.smoothing);
    return state.scale === "linear" || sum > 0 ? sum / weight : null;
  });
  return { xs, ys, smooth: [rows.map((row) => axis[row]), smooth] };
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle; else high = middle; }
  return x - xs[low] <= xs[high] - x ? low : high;
}

// Where a step lies on the chosen axis.
function placeOf(run, step) {
  const steps = run.axes.step, axis = run.axes[state.axis];
  return steps && axis && steps.length ? axis[nearest(steps, step)] : null;
}

function drawMarks(u) {
  const marks = data.runs.flatMap((run, i) => state.hidden.has(i) ? [] : run.events
    .filter((each) => each.event === "skipped" || (each.event === "start" && each.step > 0))
    .map((each) => [placeOf(run, each.step), each.event === "skipped" ? css("--alarm") : colour(i)]));
  u.ctx.save();
  u.ctx.setLineDash([3, 4]);
  for (const [x, stroke] of marks) {
    if (x == null || x < u.scales.x.min || x > u.scales.x.max) continue;
    const left = u.valToPos(x, "x", true);
    u.ctx.strokeStyle = stroke;
    u.ctx.beginPath();
    u.ctx.moveTo(left, u.bbox.top);
    u.ctx.lineTo(left, u.bbox.top + u.bbox.height);
    u.ctx.stroke();
  }
  u.ctx.restore();
}

function draw(name) {
  const chart = charts.get(name), panel = chart.panel;
  if (chart.plot) chart.plot.destroy();
  chart.plot = null;
  chart.tip.style.display = "none";
  const shown = data.runs.map((run, i) => [run, i, state.hidden.has(i) ? null : points(run, name)]).filter((each) => each[2]);
  panel.setAttribute("aria-label", `${name} over ${AXES[state.axis]}, ${state.scale}, ${shown.length} runs`);
  chart.drawn = { points: shown.reduce((n, each) => n + each[2].xs.length, 0) };
  if (!shown.length) return;
  const tables = [], series = [{}];
  for (const [, i, { xs, ys, smooth }] of shown) {
    const line = { stroke: colour(i), dash: dash(i), spanGaps: true, points: { show: xs.length < 60, size: 5 } };
    tables.push([xs, ys]);
    series.push(smooth ? { ...line, stroke: colour(i) + "50", width: 1, points: { show: false } } : { ...line, width: 2 });
    if (smooth) { tables.push(smooth); series.push({ ...line, width: 2 }); }
  }
  const look = { stroke: css("--faint"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") } };
  const log = state.scale !== "linear";
  chart.plot = new uPlot({
    width: Math.max(200, panel.clientWidth - 20), height: HEIGHT, series, legend: { show: false },
    scales: { x: { time: false, distr: state.scale === "loglog" ? 3 : 1 }, y: { distr: log ? 3 : 1 } },
    axes: [
      { ...look, values: (u, ticks) => ticks.map(across) },
      { ...look, size: 62, values: (u, ticks) => ticks.map(short) },
    ],
    cursor: { sync: { key: "runs" }, drag: { x: true, y: false } },
    hooks: { draw: [drawMarks], setCursor: [(u) => tell(u, chart, shown)] },
  }, joined(tables), chart.place);
}

// The tables over one axis. uPlot wants each x once, and on a logarithmic axis none that is not positive.
function joined(tables) {
  const positive = state.scale === "loglog";
  return uPlot.join(tables.map(([xs, ys]) => {
    const keep = xs.map((x, i) => i).filter((i) => xs[i] !== xs[i + 1] && (!positive || xs[i] > 0));
    return keep.length === xs.length ? [xs, ys] : [keep.map((i) => xs[i]), keep.map((i) => ys[i])];
  }));
}

function tell(u, chart, shown) {
  const { left, top } = u.cursor;
  if (left == null || left < 0) { chart.tip.style.display = "none"; return; }
  const x = u.posToVal(left, "x");
  chart.tip.replaceChildren();
  for (const [run, i, { xs, ys }] of shown) {
    const k = nearest(xs, x);
    const row = make("div", null, chart.tip);
    make("span", null, row, { class: "swatch" }).style.borderColor = colour(i);
    row.append(`${run.name}: ${short(ys[k])} at ${across(xs[k])}`);
  }
  chart.tip.style.display = u.cursor.event ? "block" : "none";
  const flip = left > u.over.clientWidth / 2;
  chart.tip.style.left = flip ? "" : `${left + 84}px`;
  chart.tip.style.right = flip ? `${u.over.clientWidth - left + 24}px` : "";
  chart.tip.style.top = `${Math.max(4, (top ?? 0))}px`;
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const name = entry.target.dataset.name, chart = charts.get(name);
    chart.near = entry.isIntersecting;
    if (chart.near && chart.stale) { chart.stale = false; draw(name); }
  }
}, { rootMargin: "300px" });

function drawAll() {
  for (const [name, chart] of charts) { chart.stale = !chart.near; if (chart.near) draw(name); }
}

function names() {
  const all = new Set(data.runs.flatMap((run) => Object.keys(run.curves)));
  all.delete("tokens");
  const known = Object.keys(TITLES).filter((name) => all.has(name));
  return [...known, ...[...all].filter((name) => !(name in TITLES)).sort()];
}

function setCharts() {
  for (const name of names()) {
    if (charts.has(name)) continue;
    const panel = make("div", null, byId("charts"), { class: "panel", role: "img", "data-name": name });
    make("h3", TITLES[name] ?? name, panel);
    const place = make("div", null, panel);
    charts.set(name, { panel, place, tip: make("div", null, panel, { class: "tip" }), plot: null, near: false, stale: true });
    watcher.observe(panel);
  }
}

function setRuns() {
  const table = byId("runs"), facts = [...new Set(data.runs.flatMap((run) => Object.keys(run.facts)))];
  table.replaceChildren();
  const head = make("tr", null, table);
  for (const name of ["run", ...facts]) make("th", name, head);
  data.runs.forEach((run, i) => {
    const row = make("tr", null, table), cell = make("td", null, row), label = make("label", null, cell);
    const box = make("input", null, label, { type: "checkbox" });
    box.checked = !state.hidden.has(i);
    box.addEventListener("change", () => { if (box.checked) state.hidden.delete(i); else state.hidden.add(i); drawAll(); });
    const swatch = make("span", null, label, { class: "swatch" });
    swatch.style.borderColor = colour(i);
    swatch.style.borderTopStyle = ["solid", "dashed", "dotted", "double"][Math.floor(i / N_COLOURS) % 4];
    label.append(run.name);
    for (const name of facts) make("td", run.facts[name] ?? "", row);
  });
  const notes = byId("notes");
  notes.replaceChildren();
  for (const run of data.runs) for (const note of run.notes) make("li", `${run.name}: ${note}`, notes);
}

// Small is dark in a dark page and light in a light one; lightness alone tells the order.
function shade(share) {
  const dark = [[28, 34, 46], [38, 84, 124], [60, 150, 160], [240, 228, 120]];
  const light = [[243, 240, 222], [150, 190, 190], [50, 110, 150], [20, 30, 70]];
  const stops = isDark() ? dark : light, at = Math.min(0.9999, Math.max(0, share)) * 3, k = Math.floor(at);
  return `rgb(${stops[k].map((from, c) => Math.round(from + (at - k) * (stops[k + 1][c] - from))).join(",")})`;
}
const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function setMaps() {
  const place = byId("maps");
  place.replaceChildren();
  for (const run of data.runs) for (const [kind, map] of Object.entries(run.maps)) {
    const panel = make("div", null, place, { class: "panel", role: "img" });
    const all = map.values.flat().filter((value) => value != null);
    const low = all.reduce((a, b) => Math.min(a, b), Infinity), high = all.reduce((a, b) => Math.max(a, b), -Infinity);
    panel.setAttribute("aria-label", `${kind} by layer and step: ${short(low)} to ${short(high)}`);
    make("h3", `${kind}${data.runs.length > 1 ? `, ${run.name}` : ""}: a row per layer, across the steps`, panel);
    const canvas = make("canvas", null, panel, { class: "map" });
    canvas.width = map.steps.length;
    canvas.height = map.layers.length;
    const pen = canvas.getContext("2d");
    map.values.forEach((row, y) => row.forEach((value, x) => {
      if (value == null) return;
      pen.fillStyle = shade(high > low ? (value - low) / (high - low) : 0);
      pen.fillRect(x, y, 1, 1);
    }));
    const words = make("div", `${short(low)} to ${short(high)}`, panel, { class: "faint" });
    canvas.addEventListener("mousemove", (event) => {
      const x = Math.min(map.steps.length - 1, Math.floor((event.offsetX / canvas.clientWidth) * map.steps.length));
      const y = Math.min(map.layers.length - 1, Math.floor((event.offsetY / canvas.clientHeight) * map.layers.length));
      if (x >= 0 && y >= 0) words.textContent = `${map.layers[y]}, step ${map.steps[x]}: ${short(map.values[y][x])}`;
    });
  }
}

function rowsTable(parent, head, rows) {
  const table = make("table", null, make("div", null, parent, { class: "wide" })), first = make("tr", null, table);
  for (const name of head) make("th", name, first);
  for (const row of rows) { const line = make("tr", null, table); for (const cell of row) make("td", cell, line); }
}

function setDetails() {
  const place = byId("details"), several = data.runs.length > 1;
  const open = new Set([...place.querySelectorAll("details[open] > summary")].map((node) => node.textContent));
  place.replaceChildren();
  if (several) {
    make("h2", "What differs between the runs", place);
    if (data.differences.length) rowsTable(place, ["setting", ...data.runs.map((run) => run.name)], data.differences.map(([path, values]) => [path, ...values]));
    else make("p", "No setting differs.", place);
  }
  for (const run of data.runs) {
    make("h2", run.name, place);
    make("div", run.folder, place, { class: "faint" });
    const part = (title, fill, isOpen) => {
      const details = make("details", null, place);
      make("summary", title, details);
      fill(details);
      details.open = isOpen || open.has(title);
    };
    if (run.plan.length) part("Plan and measurement", (d) => rowsTable(d, ["", "plan", "measured"], run.plan), !several);
    for (const [file, text] of Object.entries(run.profiles)) part(`Where a step's time goes, ${file}`, (d) => make("pre", text, d), !several);
    if (run.events.length) part(`Events (${run.events.length})`, (d) => rowsTable(d, ["step", "event", ""], run.events.map((each) => [each.step, each.event, each.text])), !several);
    if (Object.keys(run.system).length) part("System", (d) => rowsTable(d, ["", ""], Object.entries(run.system)), !several);
    if (run.settings.length) part(`Configuration (${run.settings.length} settings)`, (d) => rowsTable(d, ["setting", "value"], run.settings), false);
  }
}

function setAll() {
  const names = data.runs.map((run) => run.name);
  byId("title").textContent = document.title = names.length > 3 ? `${names.length} runs` : names.join(", ");
  const timed = data.runs.some((run) => run.axes.time), counted = data.runs.some((run) => run.axes.tokens);
  for (const option of byId("axis").options) option.disabled = { time: !timed, tokens: !counted }[option.value] ?? false;
  setRuns();
  setCharts();
  drawAll();
  setMaps();
  setDetails();
}

async function follow() {
  let version = data.version;
  for (;;) {
    try {
      const answer = await fetch(`data?version=${version}`);
      if (answer.status === 200) {
        data = await answer.json();
        version = data.version;
        setAll();
        document.body.dataset.version = version;
      }
      byId("follow").textContent = "following";
    } catch { byId("follow").textContent = "the server has ended; this is what it said last"; }
    await new Promise((done) => setTimeout(done, 2000));
  }
}

for (const name of ["axis", "scale"]) byId(name).addEventListener("change", (event) => { state[name] = event.target.value; drawAll(); });
byId("smoothing").addEventListener("input", (event) => { state.smoothing = +event.target.value; drawAll(); });
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("theme").addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; setRuns(); drawAll(); setMaps(); });
addEventListener("resize", drawAll);
setAll();
requestAnimationFrame(() => requestAnimationFrame(() => { document.body.dataset.ready = performance.now().toFixed(0); }));
if (data.following) follow();
