// What the page holds: a description of all, and for each sentence its labels; weights are unpacked when seen.
const byId = (id) => document.getElementById(id);
const about = JSON.parse(byId("about").textContent);
const sentences = [...document.querySelectorAll("script.sentence")].map((each) => JSON.parse(each.textContent));
const dark = matchMedia("(prefers-color-scheme: dark)");
const RAMPS = {
  light: [[250, 252, 255], [172, 208, 235], [52, 130, 190], [8, 48, 107]],
  dark: [[27, 32, 39], [32, 76, 126], [84, 160, 222], [232, 245, 255]],
};
const LEAST_CELL = 16, MOST_CELL = 36;  // pixels
const LEAST_THUMB = 26, MOST_THUMB = 44;
const SPACE = "\u2581";
// What keys do in a grid: so many rows down, so many columns to the right.
const MOVES = {
  ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0],
  PageDown: [10, 0], PageUp: [-10, 0], Home: [0, -Infinity], End: [0, Infinity],
};

const state = { row: 0, column: 0, ...fromAddress(about.choice) };
let view = null;  // what is on the screen: labels, cells, sizes

function axesOf(sentence, kind) {
  const [rows, columns] = about.axes[kind].map((name) => sentences[sentence].axes[name]);
  return { rows, columns };
}

// Colours and pictures

function colour(share) {
  const ramp = RAMPS[dark.matches ? "dark" : "light"];
  const place = Math.min(Math.max(share, 0), 1) * (ramp.length - 1), step = Math.min(Math.floor(place), ramp.length - 2);
  return ramp[step].map((low, part) => Math.round(low + (ramp[step + 1][part] - low) * (place - step)));
}

/** Letters that can be read on a colour: whichever of both stands out more, by the luminance of WCAG 2. */
function letters(colour) {
  const [red, green, blue] = colour.map((part) => (part <= 10 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000000" : "#ffffff";
}

/** One pixel for each cell; the style sheet makes them larger. */
function paint(canvas, { rows, columns, cells }, leftward) {
  canvas.width = columns;
  canvas.height = rows;
  const most = cells.reduce((one, other) => Math.max(one, other), 0) || 1;
  const shades = Uint8ClampedArray.from({ length: 1024 }, (_, at) => (at % 4 < 3 ? colour((at >> 2) / 255)[at % 4] : 255));
  const colours = new Uint32Array(shades.buffer);  // a pixel is moved as one number
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const place = row * columns + (leftward ? columns - 1 - column : column);
      pixels[place] = colours[Math.round((cells[row * columns + column] / most) * 255)];
    }
  }
  context.putImageData(image, 0, 0);
  return most;
}

// What can be chosen

const listed = (name) => (name ? String(name) : "mean");
const one = (kind, number) => (number ? `${kind} ${number}` : `mean of the ${kind}s`);
const named = (layer, head) => `${one("layer", layer)}, ${one("head", head)}`;

