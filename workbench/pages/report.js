"use strict";
// Draws each figure when it is scrolled near, in the page's colour scheme, and all figures in light before printing.
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const drawings = new Map();
const PAPER = 680; // pixels that a figure has in print

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

function draw(place, dark, paper = 0) {
  const figure = JSON.parse(place.querySelector("script").textContent);
  const themed = dark ? toDark(figure) : figure;
  const room = paper || place.parentElement.clientWidth;
  const wide = Math.max(room || figure.width, 280);
  const { data, layout } = fitFigure(themed, wide, figure);
  const width = layout.width ?? (figure.fluid ? Math.min(figure.width, wide) : figure.width);
  drawings.set(place, { width, dark });
  const plot = place.firstElementChild;
  Plotly.react(plot, data, { ...layout, width }, optionsFor(room)).then(() => watchHeads(plot));
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

addEventListener("beforeprint", () => {
  clearTimeout(waiting);
  document.querySelectorAll("details:not([open])").forEach((part) => { part.open = true; part.dataset.shut = ""; });
  places.forEach((place) => { if (!drawings.has(place) || drawings.get(place).dark || drawings.get(place).width > PAPER) draw(place, false, PAPER); });
});
addEventListener("afterprint", () => {
  document.querySelectorAll("details[data-shut]").forEach((part) => { part.open = false; delete part.dataset.shut; });
  [...drawings.keys()].forEach((place) => draw(place, prefersDark.matches));
});
