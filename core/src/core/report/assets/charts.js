"use strict";
// Curves and maps of runs. `data` is what core.report.page makes; every text is set as text, never as HTML.
const state = { axis: "step", scale: "linear", smoothing: 0.8, hidden: new Set(), named: null };
const AXES = { step: "step", tokens: "tokens", time: "training time" };
const PLAIN = new Set(["lr", "memory_gib", "tokens"]);
const N_COLOURS = 6, DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]], HEIGHT = 236, WIDER = 420;
const FEW_RUNS = 4; // whose points can be told apart
const FONT = "11px system-ui, sans-serif";
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
const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

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

// What a chart has beside its own curve of a run: points of validation with the losses of few runs, the rates that are to come.
function beside(run, name, line, nRuns) {
  if (name === "loss" && nRuns <= FEW_RUNS) {
    const held = points(run, "validation_loss");
    return held ? [[[held.xs, held.ys], { ...line, stroke: line.stroke, width: 0, points: { show: true, size: 7, fill: css("--panel"), width: 2 } }]] : [];
  }
  if (name !== "lr" || state.axis !== "step" || !run.schedule.length) return [];
  const planned = run.schedule.filter(([, rate]) => state.scale === "linear" || rate > 0);
  return [[[planned.map(([step]) => step), planned.map(([, rate]) => rate)], { ...line, width: 1.5, dash: [3, 4], points: { show: false } }]];
}

function draw(name) {
  const chart = charts.get(name), panel = chart.panel;
  if (chart.plot) chart.plot.destroy();
  chart.plot = null;
  chart.tip.style.display = "none";
  const shown = data.runs.map((run, i) => [run, i, state.hidden.has(i) ? null : points(run, name)]).filter((each) => each[2]);
  panel.setAttribute("aria-label", `${name} over ${AXES[state.axis]}, ${state.scale}, ${shown.length} runs`);
  chart.drawn = { points: shown.reduce((n, each) => n + each[2].xs.length, 0) };
  chart.last.textContent = shown.length === 1 ? short(shown[0][2].ys.at(-1)) : "";
  if (!shown.length) return;
  const tables = [], series = [{}];
  for (const [run, i, { xs, ys, smooth }] of shown) {
    const faded = state.named != null && state.named !== i ? "38" : "";
    const line = { stroke: colour(i) + faded, dash: dash(i), spanGaps: true, points: { show: xs.length < 60, size: 5 } };
    for (const [table, look] of beside(run, name, line, shown.length)) { tables.push(table); series.push(look); }
    tables.push([xs, ys]);
    series.push(smooth ? { ...line, stroke: colour(i) + (faded ? "18" : "48"), width: 1, points: { show: false } } : { ...line, width: 2 });
    if (smooth) { tables.push(smooth); series.push({ ...line, width: 2, points: { show: false } }); }
  }
  const look = { stroke: css("--faint"), font: FONT, grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false }, border: { show: false } };
  const log = state.scale !== "linear";
  chart.plot = new uPlot({
    width: Math.max(200, panel.clientWidth - 28), height: panel.classList.contains("whole") ? WIDER : HEIGHT, series, legend: { show: false },
    scales: { x: { time: false, distr: state.scale === "loglog" ? 3 : 1 }, y: { distr: log ? 3 : 1 } },
    axes: [
      { ...look, size: 34, gap: 6, border: { show: true, stroke: css("--line"), width: 1 }, values: (u, ticks) => ticks.map(across) },
      { ...look, size: 58, values: (u, ticks) => ticks.map(short) },
    ],
    cursor: { sync: { key: "runs" }, drag: { x: true, y: false }, points: { size: 7 } },
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
    row.append(`${run.name}: `);
    make("b", short(ys[k]), row);
    row.append(` at ${across(xs[k])}`);
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

// Small is dark in a dark page and light in a light one; lightness alone tells the order.
function shade(share) {
  const dark = [[28, 34, 46], [38, 84, 124], [60, 150, 160], [240, 228, 120]];
  const light = [[243, 240, 222], [150, 190, 190], [50, 110, 150], [20, 30, 70]];
  const stops = isDark() ? dark : light, at = Math.min(0.9999, Math.max(0, share)) * 3, k = Math.floor(at);
  return `rgb(${stops[k].map((from, c) => Math.round(from + (at - k) * (stops[k + 1][c] - from))).join(",")})`;
}

function drawMap(panel, map) {
  const all = map.values.flat().filter((value) => value != null);
  const low = all.reduce((a, b) => Math.min(a, b), Infinity), high = all.reduce((a, b) => Math.max(a, b), -Infinity);
  const canvas = make("canvas", null, panel, { class: "map" });
  canvas.width = map.steps.length;
  canvas.height = map.layers.length;
  const pen = canvas.getContext("2d");
  map.values.forEach((row, y) => row.forEach((value, x) => {
    if (value == null) return;
    pen.fillStyle = shade(high > low ? (value - low) / (high - low) : 0);
    pen.fillRect(x, y, 1, 1);
  }));
  const scale = make("div", null, panel, { class: "scale" });
  make("span", short(+low.toPrecision(3)), scale);
  make("i", null, scale).style.background = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(shade).join(",")})`;
  make("span", short(+high.toPrecision(3)), scale);
  const words = make("span", `${map.layers[0]} on top, to step ${short(map.steps.at(-1))}`, scale);
  canvas.addEventListener("mousemove", (event) => {
    const x = Math.min(map.steps.length - 1, Math.floor((event.offsetX / canvas.clientWidth) * map.steps.length));
    const y = Math.min(map.layers.length - 1, Math.floor((event.offsetY / canvas.clientHeight) * map.layers.length));
    if (x >= 0 && y >= 0) words.textContent = `${map.layers[y]}, step ${map.steps[x]}: ${short(map.values[y][x])}`;
  });
  return { low, high };
}
