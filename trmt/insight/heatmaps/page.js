// The data of the page: a description, and for each sentence its labels. Weights are decompressed when shown.
const byId = (id) => document.getElementById(id);
const about = JSON.parse(byId("about").textContent);
const sentences = [...document.querySelectorAll("script.sentence")].map((each) => JSON.parse(each.textContent));
const dark = matchMedia("(prefers-color-scheme: dark)");
const RAMPS = {
  light: [[250, 252, 255], [172, 208, 235], [52, 130, 190], [8, 48, 107]],
  dark: [[27, 32, 39], [32, 76, 126], [84, 160, 222], [232, 245, 255]],
};
const MIN_CELL = 16, MAX_CELL = 36;  // pixels
const MIN_THUMBNAIL = 26, MAX_THUMBNAIL = 44;
const SPACE = "\u2581";
// Keys in a grid: rows down, columns to the right.
const MOVES = {
  ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0],
  PageDown: [10, 0], PageUp: [-10, 0], Home: [0, -Infinity], End: [0, Infinity],
};

const state = { row: 0, column: 0, ...readAddress(about.choice) };
let view = null;  // the matrix on the screen: labels, cells, sizes

function axesOf(sentence, kind) {
  const [rows, columns] = about.axes[kind].map((name) => sentences[sentence].axes[name]);
  return { rows, columns };
}

// Colours and canvases

function colour(share) {
  const ramp = RAMPS[dark.matches ? "dark" : "light"];
  const position = Math.min(Math.max(share, 0), 1) * (ramp.length - 1);
  const step = Math.min(Math.floor(position), ramp.length - 2);
  return ramp[step].map((low, channel) => Math.round(low + (ramp[step + 1][channel] - low) * (position - step)));
}

/** Black or white, whichever has more contrast with a background, by the luminance of WCAG 2. */
function textColour(background) {
  const [red, green, blue] = background.map(
    (value) => (value <= 10 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000000" : "#ffffff";
}

/** Draw one pixel for each cell, which the style sheet enlarges; returns the highest weight. */
function paint(canvas, { rows, columns, cells }, rightToLeft) {
  canvas.width = columns;
  canvas.height = rows;
  const max = cells.reduce((one, other) => Math.max(one, other), 0) || 1;
  const shades = Uint8ClampedArray.from({ length: 1024 }, (_, i) => (i % 4 < 3 ? colour((i >> 2) / 255)[i % 4] : 255));
  const colours = new Uint32Array(shades.buffer);  // the four bytes of a pixel as one number
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const pixel = row * columns + (rightToLeft ? columns - 1 - column : column);
      pixels[pixel] = colours[Math.round((cells[row * columns + column] / max) * 255)];
    }
  }
  context.putImageData(image, 0, 0);
  return max;
}

// Lists of sentences, layers and heads

const numberOrMean = (number) => (number ? String(number) : "mean");
const oneOrMean = (name, number) => (number ? `${name} ${number}` : `mean of the ${name}s`);
const headName = (layer, head) => `${oneOrMean("layer", layer)}, ${oneOrMean("head", head)}`;

