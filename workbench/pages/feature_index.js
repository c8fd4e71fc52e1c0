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
const texts = data.active.map((_, feature) =>
  `${feature} ${label(feature)} ${data.tokens[feature].map((code) => data.words[code]).join(" ")}`.toLowerCase());

const keys = { feature: (one) => one, active: (one) => data.active[one], max: (one) => data.max[one], label };
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

function order() {
  const key = keys[sorted.column];
  const sign = sorted.down ? -1 : 1;
  const features = Array.from(texts.keys());
  if (sorted.column !== "label") return features.sort((a, b) => sign * (key(a) - key(b)) || a - b);
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  return features.sort((a, b) => (!label(a) - !label(b)) || sign * compare(label(a), label(b)) || a - b);
}

function choose() {
  const words = form.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const dead = form.dead.checked;
  shown = ordered.filter((feature) =>
    (dead || data.active[feature]) && words.every((word) => texts[feature].includes(word)));
  first = 0;
  draw();
}

function line(feature) {
  const row = document.createElement("tr");
  const number = make("td", row, "", "number");
  if (linked.has(feature)) make("a", number, feature).href = `feature-${feature}.html`;
  else number.textContent = feature;
  const share = (100 * data.active[feature]) / Math.max(1, data.rows);
  const active = make("td", row, `${data.active[feature].toLocaleString("en")} `, "number");
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
    ? `${(first + 1).toLocaleString("en")} to ${(first + part.length).toLocaleString("en")} of ${shown.length.toLocaleString("en")} features`
    : "no feature has these words";
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
