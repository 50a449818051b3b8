"use strict";
// The page of a report: what there is of its runs, in sections.
const TITLES = {
  loss: "loss (nats)", mtp_loss: "loss of further predictions", validation_loss: "validation loss (nats)",
  validation_bits_per_byte: "validation, bits per byte", lr: "learning rate", grad_norm: "gradient norm",
  skipped_steps: "steps left out", tokens_per_second: "tokens per second", mfu: "model FLOPs utilisation",
  step_time_s: "time of a step (s)", data_wait_s: "of that, waiting for data (s)", memory_gib: "memory (GiB)",
};
// The first section whose names or beginnings of names fit has the chart.
const SECTIONS = [
  ["Loss", ["loss", "mtp_loss", "validation_loss", "validation_bits_per_byte", "validation/"]],
  ["Learning rate and gradients", ["lr", "lr/", "grad_norm", "grad_norm/", "skipped_steps"]],
  ["Speed and memory", ["tokens_per_second", "mfu", "step_time_s", "data_wait_s", "memory_gib"]],
  ["Evaluation, data, experts", ["eval/", "data/", "moe/"]],
  ["Parts of the model", ["weight_norm/", "gradient_norm/", "update_norm/", "activation_rms/", "attention_max_logit/", "router_entropy/"]],
  ["Numbers of observers", [""]],
];
const ROWS = /^(.+?)\s+([\d,]+\.\d+)\s+([\d.]+)%$/;
const fits = (name, word) => (word === "" || word.endsWith("/") ? name.startsWith(word) : name === word);
const titled = (name) => TITLES[name] ?? name;

function setCharts() {
  const all = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))].filter((name) => name !== "tokens");
  const known = Object.keys(TITLES);
  all.sort((a, b) => (known.indexOf(a) + 1 || 99) - (known.indexOf(b) + 1 || 99) || (a < b ? -1 : 1));
  for (const name of all) {
    if (charts.has(name)) continue;
    const panel = make("div", null, gridOf(SECTIONS.find(([, words]) => words.some((word) => fits(name, word)))[0]), { class: "panel", role: "img", "data-name": name });
    const head = make("h3", titled(name), panel), side = make("span", null, head), last = make("output", null, side);
    const widen = make("button", "\u2922", side, { class: "widen", type: "button", title: "wider, or as before", "aria-label": `make ${name} wider` });
    widen.addEventListener("click", () => { panel.classList.toggle("whole"); drawAll(); });
    const place = make("div", null, panel);
    charts.set(name, { panel, place, last, tip: make("div", null, panel, { class: "tip" }), plot: null, near: false, stale: true });
    watcher.observe(panel);
  }
  if (charts.has("loss") && all.includes("validation_loss") && data.runs.length <= FEW_RUNS) charts.get("loss").panel.querySelector("h3").firstChild.textContent = "loss (nats); circles: validation";
}

function gridOf(title) {
  const place = byId("charts");
  for (const [each] of SECTIONS) {
    if (place.querySelector(`section[data-title="${each}"]`)) continue;
    const section = make("section", null, place, { "data-title": each });
    section.hidden = true;
    make("h2", each, section);
    make("div", null, section, { class: "grid" });
  }
  const section = place.querySelector(`section[data-title="${title}"]`);
  section.hidden = false;
  return section.querySelector(".grid");
}

function setNotes() {
  const notes = byId("notes");
  notes.replaceChildren();
  for (const note of data.notes) make("li", note, notes);
  for (const run of data.runs) for (const note of run.notes) make("li", `${run.name}: ${note}`, notes);
}

function setTiles(place, run) {
  const tiles = make("div", null, place, { class: "tiles" });
  for (const [name, text] of Object.entries(run.facts)) {
    const tile = make("div", null, tiles, { class: "tile" }), [value, ...rest] = text.split(/ (?=at step |of )/);
    make("span", name, tile);
    make("b", value, tile);
    const whole = rest.length && rest[0].startsWith("of ") ? rest[0].slice(3) : null;
    if (rest.length) make("small", rest.join(" "), tile);
    const bare = (number) => +number.replaceAll(",", "");
    if (whole) make("progress", null, tile, { max: bare(whole), value: bare(value), "aria-label": "share of the steps" });
  }
}

