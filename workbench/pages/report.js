"use strict";
// Draws each figure when it is scrolled near, in the page's colour scheme, and all figures in light before printing.
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const drawings = new Map();
const PAPER = 680, SHEET = 900, HEADED = 640; // pixels of a printed page, and of a figure below its heading
// Printed figures are scaled so that two fit on a page with their heading, to not less than 3/4; high ones to 60 % of a page.
const fitOf = (width, height, sheet) => Math.min(1, PAPER / width, Math.max(330 / height, 0.75), Math.max(560 / height, 0.5), sheet / height);

// The width at which a grid of tokens is largest in print: longer lines are fewer.
function printedRoom(figure, sheet) {
  if (!figure.layout.meta?.grid) return PAPER;
  const scaleIn = (room) => { const { width, height } = fitFigure(figure, room, figure).layout; return fitOf(width, height, sheet); };
  const rooms = [1, 1.25, 1.5, 1.75, 2, 2.5, 3].map((factor) => factor * PAPER);
  return rooms.reduce((best, room) => (scaleIn(room) > scaleIn(best) ? room : best));
}

function toDark(figure) {
  const copy = structuredClone({ data: figure.data, layout: figure.layout });
  for (const [path, value] of figure.dark) {
    const last = path.at(-1);
    const parent = path.slice(0, -1).reduce((part, key) => part[key], copy);
    if (value === null) delete parent[last];
    else parent[last] = value;
  }
  return copy;
}

function draw(place, dark, paper = false) {
  const figure = JSON.parse(place.querySelector("script").textContent);
  const themed = dark ? toDark(figure) : figure;
  const sheet = place.closest("figure:first-child") ? HEADED : SHEET;
  const room = paper ? printedRoom(figure, sheet) : place.parentElement.clientWidth;
  const wide = Math.max(room || figure.width, 280);
  const { data, layout } = fitFigure(themed, wide, figure);
  const width = layout.width ?? (figure.fluid ? Math.min(figure.width, wide) : figure.width);
  place.style.setProperty("--fit", fitOf(width, layout.height ?? figure.height, sheet).toFixed(3));
  drawings.set(place, { width, dark, wrapped: Boolean(figure.layout.meta?.grid ?? figure.layout.meta?.strip) });
  const plot = place.firstElementChild;
  Plotly.react(plot, data, { ...layout, width }, optionsFor(room)).then(() => afterDrawing(plot));
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting && !drawings.has(entry.target)) draw(entry.target, prefersDark.matches);
}, { rootMargin: "1200px" });

const places = [...document.querySelectorAll(".plot")];
places.forEach((place) => near.observe(place));
prefersDark.addEventListener("change", () => [...drawings.keys()].forEach((place) => draw(place, prefersDark.matches)));

let waiting;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => [...drawings.keys()].forEach((place) => draw(place, prefersDark.matches)), 150);
});

// In print, a table that is wider than the page goes on below: parts of its columns, each with those that name the row.
function splitTable(table) {
  table.style.width = "min-content"; // breaks lines at spaces alone, so that numbers and names stay whole
  const widths = [...(table.rows[0]?.cells ?? [])].map((cell) => cell.offsetWidth);
  table.style.width = "";
  const total = (columns) => columns.reduce((sum, column) => sum + widths[column], 0);
  if (total([...widths.keys()]) <= PAPER) return;
  const keys = keyColumns(table, widths), room = PAPER - Math.min(total(keys), PAPER / 2);
  const parts = [];
  for (let column = keys.length; column < widths.length; column++) {
    if (!parts.length || total([...parts.at(-1), column]) > room) parts.push([]);
    parts.at(-1).push(column);
  }
  table.after(...parts.map((columns, at) => {
    const copy = table.cloneNode(true);
    copy.classList.add("part");
    for (const row of copy.rows) [...row.cells].forEach((cell, column) => {
      const key = keys.includes(column);
      if (!key && !columns.includes(column)) cell.remove();
      else if (widths[column] > (key ? PAPER / 2 : room)) cell.classList.add("long");
    });
    const [first, last] = [columns[0] + 1, columns.at(-1) + 1];
    if (at > 0) copy.createCaption().textContent = `column${first < last ? `s ${first} to` : ""} ${last} of ${widths.length}`;
    return copy;
  }));
  table.hidden = true;
}

// The first column, and the next ones if they are narrow and hold words or whole numbers: at most three.
function keyColumns(table, widths) {
  const named = (column) => [...table.tBodies[0].rows].every((row) => !/^-?\d*\.\d|^-?\d.*e|^$/.test(row.cells[column].textContent));
  const keys = [0];
  while (keys.length < Math.min(3, widths.length - 1) && named(keys.length)
    && [...keys, keys.length].reduce((sum, column) => sum + widths[column], 0) < PAPER / 4) keys.push(keys.length);
  return keys;
}

addEventListener("beforeprint", () => {
  clearTimeout(waiting);
  document.body.classList.add("paper");
  document.querySelectorAll("details:not([open])").forEach((part) => { part.open = true; part.dataset.shut = ""; });
  document.querySelectorAll(".wide table").forEach(splitTable);
  for (const place of places) {
    const drawn = drawings.get(place);
    if (!drawn || drawn.dark || drawn.wrapped || drawn.width > PAPER) draw(place, false, true);
  }
});
addEventListener("afterprint", () => {
  document.body.classList.remove("paper");
  document.querySelectorAll("table.part").forEach((part) => part.remove());
  document.querySelectorAll("table[hidden]").forEach((table) => { table.hidden = false; });
  document.querySelectorAll("details[data-shut]").forEach((part) => { part.open = false; delete part.dataset.shut; });
  [...drawings.keys()].forEach((place) => draw(place, prefersDark.matches));
});
