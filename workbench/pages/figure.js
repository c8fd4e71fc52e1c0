"use strict";
// Grids of tokens in lines as wide as the page.

function numbersOf(part) {
  if (!part?.bdata) return part;
  const kinds = { f4: Float32Array, f8: Float64Array, i1: Int8Array, u1: Uint8Array, i2: Int16Array, i4: Int32Array };
  const flat = new kinds[part.dtype](Uint8Array.from(atob(part.bdata), (char) => char.charCodeAt(0)).buffer);
  const width = Number(part.shape.split(",")[1]);
  return Array.from({ length: flat.length / width }, (_, row) => [...flat.subarray(row * width, (row + 1) * width)]);
}

// A grid of tokens in one line, cut into lines that fit into `room` pixels: `rewrap` of token_grid.py.
function wrapGrid({ data, layout }, room) {
  const { tokens, rows, cell: [width, row], names, words } = layout.meta.grid;
  const height = rows + 3;
  const line = Math.max(1, Math.min(tokens, Math.floor((room - 100) / width)));
  const lines = Math.ceil(tokens / line);
  const range = (count) => Array.from({ length: count }, (_, at) => at);
  const stack = (flat, fill, fine) => range(lines).reverse().flatMap((at) => flat.map((values) => {
    const part = values.slice(at * line * fine, (at + 1) * line * fine);
    return [...part, ...Array(line * fine - part.length).fill(fill)];
  }));
  const wrapped = data.map((trace) => {
    const part = trace.meta?.part;
    if (part === "cells") {
      const stacked = { z: stack(numbersOf(trace.z), null, 1), x: range(line), y: range(lines * height) };
      for (const name of ["text", "customdata"]) if (trace[name]) stacked[name] = stack(trace[name], "", 1);
      return { ...trace, ...stacked };
    }
    if (part === "marks") {
      const edges = range(lines * height).flatMap((at) => [at - 0.5, at - 0.34]);
      return { ...trace, z: stack(numbersOf(trace.z), 0, 2), x: range(2 * line + 1).map((at) => at / 2 - 0.5),
        y: [...edges, lines * height - 0.5] };
    }
    if (part === "input" || part === "next") {
      const below = part === "input" ? 0 : rows + 1;
      const y = range(tokens).map((at) => (lines - 1 - Math.floor(at / line)) * height + below);
      return { ...trace, x: range(tokens).map((at) => at % line), y };
    }
    return trace;
  });
  const step = Math.max(1, Math.round(16 / row));
  const shown = [...range(rows).filter((number) => number % step === 0).map((number) => [number, names[number]]), ...words];
  const starts = range(lines).map((at) => at * height + 1);
  const yaxis = { ...layout.yaxis, range: [-0.6, lines * height - 1.4],
    tickvals: starts.flatMap((start) => shown.map(([number]) => start + number)),
    ticktext: starts.flatMap(() => shown.map(([, name]) => name)) };
  const size = { width: Math.max(280, line * width + 100), height: layout.height + (lines - 1) * height * row };
  return { data: wrapped, layout: { ...layout, ...size, yaxis, xaxis: { ...layout.xaxis, range: [-0.5, line - 0.5] } } };
}