function setOverview() {
  const place = byId("overview"), facts = [...new Set(data.runs.flatMap((run) => Object.keys(run.facts)))];
  place.replaceChildren();
  if (data.runs.length === 1) return setTiles(place, data.runs[0]);
  const table = make("table", null, make("div", null, place, { class: "wide card" }), { id: "runs" });
  const head = make("tr", null, table);
  for (const name of ["run", ...facts]) make("th", name, head);
  data.runs.forEach((run, i) => {
    const row = make("tr", null, table), cell = make("td", null, row), label = make("label", null, cell);
    const box = make("input", null, label, { type: "checkbox" });
    box.checked = !state.hidden.has(i);
    box.addEventListener("change", () => { if (box.checked) state.hidden.delete(i); else state.hidden.add(i); drawAll(); });
    row.addEventListener("mouseenter", () => { state.named = i; drawAll(); });
    row.addEventListener("mouseleave", () => { state.named = null; drawAll(); });
    const swatch = make("span", null, label, { class: "swatch" });
    swatch.style.borderColor = colour(i);
    swatch.style.borderTopStyle = ["solid", "dashed", "dotted", "double"][Math.floor(i / N_COLOURS) % 4];
    label.append(run.name);
    for (const name of facts) make("td", run.facts[name] ?? "", row);
  });
}

function setMaps() {
  const place = byId("maps");
  place.replaceChildren();
  if (!data.runs.some((run) => Object.keys(run.maps).length)) return;
  make("h2", "Layers: a row each, across the steps", place);
  const grid = make("div", null, place, { class: "grid" });
  for (const run of data.runs) for (const [kind, map] of Object.entries(run.maps)) {
    const panel = make("div", null, grid, { class: "panel", role: "img" });
    make("h3", `${kind}${data.runs.length > 1 ? `, ${run.name}` : ""}`, panel);
    const { low, high } = drawMap(panel, map);
    panel.setAttribute("aria-label", `${kind} by layer and step: ${short(low)} to ${short(high)}`);
  }
}

function rowsTable(parent, head, rows, attributes = {}) {
  const table = make("table", null, make("div", null, parent, { class: "wide" }), attributes);
  if (head.some(Boolean)) { const first = make("tr", null, table); for (const name of head) make("th", name, first); }
  for (const row of rows) { const line = make("tr", null, table); for (const cell of row) make("td", cell, line); }
  return table;
}

// A table of shares as a bar that is divided, and as rows with the colours of its parts; other lines as they are.
function setShares(place, text) {
  const lines = text.trim().split("\n"), rows = lines.map((line) => ROWS.exec(line.trim())).filter(Boolean);
  if (!rows.length) { make("pre", text, place); return; }
  const unit = lines.find((line) => /^\s+\S.*share$/.test(line))?.trim().replace(/\s*share$/, "") ?? "";
  const paint = (k) => shade(0.15 + (0.85 * k) / Math.max(1, rows.length - 1)); // neighbours differ in lightness
  const bar = make("div", null, place, { class: "split", role: "img", "aria-label": rows.map(([, name, , share]) => `${name} ${share}%`).join(", ") });
  rows.forEach(([, name, , share], k) => {
    const part = make("i", null, bar, { title: `${name} ${share}%` });
    part.style.width = `${share}%`;
    part.style.background = paint(k);
    part.hidden = +share === 0;
  });
  const table = rowsTable(place, ["", unit, "share"], rows.map(([, name, value, share]) => [name, value, `${share}%`]), { class: "split-table" });
  [...table.querySelectorAll("tr td:first-child")].forEach((cell, k) => { const mark = make("i"); mark.style.background = paint(k); cell.prepend(mark); });
  const others = lines.slice(1).filter((line) => line.trim() && !ROWS.test(line.trim()) && !/^\s+\S.*share$/.test(line));
  make("div", others.map((line) => line.trim().replace(/\s+/g, " ")).join("; "), place, { class: "faint" });
}

