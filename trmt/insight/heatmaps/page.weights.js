"use strict";

// Attention weights: decompressing, averaging, joining pieces to words, thumbnails. page.js displays them.
const CACHE_SIZE = 6;  // decompressed weights that are kept, of the sentences shown last
const SQUARES = Float32Array.from({ length: 256 }, (_, byte) => (byte / 255) ** 2);

const cache = new Map();

async function weightsOf(sentence, kind) {
  const name = `${kind}-${sentence}`;
  if (!cache.has(name)) {
    const compressed = decodeBase64(document.getElementById(name).textContent);
    const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("deflate"));
    cache.set(name, new Uint8Array(await new Response(stream).arrayBuffer()));
    if (cache.size > CACHE_SIZE) cache.delete(cache.keys().next().value);
  }
  return cache.get(name);
}

function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);  // much faster, but missing in older browsers
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** The matrix of one layer and head, of which 0 is the mean of all, row by row; between pieces or words. */
function matrixOf(weights, axes, { layers, heads }, layer, head, unit) {
  const rows = axes.rows.pieces.length, columns = axes.columns.pieces.length, size = rows * columns;
  const cells = new Float32Array(size);
  const [firstLayer, lastLayer] = layer ? [layer - 1, layer] : [0, layers];
  const [firstHead, lastHead] = head ? [head - 1, head] : [0, heads];
  const share = 1 / ((lastLayer - firstLayer) * (lastHead - firstHead));
  for (let l = firstLayer; l < lastLayer; l++) {
    for (let h = firstHead; h < lastHead; h++) {
      const begin = (l * heads + h) * size;
      for (let i = 0; i < size; i++) cells[i] += share * SQUARES[weights[begin + i]];
    }
  }
  return unit === "pieces" ? { rows, columns, cells } : wordMatrix(cells, columns, axes);
}

/** The weights between words: the sum over the pieces of a column, the mean over the pieces of a row. */
function wordMatrix(cells, width, axes) {
  const rows = axes.rows.ends.length, columns = axes.columns.ends.length;
  const result = new Float32Array(rows * columns);
  axes.rows.ends.forEach((rowEnd, row) => {
    const rowBegin = row ? axes.rows.ends[row - 1] : 0;
    axes.columns.ends.forEach((end, column) => {
      let sum = 0;
      for (let i = rowBegin; i < rowEnd; i++) {
        for (let j = column ? axes.columns.ends[column - 1] : 0; j < end; j++) sum += cells[i * width + j];
      }
      result[row * columns + column] = sum / (rowEnd - rowBegin);
    });
  });
  return { rows, columns, cells: result };
}

/** The matrices of all layers and heads, max-pooled to at most `maxSize` rows and columns. */
function thumbnailsOf(weights, axes, { layers, heads }, maxSize) {
  const rows = axes.rows.pieces.length, columns = axes.columns.pieces.length;
  const step = Math.ceil(Math.max(rows, columns) / maxSize);
  const small = { rows: Math.ceil(rows / step), columns: Math.ceil(columns / step) };
  return Array.from({ length: layers * heads }, (_, number) => {
    const maxima = new Uint8Array(small.rows * small.columns);
    for (let row = 0, i = number * rows * columns; row < rows; row++) {
      const begin = Math.floor(row / step) * small.columns;
      for (let column = 0; column < columns; column++, i++) {
        const index = begin + Math.floor(column / step);
        if (weights[i] > maxima[index]) maxima[index] = weights[i];
      }
    }
    return { ...small, cells: Float32Array.from(maxima, (byte) => SQUARES[byte]) };
  });
}

function meanOf(matrices) {
  const cells = matrices[0].cells.map((_, i) => matrices.reduce((sum, each) => sum + each.cells[i], 0) / matrices.length);
  return { ...matrices[0], cells };
}
