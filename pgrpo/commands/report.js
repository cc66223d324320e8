"use strict";
// Everything that a model or a config wrote reaches the page as text (textContent, attributes), never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const PAGE = 50, WIDTH = 420, HEIGHT = 190, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 22;
const color = (i) => `var(--c${i % 8})`;

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "label") element.dataset.label = value;
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function draw(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "fill" || name === "stroke") element.style[name] = value;
    else element.setAttribute(name, value);
  }
  return element;
}

function format(value) {
  if (value === null || value === undefined) return "-";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2).replace(/\.?0+e/, "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const marks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) marks.push(Number((i * step).toPrecision(12)));
  return marks;
}

// Centred running mean over a share of the curve; points that are missing take no part.
function smooth(values, share) {
  const half = Math.floor(values.length * share / 200);
  if (!half) return values;
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, i) => {
    const from = Math.max(0, i - half), to = Math.min(values.length, i + half + 1);
    return (sums[to] - sums[from]) / (to - from);
  });
}

const charts = [];
const allSteps = Object.values(DATA.series).flatMap(([steps]) => steps.length ? [steps[0], steps[steps.length - 1]] : []);
const FIRST = Math.min(...allSteps), LAST = Math.max(...allSteps);
const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (LAST === FIRST ? 0.5 : (step - FIRST) / (LAST - FIRST));

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

// [low ends, high ends] of a held-out metric's confidence interval, if it was logged.
function bandOf(name) {
  const rest = name.replace(/^eval\//, "");
  const low = DATA.series[`eval/ci95_low/${rest}`], high = DATA.series[`eval/ci95_high/${rest}`];
  return name.startsWith("eval/") && low && high && low[0].length === high[0].length ? [low, high] : null;
}

function addChart(where, panel) {
  const svg = draw("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img"});
  svg.setAttribute("aria-label", panel.title);
  const total = panel.stacked && panel.names.length > 1 ? "time/step" : null;
  const names = panel.names.filter((name) => name !== total);
  const legend = make("ul", {className: "legend"});
  const values = new Map();
  const shown = total && DATA.series[total] ? [...names, total] : names;
  shown.forEach((name, i) => {
    const value = make("b"), chip = make("i");
    chip.style.background = name === total ? "var(--ink)" : color(i);
    legend.append(make("li", {title: name}, chip, panel.labels[name] ?? "", value));
    values.set(name, value);
  });
  const card = make("article", {className: "chart"});
  const heading = make("h3", {}, panel.title);
  if (panel.unit) heading.append(make("small", {}, panel.unit));
  card.append(heading, legend, svg);
  where.append(card);
  const chart = {svg, values, names, total, panel, cross: draw("line", {class: "cross", y1: TOP, y2: HEIGHT - BOTTOM})};
  charts.push(chart);
  redraw(chart);
  const stepAt = (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    return Math.round(FIRST + Math.min(1, Math.max(0, share)) * (LAST - FIRST));
  };
  svg.addEventListener("pointermove", (event) => point(stepAt(event)));
  svg.addEventListener("pointerleave", () => point(null));
  svg.addEventListener("click", (event) => showSteps(stepAt(event)));
}