function setSettings(place, settings) {
  const search = make("input", null, place, { type: "search", placeholder: "find a setting", "aria-label": "find a setting" });
  const table = rowsTable(place, ["setting", "value"], settings);
  for (const cell of table.querySelectorAll("td")) { const code = make("code", cell.textContent); cell.replaceChildren(code); }
  search.addEventListener("input", () => {
    for (const row of table.querySelectorAll("tr")) row.hidden = !row.textContent.includes(search.value) && !row.querySelector("th");
  });
}

function setDetails() {
  const place = byId("details"), several = data.runs.length > 1;
  const open = new Set([...place.querySelectorAll("details[open] > summary")].map((node) => node.textContent));
  place.replaceChildren();
  if (several) {
    make("h2", "What differs between the runs", place);
    const card = make("div", null, place, { class: "card" });
    if (data.differences.length) rowsTable(card, ["setting", ...data.runs.map((run) => run.name)], data.differences.map(([path, values]) => [path, ...values]));
    else make("p", "No setting differs.", card);
  }
  for (const run of data.runs) {
    make("h2", several ? run.name : "The run", place);
    const card = make("div", null, place, { class: "card" });
    make("div", run.folder, card, { class: "faint" });
    const part = (title, fill, isOpen) => {
      const details = make("details", null, card);
      make("summary", title, details);
      fill(details);
      details.open = isOpen || open.has(title);
    };
    if (run.plan.length) part("Plan and measurement", (d) => rowsTable(d, ["", "plan", "measured"], run.plan), !several);
    const profiles = Object.entries(run.profiles), kind = (file) => file.split("/")[0];
    profiles.forEach(([file, text], k) => {
      const newest = k === profiles.length - 1 || kind(profiles[k + 1][0]) !== kind(file);
      part(capital(text.split("\n", 1)[0]), (d) => setShares(d, text), !several && newest);
    });
    if (run.events.length) part(`Events (${run.events.length})`, (d) => rowsTable(d, ["step", "event", ""], run.events.map((each) => [each.step, each.event, each.text])), !several);
    if (Object.keys(run.system).length) part("System", (d) => rowsTable(d, ["", ""], Object.entries(run.system)), !several);
    if (run.settings.length) part(`Configuration (${run.settings.length} settings)`, (d) => setSettings(d, run.settings), false);
  }
}
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function setAll() {
  const names = data.runs.map((run) => run.name);
  byId("title").textContent = document.title = names.length > 3 ? `${names.length} runs` : names.join(", ");
  const timed = data.runs.some((run) => run.axes.time), counted = data.runs.some((run) => run.axes.tokens);
  for (const option of byId("axis").options) option.disabled = { time: !timed, tokens: !counted }[option.value] ?? false;
  byId("theme").textContent = isDark() ? "light" : "dark";
  setNotes();
  setOverview();
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
      byId("follow").className = "is-live";
    } catch { byId("follow").textContent = "the server has ended; this is what it said last"; byId("follow").className = ""; }
    await new Promise((done) => setTimeout(done, 2000));
  }
}

for (const name of ["axis", "scale"]) byId(name).addEventListener("change", (event) => { state[name] = event.target.value; drawAll(); });
byId("smoothing").addEventListener("input", (event) => { state.smoothing = +event.target.value; drawAll(); });
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("theme").addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; setAll(); });
addEventListener("resize", drawAll);
setAll();
requestAnimationFrame(() => requestAnimationFrame(() => { document.body.dataset.ready = performance.now().toFixed(0); }));
if (data.following) follow();
