"use strict";
// Draws each figure when it is scrolled near, in the page's colour scheme, and all figures in light before printing.
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const drawings = new Map();

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

function draw(place, dark) {
  const figure = JSON.parse(place.querySelector("script").textContent);
  const { data, layout } = dark ? toDark(figure) : figure;
  const room = place.parentElement.clientWidth;
  const width = figure.fluid && room ? Math.min(figure.width, Math.max(room, 280)) : figure.width;
  drawings.set(place, { width, dark });
  const options = { displaylogo: false, showTips: false, ...(room < 480 && { displayModeBar: false }) };
  Plotly.react(place.firstElementChild, data, { ...layout, width }, options);
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
  places.forEach((place) => { if (!drawings.has(place) || drawings.get(place).dark) draw(place, false); });
});
addEventListener("afterprint", () => {
  document.querySelectorAll("details[data-shut]").forEach((part) => { part.open = false; delete part.dataset.shut; });
  if (prefersDark.matches) [...drawings.keys()].forEach((place) => draw(place, true));
});
