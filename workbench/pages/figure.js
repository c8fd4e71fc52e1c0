"use strict";
// What figures can do besides plotly's own: fit a page of any width. `watchHeads` is in head_pictures.js.
const NARROW = 520; // pixels: below, the key of a figure stands below its plot
const TITLED = 760; // pixels that a title beside plotly's buttons needs
const CHARACTER = 6.8; // width at 12 to 13 pixels
const [KEY, KEY_LINE] = [48, 19]; // pixels of a line and its gap before a name, and of a line of names
const STRIP = [60, 24]; // least width and height of a cell of a strip
const [PANEL, SIDES, TICK, LABEL] = [220, 110, 34, 14]; // least width of a panel, what stands beside panels, a tick, a turned label

function numbersOf(part) {
  if (!part?.bdata) return part;
  const kinds = { f4: Float32Array, f8: Float64Array, i1: Int8Array, u1: Uint8Array, i2: Int16Array, i4: Int32Array };
  const flat = new kinds[part.dtype](Uint8Array.from(atob(part.bdata), (char) => char.charCodeAt(0)).buffer);
  if (!part.shape) return [...flat];
  const width = Number(part.shape.split(",")[1]);
  return Array.from({ length: flat.length / width }, (_, row) => [...flat.subarray(row * width, (row + 1) * width)]);
}

// A grid of tokens in one line, cut into lines that fit into `room` pixels: `rewrap` of token_grid.py.
function wrapGrid({ data, layout }, room) {
  const { tokens, rows, cell: [width, row], names, words } = layout.meta.grid;
  const height = rows + 3;
  const sides = room < NARROW ? 64 : 100;
  const line = Math.max(1, Math.min(tokens, Math.floor((room - sides) / width)));
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
      // beside cells plotly would take more room for the bar than there is above them, and squeeze the rows
      const bar = { ...trace.colorbar, yref: "container", y: 1, yanchor: "top", title: { ...trace.colorbar.title, side: "right" } };
      if (!layout.title?.text) stacked.colorbar = bar;
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
  const least = layout.title?.text ? Math.min(TITLED, room) : 280;
  const wide = Math.max(least, line * width + sides);
  const key = layout.showlegend && wide < NARROW ? KEY_LINE : 0; // its two names stand below each other
  const margin = { ...layout.margin, b: (layout.margin?.b ?? 60) + key, ...(room < NARROW && { l: 60, r: 4 }) };
  const size = { width: wide, height: layout.height + (lines - 1) * height * row + key, margin };
  const xaxis = { ...layout.xaxis, range: [-0.5, (wide - sides) / width - 0.5] };
  return { data: wrapped, layout: { ...layout, ...size, yaxis, xaxis } };
}

// A strip of tokens in lines that fit into `room` pixels: `restrip` of token_strip.py.
function wrapStrip({ data: [heat], layout }, room) {
  const { lines, positions, ends, runs } = layout.meta.strip;
  const margin = { ...layout.margin, ...(room < NARROW && { l: 52, r: 4 }) };
  const most = Math.floor((room - (margin.l ?? 70) - (margin.r ?? 30)) / STRIP[0]);
  const line = Math.max(1, Math.min(most, Math.max(...lines.map((part) => part.length))));
  const starts = [0, ...ends.map((end) => end + 1)];
  const parts = starts.flatMap((first, at) => {
    const paragraph = positions.map((_, index) => index).slice(first, starts[at + 1]);
    return Array.from({ length: Math.ceil(paragraph.length / line) }, (_, row) => paragraph.slice(row * line, (row + 1) * line));
  });
  for (const part of parts) for (const [first, last] of runs) {
    const inside = part.filter((index) => first <= index && index < last);
    part.splice(part.findIndex((index) => inside.includes(index)), inside.length, ...inside.reverse());
  }
  const place = new Map(lines.flatMap((part, row) => part.map((index, column) => [index, [row, column]])));
  const moved = (cells, fill) => parts.map((part) => [
    ...part.map((index) => cells[place.get(index)[0]][place.get(index)[1]]), ...Array(line - part.length).fill(fill)]);
  const wrapped = { ...heat, z: moved(numbersOf(heat.z), null), text: moved(heat.text, ""), customdata: moved(heat.customdata, ""),
    x: [...Array(line).keys()], y: [...parts.keys()] };
  const ticks = { tickvals: wrapped.y, ticktext: parts.map((part) => String(positions[Math.min(...part)])) };
  const height = layout.height + STRIP[1] * (Math.max(2, parts.length) - Math.max(2, lines.length));
  const size = { width: room, height, margin, title: room < NARROW ? undefined : layout.title };
  const xaxis = { ...layout.xaxis, range: [-0.5, most - 0.5] };
  return { data: [wrapped], layout: { ...layout, ...size, xaxis, yaxis: { ...layout.yaxis, ...ticks } } };
}

// A figure for `room` pixels: grids and strips of tokens in lines that fit, a figure that may shrink below NARROW with its key below.
function fitFigure(figure, room, { fluid, width }) {
  const { grid, strip } = figure.layout.meta ?? {};
  if (grid) return wrapGrid(figure, room);
  if (strip && room < width) return wrapStrip(figure, room);
  return fluid && room < Math.min(NARROW, width) ? narrowFigure(figure, room, width) : figure;
}

