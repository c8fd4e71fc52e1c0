"use strict";
// The index of features: lines are made for 100 features at a time; text only ever enters as textContent.
const data = JSON.parse(document.querySelector("script[type='application/json']").textContent);
const form = document.querySelector("form");
const body = document.querySelector("tbody");
const status_ = document.querySelector("[role=status]");
const [back, on] = document.querySelectorAll(".turn button");
const PAGE = 100;
const total = data.active.length;
const linked = new Set(data.pages);
const label = (feature) => data.labels[feature] ?? "";
// All that is searched in one text, a line a feature: the browser's own search passes over it once a word.
const lines = data.active.map((_, feature) =>
  `${feature} ${label(feature)} ${data.tokens[feature].map((code) => data.words[code]).join(" ")}`.toLowerCase());
const starts = new Uint32Array(total + 1);  // of each feature's line
lines.forEach((line, feature) => { starts[feature + 1] = starts[feature] + line.length + 1; });
const haystack = lines.join("\n");
const numbers = new Intl.NumberFormat("en");

let ranks = null;  // of labels, in their order
const ranked = () => new Map([...new Set(Object.values(data.labels))].sort(new Intl.Collator("en", { numeric: true }).compare)
  .map((name, place) => [name, place]));
const keys = { feature: (one) => one, active: (one) => data.active[one], max: (one) => data.max[one],
  label: (one) => (ranks ??= ranked()).get(data.labels[one]) };
let sorted = { column: "active", down: true };
let ordered = [];  // every feature, sorted
let shown = [];
let first = 0;

function make(tag, parent, text, kind) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.textContent = text;
  parent.append(element);
  return element;
}

// Every feature, by the chosen column; those without a label last.
function order() {
  const values = data.active.map((_, feature) => keys[sorted.column](feature));
  const sign = sorted.down ? -1 : 1;
  return Array.from(values.keys()).sort((a, b) =>
    (values[a] === undefined) - (values[b] === undefined) || sign * (values[a] - values[b]) || a - b);
}

// 1 for each feature whose line has the word.
function marked(word) {
  const marks = new Uint8Array(total);
  let feature = 0;
  for (let at = haystack.indexOf(word); at >= 0; at = haystack.indexOf(word, starts[feature])) {
    while (starts[feature + 1] <= at) feature++;
    marks[feature++] = 1;
  }
  return marks;
}

function choose() {
  const found = form.words.value.toLowerCase().split(/\s+/).filter(Boolean).map(marked);
  const dead = form.dead.checked;
  shown = ordered.filter((feature) => (dead || data.active[feature]) && found.every((marks) => marks[feature]));
  first = 0;
  draw();
}

function line(feature) {
  const row = document.createElement("tr");
  const number = make("td", row, "", "number");
  if (linked.has(feature)) make("a", number, feature).href = `feature-${feature}.html`;
  else number.textContent = feature;
  const share = (100 * data.active[feature]) / Math.max(1, data.rows);
  const active = make("td", row, `${numbers.format(data.active[feature])} `, "number");
  make("small", active, `${Number(share.toPrecision(3))} %`);
  make("td", row, data.max[feature], "number");
  make("td", row, label(feature));
  const tokens = make("td", row, "");
  data.tokens[feature].forEach((code) => make("code", tokens, data.words[code]));
  return row;
}

function draw() {
  const part = shown.slice(first, first + PAGE);
  body.replaceChildren(...part.map(line));
  status_.textContent = part.length
    ? `${numbers.format(first + 1)} to ${numbers.format(first + part.length)} of ${numbers.format(shown.length)} feature${shown.length === 1 ? "" : "s"}`
    : form.words.value.trim() ? "no feature has these words" : "no feature is active on these tokens";
  back.disabled = first === 0;
  on.disabled = first + PAGE >= shown.length;
  document.querySelectorAll("th").forEach((head) => {
    const column = head.firstElementChild?.dataset.column;
    if (column === sorted.column) head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", choose);
back.addEventListener("click", () => { first = Math.max(0, first - PAGE); draw(); });
on.addEventListener("click", () => { first += PAGE; draw(); });
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
  const column = button.dataset.column;
  const numeric = column === "active" || column === "max";
  sorted = { column, down: sorted.column === column ? !sorted.down : numeric };
  ordered = order();
  choose();
}));
ordered = order();
choose();