function redraw(chart) {
  const {svg, names, total, panel} = chart, share = Number(byId("smoothing").value);
  const curves = names.map((name) => ({name, steps: DATA.series[name][0], raw: DATA.series[name][1]}));
  for (const curve of curves) curve.values = curve.raw.length > 20 ? smooth(curve.raw, share) : curve.raw;
  const known = [];
  if (total) {
    const below = new Map();
    for (const curve of curves) {
      curve.base = curve.steps.map((step) => below.get(step) ?? 0);
      curve.values = curve.values.map((value, i) => value + curve.base[i]);
      curve.steps.forEach((step, i) => below.set(step, curve.values[i]));
      known.push(0, ...curve.values);
    }
    const [steps, raw] = DATA.series[total] ?? [[], []];
    if (steps.length) curves.push({name: total, steps, raw, values: raw.length > 20 ? smooth(raw, share) : raw, line: true});
    known.push(...(curves[curves.length - 1].values));
  } else {
    for (const curve of curves) {
      curve.band = bandOf(curve.name);
      // A lone spike must not flatten the rest: the axis holds the smooth curve, and 98 in 100 of the raw points.
      const sorted = [...curve.raw].sort((a, b) => a - b), cut = Math.floor(sorted.length / 100);
      known.push(sorted[cut], sorted[sorted.length - 1 - cut], ...curve.values);
      if (curve.band) known.push(...curve.band[0][1], ...curve.band[1][1]);
    }
  }
  let low = known.reduce((a, b) => Math.min(a, b), Infinity), high = known.reduce((a, b) => Math.max(a, b), -Infinity);
  const pad = (high - low) * 0.07 || Math.abs(high) * 0.1 || 1;
  low = total ? 0 : low >= 0 && low < pad * 3 ? Math.max(0, low - pad) : low - pad;
  high += pad;
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (Math.min(Math.max(value, low), high) - low) / (high - low));
  const path = (steps, points) => steps.map((step, i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(points[i]).toFixed(1)}`).join("");
  const between = (steps, upper, lower) =>
    `${path(steps, upper)}${path([...steps].reverse(), [...lower].reverse()).replace("M", "L")}Z`;
  svg.replaceChildren();
  for (const mark of ticks(low, high, 5)) {
    svg.append(draw("line", {class: "gridline", x1: LEFT, x2: WIDTH - RIGHT, y1: y(mark), y2: y(mark)}));
    const text = draw("text", {x: LEFT - 6, y: y(mark) + 4, "text-anchor": "end"});
    text.textContent = format(mark);
    svg.append(text);
  }
  svg.append(draw("line", {class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM}));
  for (const mark of ticks(FIRST, LAST, 5).filter(Number.isInteger)) {
    const text = draw("text", {x: x(mark), y: HEIGHT - 7, "text-anchor": "middle"});
    text.textContent = mark.toLocaleString("en");
    svg.append(text);
  }
  curves.forEach((curve, i) => {
    const stroke = curve.line ? "var(--ink)" : color(i);
    if (curve.base) {
      svg.append(draw("path", {class: "area", fill: stroke, d: between(curve.steps, curve.values, curve.base)}));
      return;
    }
    if (curve.band) svg.append(draw("path", {class: "band", fill: stroke, d: between(curve.band[0][0], curve.band[1][1], curve.band[0][1])}));
    if (curve.values !== curve.raw && !curve.line) svg.append(draw("path", {class: "curve raw", stroke, d: path(curve.steps, curve.raw)}));
    svg.append(draw("path", {class: "curve", stroke, d: path(curve.steps, curve.values)}));
    if (curve.steps.length <= 40 && !curve.line)
      curve.steps.forEach((step, j) => svg.append(draw("circle", {cx: x(step), cy: y(curve.values[j]), r: 2.4, fill: stroke})));
  });
  chart.cross.style.display = "none";
  svg.append(chart.cross);
  readOut(chart, null);
}

function readOut(chart, step) {
  for (const [name, value] of chart.values) {
    const [steps, points] = DATA.series[name];
    value.textContent = format(points[step === null ? points.length - 1 : nearest(steps, step)]);
  }
  chart.cross.style.display = step === null ? "none" : "";
  if (step !== null) for (const end of ["x1", "x2"]) chart.cross.setAttribute(end, x(step));
}

const point = (step) => charts.forEach((chart) => readOut(chart, step));

// ---- the table ----
const SAMPLES = DATA.samples.map(([source, step, prompt, completion, reward, parts, advantage, finish, images = [], told = []]) =>
  ({source, step, prompt: DATA.prompts[prompt], completion, reward, parts, advantage, finish, images, told}));

// Thumbnails side by side; an image without one is its size.
function pictures(images) {
  return images.length ? [make("div", {className: "pictures"}, ...images.map(([number, label]) => number < 0
    ? make("span", {className: "tag"}, label)
    : make("img", {src: `data:image/jpeg;base64,${DATA.images[number]}`, alt: label, title: label})))] : [];
}
const COLUMNS = [
  {title: "step", number: true, of: (s) => s.step},
  {title: "prompt", text: true, of: (s) => s.prompt},
  {title: "completion", text: true, of: (s) => s.completion},
  {title: "reward", number: true, of: (s) => s.reward},
  // The total says all where there is one reward function and it is the total.
  ...DATA.parts.map((name, i) => ({title: name, number: true, of: (s) => s.parts[i] ?? null}))
    .filter((part) => DATA.parts.length > 1 || SAMPLES.some((s) => s.reward !== part.of(s))),
  {title: "advantage", number: true, signed: true, of: (s) => s.advantage},
  {title: "from", tag: true, of: (s) => DATA.sources[s.source]},
  {title: "finish", tag: true, of: (s) => s.finish},
];
const VALUES = COLUMNS.filter((column) => column.number && column.title !== "step");
const form = byId("filters");
let sorted = {column: COLUMNS[0], down: true}, at = 0;

function chosen() {
  const field = (name) => form.elements[name].value;
  const bound = (name, otherwise) => field(name) === "" ? otherwise : Number(field(name));
  const text = field("text").toLowerCase(), value = VALUES[Number(field("value"))];
  const [low, high] = [bound("low", null), bound("high", null)], [first, last] = [bound("first", -Infinity), bound("last", Infinity)];
  const rows = SAMPLES.filter((s) => {
    const number = value.of(s);
    return s.step >= first && s.step <= last
      && (field("source") === "" || DATA.sources[s.source] === field("source"))
      && (field("finish") === "" || s.finish === field("finish"))
      && (low === null || (number !== null && number >= low)) && (high === null || (number !== null && number <= high))
      && (text === "" || s.prompt.toLowerCase().includes(text) || s.completion.toLowerCase().includes(text));
  });
  const {column, down} = sorted;
  return rows.map((s, i) => [column.of(s), i, s]).sort(([a, i], [b, j]) => {
    if (a === b) return i - j;
    if (a === null || b === null) return a === null ? 1 : -1;
    return (a < b ? -1 : 1) * (down ? -1 : 1);
  }).map(([, , s]) => s);
}

// Where the prompts of all samples begin alike (a system prompt, say), a closed row shows what follows, from a whole line on.
function sharedStart(texts) {
  let size = texts.length > 1 ? texts[0].length : 0;
  for (const text of texts) {
    let i = 0;
    while (i < size && text[i] === texts[0][i]) i++;
    size = i;
  }
  return texts.length ? texts[0].lastIndexOf("\n", size - 1) + 1 : 0;
}
const SHARED = sharedStart(DATA.prompts);

function promptCell(column, prompt, images) {
  if (SHARED < 40) return make("td", {className: "text", label: column.title}, ...pictures(images), make("div", {}, prompt));
  const folded = make("span", {className: "folded", title: "the beginning that all prompts share; click to unfold"}, `[${SHARED} shared characters] `);
  const whole = make("span", {className: "unfolded"}, prompt.slice(0, SHARED));
  return make("td", {className: "text", label: column.title}, ...pictures(images), make("div", {}, folded, whole, prompt.slice(SHARED)));
}

// All completions of the same prompt in the same step, side by side, best first.
function groupRow(sample) {
  const asked = (s) => JSON.stringify([s.step, s.source, s.prompt, s.images]);
  const group = SAMPLES.filter((s) => asked(s) === asked(sample));
  group.sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity));
  const cards = group.map((s) => make("article", {className: s === sample ? "own" : ""},
    make("p", {}, make("b", {}, `reward ${format(s.reward)}`), ` advantage ${format(s.advantage)} `, make("span", {className: "tag"}, s.finish)),
    ...pictures(s.told), make("pre", {}, s.completion)));
  return make("tr", {className: "group"}, make("td", {colSpan: COLUMNS.length}, make("div", {className: "side"}, ...cards)));
}

function cell(column, sample) {
  const value = column.of(sample);
  if (column.title === "prompt") return promptCell(column, value, sample.images);
  if (column.text) return make("td", {className: "text", label: column.title}, ...pictures(sample.told), make("div", {}, value));
  if (column.tag) return make("td", {label: column.title}, make("span", {className: "tag"}, value ?? "-"));
  if (column.signed && value) {
    const tag = make("span", {className: `tag ${value > 0 ? "up" : "down"}`}, (value > 0 ? "+" : "") + format(value));
    return make("td", {className: "number", label: column.title}, tag);
  }
  return make("td", {className: "number", label: column.title}, format(value));
}

function fillTable() {
  const rows = chosen(), pages = Math.max(1, Math.ceil(rows.length / PAGE));
  at = Math.min(at, pages - 1);
  const body = byId("table").tBodies[0];
  body.replaceChildren(...rows.slice(at * PAGE, (at + 1) * PAGE).map((s) => {
    const row = make("tr", {tabIndex: 0}, ...COLUMNS.map((column) => cell(column, s)));
    const toggle = () => {
      if (String(getSelection()) !== "") return;
      if (row.classList.toggle("open")) row.after(groupRow(s)); else row.nextSibling.remove();
    };
    row.addEventListener("click", toggle);
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
    return row;
  }));
  if (!rows.length) {
    const empty = make("td", {className: "empty", colSpan: COLUMNS.length}, SAMPLES.length ? "No completion matches." : "No completions were logged.");
    body.append(make("tr", {}, empty));
  }
  byId("count").textContent = `${rows.length.toLocaleString("en")} of ${SAMPLES.length.toLocaleString("en")}`;
  byId("page").textContent = `page ${at + 1} of ${pages}`;
  byId("back").disabled = at === 0;
  byId("next").disabled = at >= pages - 1;
  for (const head of byId("table").tHead.rows[0].cells) {
    if (head.column === sorted.column) head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
    head.firstChild.textContent = head.column.title + (head.column === sorted.column ? (sorted.down ? " ↓" : " ↑") : "");
  }
}

function showSteps(step) {
  const around = Math.max(0, Math.round((LAST - FIRST) / 100));
  form.elements.first.value = Math.max(FIRST, step - around);
  form.elements.last.value = Math.min(LAST, step + around);
  at = 0;
  fillTable();
  byId("samples").scrollIntoView({behavior: "smooth"});
}

function options(select, pairs) {
  for (const [value, text] of pairs) select.append(make("option", {value}, text));
}

options(form.elements.source, [["", "everywhere"], ...DATA.sources.map((name) => [name, name])]);
options(form.elements.finish, [["", "any"], ...[...new Set(SAMPLES.map((s) => s.finish))].sort().map((name) => [name, name])]);
options(form.elements.value, VALUES.map((column, i) => [String(i), column.title]));
const head = byId("table").tHead.insertRow();
for (const column of COLUMNS) {
  const th = make("th", {className: column.number ? "number" : ""}, make("button", {type: "button"}, column.title));
  th.column = column;
  th.firstChild.addEventListener("click", () => {
    sorted = {column, down: sorted.column === column ? !sorted.down : Boolean(column.number)};
    fillTable();
  });
  head.append(th);
}
form.addEventListener("input", () => { at = 0; fillTable(); });
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(() => { at = 0; fillTable(); }));
byId("back").addEventListener("click", () => { at -= 1; fillTable(); });
byId("next").addEventListener("click", () => { at += 1; fillTable(); });

for (const {label, value, note} of DATA.tiles)
  byId("tiles").append(make("article", {className: "tile"}, make("span", {}, label), make("b", {}, value), make("span", {}, note)));
for (const panel of DATA.panels) addChart(byId("charts"), panel);
byId("smoothing").addEventListener("input", () => charts.forEach(redraw));
byId("more").addEventListener("toggle", () => {
  const where = byId("more").querySelector(".charts");
  if (where.childElementCount) return;
  const drawn = new Set(DATA.panels.flatMap((panel) => [...panel.names, ...panel.same]));
  for (const name of Object.keys(DATA.series).sort())
    if (!drawn.has(name) && !name.startsWith("eval/ci95_")) addChart(where, {title: name, unit: "", names: [name], labels: {}});
});

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
}
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
byId("theme").hidden = false;
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
fillTable();