function make(tag, attributes = {}, text = "") {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

function listSentences() {
  const items = sentences.map((sentence, number) => {
    const text = sentence.axes.source.text || "(nothing)";
    const item = make("li", { id: `sentence-${number}`, role: "option", "aria-selected": "false" });
    item.append(make("span", { dir: "auto", lang: about.languages[0] }, text));
    return item;
  });
  byId("sentences").append(...items);
  items.forEach((item, number) => item.addEventListener("click", () => choose({ sentence: number })));
  byId("sentences").addEventListener("keydown", (event) => {
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose({ sentence: within(state.sentence + moves[event.key], sentences.length) });
  });
}

function within(place, count) {
  return Math.min(Math.max(place, 0), count - 1);
}

function radios(parent, field, values) {
  parent.hidden = values.length < 2;
  for (const [value, text] of values) {
    const label = make("label"), radio = make("input", { type: "radio", name: field, value });
    label.append(radio, ` ${text}`);
    parent.append(label);
    radio.addEventListener("change", () => choose({ [field]: value }));
  }
}

/** The grid of layers and heads: a mean is there where there are several. */
function listHeads() {
  const { layers, heads } = about.sizes[state.kind];
  const places = (count) => [...(count > 1 ? [0] : []), ...Array.from({ length: count }, (_, at) => at + 1)];
  const head = make("tr"), body = make("tbody"), top = make("thead");
  head.append(make("td"), ...places(heads).map((at) => make("th", { scope: "col" }, listed(at))));
  top.append(head);
  for (const layer of places(layers)) {
    const row = make("tr");
    row.append(make("th", { scope: "row" }, listed(layer)));
    for (const at of places(heads)) {
      const name = named(layer, at);
      const cell = make("td", { role: "gridcell", "aria-label": name, title: name, "data-layer": layer, "data-head": at });
      cell.append(make("canvas", { "aria-hidden": "true" }));
      cell.addEventListener("click", () => choose({ layer, head: at }));
      row.append(cell);
    }
    body.append(row);
  }
  byId("heads").replaceChildren(top, body);
  const thumb = Math.min(Math.max(Math.floor(275 / places(heads).length) - 4, LEAST_THUMB), MOST_THUMB);
  byId("heads").style.setProperty("--thumb", `${thumb}px`);
  byId("overview").hidden = layers * heads === 1;
  state.layer = layers > 1 ? within(state.layer, layers + 1) : 1;
  state.head = heads > 1 ? within(state.head, heads + 1) : 1;
}

byId("heads").addEventListener("keydown", (event) => {
  if (!(event.key in MOVES)) return;
  event.preventDefault();
  const { layers, heads } = about.sizes[state.kind], [down, right] = MOVES[event.key];
  const place = (now, move, count) => Math.min(Math.max(now + move, count > 1 ? 0 : 1), count);
  choose({ layer: place(state.layer, down, layers), head: place(state.head, right, heads) });
  byId("heads").querySelector('[tabindex="0"]').focus();
});

// Showing

async function choose(changes) {
  const before = { ...state };
  Object.assign(state, changes);
  if (state.sentence !== before.sentence || state.kind !== before.kind) state.row = state.column = 0;
  if (state.unit !== before.unit) state.row = state.column = 0;
  if (state.kind !== before.kind || !byId("heads").rows.length) listHeads();
  markChoice();
  const wanted = { ...state };
  const weights = await weightsOf(state.sentence, state.kind);
  // Whoever was quicker has chosen something else meanwhile.
  if (["sentence", "kind", "layer", "head", "unit"].some((field) => wanted[field] !== state[field])) return;
  show(weights, before.sentence !== state.sentence || before.kind !== state.kind || !view);
}

function show(weights, anew) {
  const axes = axesOf(state.sentence, state.kind), sizes = about.sizes[state.kind];
  view = { ...matrixOf(weights, axes, sizes, state.layer, state.head, state.unit), axes };
  for (const [side, axis] of Object.entries(axes)) view[`${side}Labels`] = axis[state.unit];
  if (anew) drawHeads(weights, axes, sizes);
  const most = paint(byId("matrix"), view, axes.columns.leftward);
  view.most = most;
  byId("most").textContent = percent(most);
  paint(byId("ramp"), { rows: 1, columns: 64, cells: Float32Array.from({ length: 64 }, (_, at) => at / 63) }, false);
  byId("shown").textContent = `${about.kindNames[state.kind]}: ${named(state.layer, state.head)}`;
  labelMatrix();
  fit();
  writeOut();
  moveTo(state.row, state.column);
  listStrongest();
  toAddress();
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

function drawHeads(weights, axes, sizes) {
  if (byId("overview").hidden) return;
  const thumbs = thumbsOf(weights, axes, sizes, MOST_THUMB);
  for (const cell of byId("heads").querySelectorAll("td[role=gridcell]")) {
    const layer = Number(cell.dataset.layer), head = Number(cell.dataset.head);
    const chosen = thumbs.filter((_, number) =>
      (!layer || Math.floor(number / sizes.heads) === layer - 1) && (!head || number % sizes.heads === head - 1));
    paint(cell.firstChild, meanOf(chosen), axes.columns.leftward);
  }
}

function markChoice() {
  for (const item of byId("sentences").querySelectorAll("[aria-selected=true]")) item.setAttribute("aria-selected", "false");
  const item = byId(`sentence-${state.sentence}`);
  item.setAttribute("aria-selected", "true");
  item.scrollIntoView({ block: "nearest" });
  byId("sentences").setAttribute("aria-activedescendant", item.id);
  for (const radio of document.querySelectorAll("input[type=radio]")) radio.checked = state[radio.name] === radio.value;
  for (const cell of byId("heads").querySelectorAll("td[role=gridcell]")) {
    const chosen = Number(cell.dataset.layer) === state.layer && Number(cell.dataset.head) === state.head;
    cell.setAttribute("aria-selected", String(chosen));
    cell.tabIndex = chosen ? 0 : -1;
  }
}

const languageOf = (side) => about.languages[about.axes[state.kind][side === "rows" ? 0 : 1] === "source" ? 0 : 1];

function labelMatrix() {
  for (const side of ["rows", "columns"]) {
    const spans = view[`${side}Labels`].map((label) => make("span", { dir: "auto", title: label, lang: languageOf(side) }, label));
    byId(side).replaceChildren(...spans);
  }
  const size = `${view.rows} rows and ${view.columns} columns`;
  byId("stage").setAttribute("aria-label", `Matrix of ${size}; the arrow keys move in it`);
}

/** Cells as large as there is room for. */
function fit() {
  const columns = [...byId("columns").children];
  const room = byId("showing").clientWidth - byId("rows").offsetWidth - 60;
  const cell = Math.min(Math.max(Math.floor(room / view.columns), LEAST_CELL), MOST_CELL);
  const longest = columns.reduce((most, span) => Math.max(most, span.offsetWidth), 0), slant = (55 * Math.PI) / 180;
  const over = Math.ceil(longest * Math.cos(slant));
  view.cell = cell;
  columns.forEach((span, column) => { span.style.left = `${(x(column) + 0.5) * cell + 5}px`; });
  byId("columns").style.height = `${Math.ceil(longest * Math.sin(slant)) + 22}px`;
  byId("columns").style.width = `${view.columns * cell + over}px`;
  for (const span of byId("rows").children) span.style.height = span.style.lineHeight = `${cell}px`;
  for (const part of [byId("matrix"), byId("lines")]) {
    part.style.width = `${view.columns * cell}px`;
    part.style.height = `${view.rows * cell}px`;
  }
  const line = `var(--page) 0 1px, transparent 1px ${cell}px`;
  byId("lines").style.background = `repeating-linear-gradient(${line}), repeating-linear-gradient(90deg, ${line})`;
}

/** Where a column stands: sentences from right to left stand in that order. */
function x(column) {
  return view.axes.columns.leftward ? view.columns - 1 - column : column;
}

/** Both sentences as running text, in which a row can be chosen and shades show where it looked. */
function writeOut() {
  const parts = ["rows", "columns"].flatMap((side) => {
    const axis = view.axes[side], units = axis[state.unit];
    const line = make("dd", { dir: axis.leftward ? "rtl" : "ltr", lang: languageOf(side) });
    units.forEach((label, at) => {
      const first = state.unit === "pieces" ? at : at ? axis.ends[at - 1] : 0;
      if (at && axis.pieces[first].startsWith(SPACE)) line.append(" ");
      const text = label.startsWith(SPACE) && label.length > 1 ? label.slice(1) : label;
      const span = make("span", { class: side === "rows" ? "row" : "column" }, text);
      if (/^<.*>$/.test(text)) span.classList.add("special");
      if (side === "rows") span.addEventListener("click", () => moveTo(at, state.column));
      line.append(span);
    });
    return [make("dt", {}, side === "columns" ? "looking at" : state.kind === "encoder" ? "reading" : "writing"), line];
  });
  byId("running").replaceChildren(...parts);
}

function moveTo(row, column) {
  state.row = within(row, view.rows);
  state.column = within(column, view.columns);
  const weight = (at) => view.cells[state.row * view.columns + at];
  const [row_, column_] = [view.rowsLabels[state.row], view.columnsLabels[state.column]];
  const share = make("b", {}, percent(weight(state.column)));
  byId("readout").replaceChildren("“", isolated(row_), "” looks at “", isolated(column_), "”: ", share);
  const cursor = byId("cursor").style, cell = view.cell;
  const [left, top] = [x(state.column) * cell, state.row * cell].map((pixels) => `${pixels}px`);
  Object.assign(cursor, { left, top, width: `${cell}px`, height: `${cell}px` });
  for (const [side, now] of [["rows", state.row], ["columns", state.column]]) {
    for (const span of byId(side).querySelectorAll(".on")) span.classList.remove("on");
    byId(side).children[now].classList.add("on");
  }
  byId("running").querySelectorAll(".row").forEach((span, at) => span.classList.toggle("now", at === state.row));
  byId("running").querySelectorAll(".column").forEach((span, at) => {
    const shade = colour(weight(at) / view.most);
    Object.assign(span.style, { background: `rgb(${shade})`, color: letters(shade) });
  });
}

/** Words of another direction must not turn what stands around them. */
function isolated(text) {
  return make("bdi", {}, text);
}

function listStrongest() {
  if (!byId("strongest").open) return;
  const head = make("tr");
  head.append(make("th", { scope: "col" }, "written"), make("th", { scope: "col" }, "looked at"));
  const rows = view.rowsLabels.map((label, row) => {
    const weights = [...view.cells.subarray(row * view.columns, (row + 1) * view.columns)].map((weight, at) => [weight, at]);
    const best = weights.sort((one, other) => other[0] - one[0]).slice(0, 3).filter(([weight]) => weight >= 0.005);
    const line = make("tr"), cell = make("td");
    best.forEach(([weight, at], place) => cell.append(place ? ", " : "", isolated(view.columnsLabels[at]), ` ${percent(weight)}`));
    line.append(make("th", { scope: "row", dir: "auto" }, label), cell);
    return line;
  });
  byId("table").replaceChildren(head, ...rows);
}

byId("stage").addEventListener("keydown", (event) => {
  if (!(event.key in MOVES) || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const [down, right] = MOVES[event.key];
  const place = within(x(state.column) + right, view.columns);
  moveTo(state.row + down, x(place));  // x is its own inverse
  byId("cursor").scrollIntoView({ block: "nearest", inline: "nearest" });
});
for (const kind of ["mousemove", "click"]) {
  byId("cells").addEventListener(kind, (event) => {
    const place = byId("matrix").getBoundingClientRect();
    const at = within(Math.floor((event.clientX - place.left) / view.cell), view.columns);
    moveTo(Math.floor((event.clientY - place.top) / view.cell), x(at));
  });
}
byId("rows").addEventListener("click", (event) => {
  const at = [...byId("rows").children].indexOf(event.target);
  if (at >= 0) moveTo(at, state.column);
});
byId("strongest").addEventListener("toggle", listStrongest);

// The address says what is shown, so that it can be kept and sent

function fromAddress(usual) {
  const found = { ...usual }, given = new URLSearchParams(location.hash.slice(1));
  for (const field of ["sentence", "layer", "head"]) {
    const number = Number(given.get(field));
    if (given.has(field) && Number.isInteger(number) && number >= 0) found[field] = field === "sentence" ? number - 1 : number;
  }
  found.sentence = within(found.sentence ?? 0, sentences.length);
  if (about.kinds.includes(given.get("kind"))) found.kind = given.get("kind");
  if (["pieces", "words"].includes(given.get("unit"))) found.unit = given.get("unit");
  return found;
}

function toAddress() {
  const { sentence, kind, layer, head, unit } = state;
  history.replaceState(null, "", `#${new URLSearchParams({ sentence: sentence + 1, kind, layer, head, unit })}`);
}

addEventListener("hashchange", () => choose(fromAddress({})));
dark.addEventListener("change", async () => show(await weightsOf(state.sentence, state.kind), true));
addEventListener("resize", () => { fit(); moveTo(state.row, state.column); });

listSentences();
radios(byId("kinds"), "kind", about.kinds.map((kind) => [kind, about.kindNames[kind]]));
radios(byId("units"), "unit", [["pieces", "pieces"], ["words", "words"]]);
choose({});