function wrapText(text, room) {
  const most = Math.max(8, Math.floor(room / CHARACTER));
  if (!text || /<(?!br>)/.test(text)) return text; // other markup could be cut in two
  return text.split("<br>").map((line) => line.split(" ").reduce((lines, word) => {
    const longer = `${lines.at(-1)} ${word}`;
    return longer.length > most && lines.at(-1) ? [...lines, word] : [...lines.slice(0, -1), longer.trim()];
  }, [""]).join("<br>")).join("<br>");
}

const longestLine = (text) => Math.max(...text.replace(/<br>/g, "\n").replace(/<[^>]*>/g, "").replace(/&[^;]+;/g, "x").split("\n").map((line) => line.length));
const axesOf = (layout, letter) => Object.keys(layout).filter((name) => RegExp(`^${letter}axis\\d*$`).test(name));
const extent = (axis) => (axis?.domain ? axis.domain[1] - axis.domain[0] : 1);
const isTitle = (part) => part.xref === "paper" && part.yref === "paper" && !part.showarrow;

// Names of categories along an axis: its tick labels, or the text that places bars.
function namesOf(data, axis, name) {
  if (axis.ticktext) return [axis.tickvals, axis.ticktext];
  const letter = name[0];
  const own = data.filter((trace) => (trace[`${letter}axis`] ?? letter) === letter + name.slice(5) && Array.isArray(trace[letter]));
  const names = [...new Set(own.flatMap((trace) => trace[letter].filter((value) => typeof value === "string")))];
  return [names, names];
}

// Panels beside each other keep the width that they need, and scroll; one panel is as wide as the room.
function narrowWidth(data, layout, room, width) {
  const axes = axesOf(layout, "x").map((name) => [name, layout[name]]);
  const panels = new Set(axes.map(([, axis]) => String(axis.domain ?? [0, 1])));
  const smallest = Math.min(1, ...axes.map(([, axis]) => extent(axis)));
  const titles = (layout.annotations ?? []).filter(isTitle).map(({ text }) => longestLine(text) * CHARACTER);
  const beside = panels.size > 1 ? Math.max(PANEL, ...titles) / smallest + SIDES : 0;
  const labelled = axes.map(([name, axis]) => (axis.ticktext ? namesOf(data, axis, name)[0].length * LABEL / extent(axis) + SIDES : 0));
  return [Math.max(room, Math.min(width, Math.max(beside, ...labelled))), panels.size];
}

