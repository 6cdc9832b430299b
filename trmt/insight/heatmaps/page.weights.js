"use strict";

// The weights of attention: unpacked, put together, made smaller. What shows them is in page.js.
const KEPT = 6;  // unpacked weights, of the sentences seen last
const SQUARES = Float32Array.from({ length: 256 }, (_, byte) => (byte / 255) ** 2);

const unpacked = new Map();

async function weightsOf(sentence, kind) {
  const name = `${kind}-${sentence}`;
  if (!unpacked.has(name)) {
    const packed = bytesOf(document.getElementById(name).textContent);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    unpacked.set(name, new Uint8Array(await new Response(stream).arrayBuffer()));
    if (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
  }
  return unpacked.get(name);
}

function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);  // much faster, but not in older browsers
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** The cells of one layer and head, of which 0 is the mean, row by row: pieces, or words made of them. */
function matrixOf(weights, axes, { layers, heads }, layer, head, unit) {
  const rows = axes.rows.pieces.length, columns = axes.columns.pieces.length, size = rows * columns;
  const cells = new Float32Array(size);
  const [fromLayer, toLayer] = layer ? [layer - 1, layer] : [0, layers];
  const [fromHead, toHead] = head ? [head - 1, head] : [0, heads];
  const share = 1 / ((toLayer - fromLayer) * (toHead - fromHead));
  for (let l = fromLayer; l < toLayer; l++) {
    for (let h = fromHead; h < toHead; h++) {
      const begin = (l * heads + h) * size;
      for (let at = 0; at < size; at++) cells[at] += share * SQUARES[weights[begin + at]];
    }
  }
  return unit === "pieces" ? { rows, columns, cells } : joined(cells, columns, axes);
}

/** What the pieces of a word get is added up, what they give is averaged. */
function joined(cells, width, axes) {
  const rows = axes.rows.ends.length, columns = axes.columns.ends.length;
  const out = new Float32Array(rows * columns);
  axes.rows.ends.forEach((rowEnd, row) => {
    const rowBegin = row ? axes.rows.ends[row - 1] : 0;
    axes.columns.ends.forEach((end, column) => {
      let sum = 0;
      for (let i = rowBegin; i < rowEnd; i++) {
        for (let j = column ? axes.columns.ends[column - 1] : 0; j < end; j++) sum += cells[i * width + j];
      }
      out[row * columns + column] = sum / (rowEnd - rowBegin);
    });
  });
  return { rows, columns, cells: out };
}

/** Matrices of all layers and heads, no larger than `most`: of neighbours that share a cell, the greatest counts. */
function thumbsOf(weights, axes, { layers, heads }, most) {
  const rows = axes.rows.pieces.length, columns = axes.columns.pieces.length;
  const step = Math.ceil(Math.max(rows, columns) / most);
  const small = { rows: Math.ceil(rows / step), columns: Math.ceil(columns / step) };
  return Array.from({ length: layers * heads }, (_, number) => {
    const greatest = new Uint8Array(small.rows * small.columns);
    for (let row = 0, at = number * rows * columns; row < rows; row++) {
      const begin = Math.floor(row / step) * small.columns;
      for (let column = 0; column < columns; column++, at++) {
        const place = begin + Math.floor(column / step);
        if (weights[at] > greatest[place]) greatest[place] = weights[at];
      }
    }
    return { ...small, cells: Float32Array.from(greatest, (byte) => SQUARES[byte]) };
  });
}

function meanOf(matrices) {
  const cells = matrices[0].cells.map((_, at) => matrices.reduce((sum, each) => sum + each.cells[at], 0) / matrices.length);
  return { ...matrices[0], cells };
}