function make(tag, attributes = {}, text = "") {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

function listSentences() {
  const items = sentences.map((sentence, index) => {
    const text = sentence.axes.source.text || "(empty)";
    const item = make("li", { id: `sentence-${index}`, role: "option", "aria-selected": "false" });
    item.append(make("span", { dir: "auto", lang: about.languages[0] }, text));
    return item;
  });
  byId("sentences").append(...items);
  items.forEach((item, index) => item.addEventListener("click", () => update({ sentence: index })));
  byId("sentences").addEventListener("keydown", (event) => {
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    update({ sentence: clamp(state.sentence + moves[event.key], sentences.length) });
  });
}

function clamp(index, count) {
  return Math.min(Math.max(index, 0), count - 1);
}

function addRadios(parent, field, values) {
  parent.hidden = values.length < 2;
  for (const [value, text] of values) {
    const label = make("label"), radio = make("input", { type: "radio", name: field, value });
    label.append(radio, ` ${text}`);
    parent.append(label);
    radio.addEventListener("change", () => update({ [field]: value }));
  }
}

/** The grid of layers and heads, with their means where there are several. */
function listHeads() {
  const { layers, heads } = about.sizes[state.kind];
  const numbers = (count) => [...(count > 1 ? [0] : []), ...Array.from({ length: count }, (_, i) => i + 1)];
  const headRow = make("tr"), body = make("tbody"), tableHead = make("thead");
  headRow.append(make("td"), ...numbers(heads).map((head) => make("th", { scope: "col" }, numberOrMean(head))));
  tableHead.append(headRow);
  for (const layer of numbers(layers)) {
    const row = make("tr");
    row.append(make("th", { scope: "row" }, numberOrMean(layer)));
    for (const head of numbers(heads)) {
      const name = headName(layer, head);
      const cell = make("td", { role: "gridcell", "aria-label": name, title: name, "data-layer": layer, "data-head": head });
      cell.append(make("canvas", { "aria-hidden": "true" }));
      cell.addEventListener("click", () => update({ layer, head }));
      row.append(cell);
    }
    body.append(row);
  }
  byId("heads").replaceChildren(tableHead, body);
  const size = Math.floor(275 / numbers(heads).length) - 4;
  byId("heads").style.setProperty("--thumb", `${Math.min(Math.max(size, MIN_THUMBNAIL), MAX_THUMBNAIL)}px`);
  byId("overview").hidden = layers * heads === 1;
  state.layer = layers > 1 ? clamp(state.layer, layers + 1) : 1;
  state.head = heads > 1 ? clamp(state.head, heads + 1) : 1;
}

byId("heads").addEventListener("keydown", (event) => {
  if (!(event.key in MOVES)) return;
  event.preventDefault();
  const { layers, heads } = about.sizes[state.kind], [down, right] = MOVES[event.key];
  const moved = (number, move, count) => Math.min(Math.max(number + move, count > 1 ? 0 : 1), count);
  update({ layer: moved(state.layer, down, layers), head: moved(state.head, right, heads) });
  byId("heads").querySelector('[tabindex="0"]').focus();
});

// Showing a map

/** Change the state and show the map that it selects. */
async function update(changes) {
  const before = { ...state };
  Object.assign(state, changes);
  const newMaps = state.sentence !== before.sentence || state.kind !== before.kind;
  if (newMaps || state.unit !== before.unit) state.row = state.column = 0;
  if (state.kind !== before.kind || !byId("heads").rows.length) listHeads();
  markSelection();
  const requested = { ...state };
  const weights = await weightsOf(state.sentence, state.kind);
  // The user may have selected something else in the meantime.
  if (["sentence", "kind", "layer", "head", "unit"].some((field) => requested[field] !== state[field])) return;
  show(weights, newMaps || !view);
}

function show(weights, newMaps) {
  const axes = axesOf(state.sentence, state.kind), sizes = about.sizes[state.kind];
  view = { ...matrixOf(weights, axes, sizes, state.layer, state.head, state.unit), axes };
  for (const [side, axis] of Object.entries(axes)) view[`${side}Labels`] = axis[state.unit];
  if (newMaps) drawThumbnails(weights, axes, sizes);
  view.max = paint(byId("matrix"), view, axes.columns.rightToLeft);
  byId("legend-max").textContent = percent(view.max);
  paint(byId("ramp"), { rows: 1, columns: 64, cells: Float32Array.from({ length: 64 }, (_, i) => i / 63) }, false);
  byId("map-title").textContent = `${about.kindNames[state.kind]}: ${headName(state.layer, state.head)}`;
  labelMatrix();
  resizeMatrix();
  showTexts();
  select(state.row, state.column);
  listHighest();
  writeAddress();
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

function drawThumbnails(weights, axes, sizes) {
  if (byId("overview").hidden) return;
  const thumbnails = thumbnailsOf(weights, axes, sizes, MAX_THUMBNAIL);
  for (const cell of byId("heads").querySelectorAll("td[role=gridcell]")) {
    const layer = Number(cell.dataset.layer), head = Number(cell.dataset.head);
    const chosen = thumbnails.filter((_, number) =>
      (!layer || Math.floor(number / sizes.heads) === layer - 1) && (!head || number % sizes.heads === head - 1));
    paint(cell.firstChild, meanOf(chosen), axes.columns.rightToLeft);
  }
}

/** Mark the selected sentence, kind, unit, layer and head. */
function markSelection() {
  for (const item of byId("sentences").querySelectorAll("[aria-selected=true]")) item.setAttribute("aria-selected", "false");
  const item = byId(`sentence-${state.sentence}`);
  item.setAttribute("aria-selected", "true");
  item.scrollIntoView({ block: "nearest" });
  byId("sentences").setAttribute("aria-activedescendant", item.id);
  for (const radio of document.querySelectorAll("input[type=radio]")) radio.checked = state[radio.name] === radio.value;
  for (const cell of byId("heads").querySelectorAll("td[role=gridcell]")) {
    const selected = Number(cell.dataset.layer) === state.layer && Number(cell.dataset.head) === state.head;
    cell.setAttribute("aria-selected", String(selected));
    cell.tabIndex = selected ? 0 : -1;
  }
}

const axisName = (side) => about.axes[state.kind][side === "rows" ? 0 : 1];
const languageOf = (side) => about.languages[axisName(side) === "source" ? 0 : 1];

function labelMatrix() {
  for (const side of ["rows", "columns"]) {
    const spans = view[`${side}Labels`].map((label) => make("span", { dir: "auto", title: label, lang: languageOf(side) }, label));
    byId(side).replaceChildren(...spans);
  }
  const size = `${view.rows} rows and ${view.columns} columns`;
  byId("grid").setAttribute("aria-label", `Attention map with ${size}; arrow keys move the selection`);
}

/** Make the cells as large as the width of the window allows. */
function resizeMatrix() {
  const columns = [...byId("columns").children];
  const available = byId("map").clientWidth - byId("rows").offsetWidth - 60;
  const cell = Math.min(Math.max(Math.floor(available / view.columns), MIN_CELL), MAX_CELL);
  const longest = columns.reduce((max, span) => Math.max(max, span.offsetWidth), 0), slant = (55 * Math.PI) / 180;
  const overhang = Math.ceil(longest * Math.cos(slant));
  view.cell = cell;
  columns.forEach((span, column) => { span.style.left = `${(displayColumn(column) + 0.5) * cell + 5}px`; });
  byId("columns").style.height = `${Math.ceil(longest * Math.sin(slant)) + 22}px`;
  byId("columns").style.width = `${view.columns * cell + overhang}px`;
  for (const span of byId("rows").children) span.style.height = span.style.lineHeight = `${cell}px`;
  for (const layer of [byId("matrix"), byId("lines")]) {
    layer.style.width = `${view.columns * cell}px`;
    layer.style.height = `${view.rows * cell}px`;
  }
  const line = `var(--page) 0 1px, transparent 1px ${cell}px`;
  byId("lines").style.background = `repeating-linear-gradient(${line}), repeating-linear-gradient(90deg, ${line})`;
}

/** The position of a column from the left; right-to-left sentences are reversed. It is its own inverse. */
function displayColumn(column) {
  return view.axes.columns.rightToLeft ? view.columns - 1 - column : column;
}

/** Both sentences as text: a click selects a row, and shades show its attention weights. */
function showTexts() {
  const parts = ["rows", "columns"].flatMap((side) => {
    const axis = view.axes[side];
    const line = make("dd", { dir: axis.rightToLeft ? "rtl" : "ltr", lang: languageOf(side) });
    axis[state.unit].forEach((label, index) => {
      const first = state.unit === "pieces" ? index : index ? axis.ends[index - 1] : 0;
      if (index && axis.pieces[first].startsWith(SPACE)) line.append(" ");
      const text = label.startsWith(SPACE) && label.length > 1 ? label.slice(1) : label;
      const span = make("span", { class: side === "rows" ? "row" : "column" }, text);
      if (/^<.*>$/.test(text)) span.classList.add("special");
      if (side === "rows") span.addEventListener("click", () => select(index, state.column));
      line.append(span);
    });
    return [make("dt", {}, `${axisName(side)} (${side})`), line];
  });
  byId("texts").replaceChildren(...parts);
}

/** Select a cell: mark it, its labels and its row in the text, and read its weight out. */
function select(row, column) {
  state.row = clamp(row, view.rows);
  state.column = clamp(column, view.columns);
  const weight = (index) => view.cells[state.row * view.columns + index];
  const labels = [view.rowsLabels[state.row], view.columnsLabels[state.column]].map(isolate);
  const share = make("b", {}, percent(weight(state.column)));
  byId("readout").replaceChildren("“", labels[0], "” attends to “", labels[1], "”: ", share);
  const cursor = byId("cursor").style, cell = view.cell;
  const [left, top] = [displayColumn(state.column) * cell, state.row * cell].map((pixels) => `${pixels}px`);
  Object.assign(cursor, { left, top, width: `${cell}px`, height: `${cell}px` });
  for (const [side, index] of [["rows", state.row], ["columns", state.column]]) {
    for (const span of byId(side).querySelectorAll(".selected")) span.classList.remove("selected");
    byId(side).children[index].classList.add("selected");
  }
  byId("texts").querySelectorAll(".row").forEach((span, i) => span.classList.toggle("current", i === state.row));
  byId("texts").querySelectorAll(".column").forEach((span, i) => {
    const shade = colour(weight(i) / view.max);
    Object.assign(span.style, { background: `rgb(${shade})`, color: textColour(shade) });
  });
}

/** The text in an element of its own direction, so that it does not reorder its surroundings. */
function isolate(text) {
  return make("bdi", {}, text);
}

function listHighest() {
  if (!byId("highest").open) return;
  const head = make("tr");
  head.append(make("th", { scope: "col" }, "row"), make("th", { scope: "col" }, "highest weights"));
  const rows = view.rowsLabels.map((label, row) => {
    const weights = [...view.cells.subarray(row * view.columns, (row + 1) * view.columns)].map((weight, i) => [weight, i]);
    const best = weights.sort((one, other) => other[0] - one[0]).slice(0, 3).filter(([weight]) => weight >= 0.005);
    const line = make("tr"), cell = make("td");
    best.forEach(([weight, column], rank) =>
      cell.append(rank ? ", " : "", isolate(view.columnsLabels[column]), ` ${percent(weight)}`));
    line.append(make("th", { scope: "row", dir: "auto" }, label), cell);
    return line;
  });
  byId("table").replaceChildren(head, ...rows);
}

byId("grid").addEventListener("keydown", (event) => {
  if (!(event.key in MOVES) || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const [down, right] = MOVES[event.key];
  const moved = clamp(displayColumn(state.column) + right, view.columns);
  select(state.row + down, displayColumn(moved));
  byId("cursor").scrollIntoView({ block: "nearest", inline: "nearest" });
});
for (const eventType of ["mousemove", "click"]) {
  byId("cells").addEventListener(eventType, (event) => {
    const box = byId("matrix").getBoundingClientRect();
    const column = clamp(Math.floor((event.clientX - box.left) / view.cell), view.columns);
    select(Math.floor((event.clientY - box.top) / view.cell), displayColumn(column));
  });
}
byId("rows").addEventListener("click", (event) => {
  const row = [...byId("rows").children].indexOf(event.target);
  if (row >= 0) select(row, state.column);
});
byId("highest").addEventListener("toggle", listHighest);

// The fragment of the address holds the state, so that a view can be bookmarked and shared

function readAddress(defaults) {
  const found = { ...defaults }, given = new URLSearchParams(location.hash.slice(1));
  for (const field of ["sentence", "layer", "head"]) {
    const number = Number(given.get(field));
    if (given.has(field) && Number.isInteger(number) && number >= 0) found[field] = field === "sentence" ? number - 1 : number;
  }
  found.sentence = clamp(found.sentence ?? 0, sentences.length);
  if (about.kinds.includes(given.get("kind"))) found.kind = given.get("kind");
  if (["pieces", "words"].includes(given.get("unit"))) found.unit = given.get("unit");
  return found;
}

function writeAddress() {
  const { sentence, kind, layer, head, unit } = state;
  history.replaceState(null, "", `#${new URLSearchParams({ sentence: sentence + 1, kind, layer, head, unit })}`);
}

addEventListener("hashchange", () => update(readAddress({})));
dark.addEventListener("change", async () => show(await weightsOf(state.sentence, state.kind), true));
addEventListener("resize", () => { resizeMatrix(); select(state.row, state.column); });

listSentences();
addRadios(byId("kinds"), "kind", about.kinds.map((kind) => [kind, about.kindNames[kind]]));
addRadios(byId("units"), "unit", [["pieces", "pieces"], ["words", "words"]]);
update({});