// The key below the plot, in lines of `width` pixels; names too long for a line are wrapped.
function keyBelow(data, layout, width) {
  const named = data.filter((trace) => trace.name && trace.showlegend !== false);
  if (!(layout.showlegend ?? named.length > 1) || !named.length) return { data, legend: layout.legend, height: 0 };
  const wrapped = data.map((trace) => (named.includes(trace) ? { ...trace, name: wrapText(trace.name, width - KEY - 10) } : trace));
  const names = wrapped.filter((_, at) => named.includes(data[at])).map(({ name }) => name);
  const columns = Math.max(1, Math.floor(width / (KEY + CHARACTER * Math.max(...names.map(longestLine)))));
  const lines = Math.ceil(names.length / columns) * Math.max(...names.map((name) => name.split("<br>").length));
  const place = { orientation: "h", xref: "container", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom", maxheight: 1 };
  const legend = { ...layout.legend, ...place, entrywidth: undefined, font: { ...layout.legend?.font, size: 12 } };
  return { data: wrapped, legend, height: lines * KEY_LINE + 10 };
}

// Colour bars above the plot, where they take no width.
function barsAbove(data, room) {
  const place = { orientation: "h", x: 0, xanchor: "left", xpad: 0, y: 1, yanchor: "bottom", ypad: 6, lenmode: "pixels", len: Math.min(220, room), thickness: 10 };
  const above = (bar) => ({ ...bar, ...place, title: { ...bar?.title, text: wrapText(bar?.title?.text, room), side: "top" } });
  return data.map((trace) => {
    if (trace.z && trace.showscale !== false) return { ...trace, colorbar: above(trace.colorbar) };
    return trace.marker?.showscale ? { ...trace, marker: { ...trace.marker, colorbar: above(trace.marker.colorbar) } } : trace;
  });
}

// Whole ticks as far apart as their labels need.
function fewerTicks(data, axis, name, room) {
  if (typeof axis.dtick !== "number" || axis.type === "log") return axis;
  const own = data.filter((trace) => (trace.xaxis ?? "x") === `x${name.slice(5)}`);
  const values = own.flatMap(({ x, z }) => (x ? numbersOf(x) : [0, (numbersOf(z ?? [[]])[0] ?? []).length])).filter(Number.isFinite);
  const [low, high] = axis.range ?? [Math.min(...values), Math.max(...values)];
  const factor = Math.ceil((Math.abs(high - low) / axis.dtick) * TICK / room);
  return factor > 1 ? { ...axis, dtick: axis.dtick * factor } : axis;
}

// Names beside a y axis in lines of a third of the width, and the height that the rows need.
function namesBeside(data, axis, name, width) {
  const [tickvals, names] = namesOf(data, axis, name);
  const ticktext = names.map((text) => wrapText(String(text), 0.4 * width));
  const lines = Math.max(1, ...ticktext.map((text) => text.split("<br>").length));
  const [wide, height] = [Math.max(0, ...ticktext.map(longestLine)) * CHARACTER, (names.length * lines * 15) / extent(axis)];
  return [lines > 1 ? { ...axis, tickvals, ticktext, tickmode: "array" } : axis, wide, lines > 1 ? height : 0];
}

// Names below an x axis, turned where they would overlap, and the height that they then need.
function namesBelow(axis, room) {
  const longest = Math.max(0, ...(axis.ticktext ?? []).map(longestLine)) * CHARACTER;
  if (!axis.ticktext || longest < room / axis.ticktext.length || axis.tickangle) return [axis, 0];
  const ticktext = axis.ticktext.map((text) => text.replaceAll("<br>", " "));
  return [{ ...axis, ticktext, tickangle: -90 }, Math.max(...ticktext.map(longestLine)) * CHARACTER - 20];
}

function narrowFigure({ data: drawn, layout: given }, room, fullWidth) {
  const layout = { xaxis: {}, yaxis: {}, ...given };
  const [width, panels] = narrowWidth(drawn, layout, room, fullWidth);
  const key = keyBelow(drawn, layout, width);
  const margin = { ...layout.margin, l: 48, ...(panels === 1 && { r: 14 }) };
  const top = margin.t ?? 70;
  const axes = {};
  let [plot, below, beside] = [(layout.height ?? 450) - top - (margin.b ?? 60), 0, 40];
  for (const name of axesOf(layout, "y")) {
    const [axis, wide, height] = namesBeside(drawn, layout[name], name, width);
    [plot, beside] = [Math.max(plot, height), Math.max(beside, wide + 10)];
    axes[name] = { ...axis, title: { ...axis.title, text: wrapText(axis.title?.text, plot * extent(axis)) } };
  }
  const inner = width - beside - 30;
  const data = panels === 1 ? barsAbove(key.data, inner) : key.data;
  const bars = data.some((trace, at) => trace !== key.data[at]);
  margin.t = layout.updatemenus?.length ? top : Math.max(bars ? 64 : 34, Math.min(top, 40));
  for (const name of axesOf(layout, "x")) {
    const length = inner * extent(layout[name]);
    const [axis, turned] = namesBelow(fewerTicks(drawn, layout[name], name, length), length);
    axes[name] = { ...axis, title: { ...axis.title, text: wrapText(axis.title?.text, length) } };
    below = Math.max(below, turned + ((axes[name].title.text ?? "").split("<br>").length - 1) * 17);
  }
  const titled = (layout.annotations ?? []).map((part) => (panels === 1 && isTitle(part) ? { ...part, text: wrapText(part.text, inner) } : part));
  const size = { width, height: Math.round(plot + margin.t + (margin.b ?? 60) + key.height + below) };
  const rest = { legend: key.legend, margin, ...(layout.annotations && { annotations: titled }) };
  return { data, layout: { ...layout, ...rest, ...axes, ...size, title: undefined } };
}

// Moves a plot down whose key stands under plotly's buttons.
function clearKey(plot, tries = 3) {
  const boxes = [".legend .bg", ".modebar-group:last-child", ".modebar-group"].map((name) => plot.querySelector(name)?.getBoundingClientRect());
  const [key, last, first] = boxes;
  if (!tries || !key || !last?.height || key.top >= last.bottom || key.bottom <= last.top || key.right < first.left) return;
  const more = Math.ceil(last.bottom - key.top), { margin, height } = plot._fullLayout;
  const moved = Plotly.relayout(plot, { "margin.t": margin.t + more, height: height + more });
  moved.then(() => requestAnimationFrame(() => clearKey(plot, tries - 1))); // the buttons may have become higher
}

function afterDrawing(plot) {
  watchHeads(plot);
  requestAnimationFrame(() => clearKey(plot)); // the buttons have their place with the next picture
}

// Plotly's buttons, without its logo; a phone has no room for them.
const optionsFor = (room) => ({ displaylogo: false, showTips: false, ...(room < 480 && { displayModeBar: false }) });

// A grid of tokens without its title, for a page whose caption has it.
function untitled({ data, layout }) {
  if (!layout.meta?.grid) return { data, layout };
  return { data, layout: { ...layout, title: undefined, height: layout.height - layout.margin.t + 64, margin: { ...layout.margin, t: 64 } } };
}

// Draws a figure in `plot`, as wide as the window allows, now and when that changes.
function showFigure(plot, figure) {
  const draw = () => {
    const room = plot.parentElement.clientWidth;
    const { data, layout } = fitFigure(room < NARROW ? untitled(figure) : figure, room, figure);
    Plotly.react(plot, data, layout, optionsFor(room)).then(() => afterDrawing(plot));
  };
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 150); });
  draw();
}
