"use strict";
// Linked views of a store. Text of models only ever enters the page as textContent; answers come from the same address.
const find = (selector) => document.querySelector(selector);
const controls = find("#controls");
const list = find("#tokens");
const note = find("#note");
let about, text, values = [], pattern = null, focus = 0, anchor = 0;
const selected = new Set();

async function ask(name, parameters = {}) {
  const answer = await fetch(`${name}?${new URLSearchParams(parameters)}`);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function make(tag, parent, content = "", kind = "") {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.textContent = content;
  parent?.append(element);
  return element;
}

const short = (value) => (value === null ? "none" : String(Number(value.toPrecision(4))));
const number = (name) => Number(controls[name].value);
const site = () => controls.site.value;
const rtl = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;

// A problem is shown where the answer would be; later questions go on.
async function attempt(place, work) {
  try {
    await work();
  } catch (error) {
    place.textContent = error.message;
  }
}

function choices(select, names) {
  const kept = select.value;
  select.replaceChildren();
  for (const name of names) make("option", select, name).value = name;
  if (names.map(String).includes(kept)) select.value = kept;
}

async function begin() {
  about = await ask("about");
  document.title = `${about.name}: linked views`;
  find("#about").textContent = `${about.name}, ${about.model}; ${about.rows.toLocaleString("en")} tokens in ${about.sequences.toLocaleString("en")} sequences`
    + (about.features ? `; ${about.features.toLocaleString("en")} features` : "");
  controls.sequence.max = about.sequences - 1;
  choices(controls.site, about.norms);
  layers();
  if (!about.features) controls.querySelector("option[value=feature]").remove();
  if (!about.sites.pattern) controls.querySelector("option[value=head]").remove();
  await show(0);
  attempt(find("#sinks .note"), sinks);
}

function layers() {
  const kind = controls.colour.value === "head" ? "pattern" : site();
  choices(controls.layer, about.sites[kind] ?? []);
  for (const name of ["site", "layer", "head", "feature"]) {
    const used = { norm: ["site", "layer"], head: ["layer", "head"], feature: ["feature"] }[controls.colour.value];
    controls[name].closest("label").hidden = !used.includes(name);
  }
}

async function show(sequence, row = null) {
  await attempt(note, async () => {
    text = await ask("sequence", { number: sequence });
    controls.sequence.value = sequence;
    focus = anchor = row === null ? 0 : row - text.first;
    list.replaceChildren();
    let run = null;
    text.texts.forEach((word, at) => {
      const backward = rtl.test(word);
      if (backward && !run) { run = make("bdi", list); run.dir = "rtl"; }
      if (!backward && run && /\p{L}/u.test(word)) run = null;
      const token = make("span", run ?? list, word.replace(/·/g, " "), "token");
      token.setAttribute("role", "option");
      token.dataset.at = at;
      if (text.ends[at]) { run = null; make("br", list); }
    });
    note.textContent = text.left_out ? `${text.left_out.toLocaleString("en")} more tokens of this sequence are not shown` : "";
    await colour();
    if (row !== null) place(focus)?.focus();
  });
}

const tokens = () => [...list.querySelectorAll(".token")];
const place = (at) => list.querySelector(`.token[data-at="${at}"]`);

async function colour() {
  layers();
  await attempt(note, async () => {
    const kind = controls.colour.value;
    pattern = null;
    if (kind === "head") {
      pattern = (await ask("head", { number: text.sequence, layer: number("layer"), head: number("head") })).pattern;
      values = pattern[Math.min(focus, pattern.length - 1)] ?? [];
    } else if (kind === "feature") values = (await ask("feature", { number: text.sequence, feature: number("feature") })).values;
    else values = site() ? (await ask("norms", { number: text.sequence, site: site(), layer: number("layer") })).values : [];
    paint();
  });
}

// Full colour: the largest value but for the first token, whose norm or attention would bleach all others.
function paint() {
  const finite = values.slice(1).filter((value) => value !== null);
  const full = Math.max(...finite, 0) || Math.max(values[0] ?? 0, 0) || 1;
  const beyond = values.filter((value) => value > full).length;
  tokens().forEach((token, at) => {
    const value = values[at] ?? null;
    token.style.setProperty("--a", value === null ? 0 : (0.75 * Math.min(1, Math.max(0, value) / full)).toFixed(3));
    token.title = `row ${text.first + at}, position ${text.positions[at]}` + (value === null ? "" : `: ${short(value)}`);
    token.setAttribute("aria-selected", selected.has(text.first + at));
    token.classList.toggle("query", pattern !== null && at === focus);
    token.tabIndex = at === focus ? 0 : -1;
  });
  find("#scale output").textContent = `0 to ${short(full)}` + (beyond ? `; ${beyond} beyond` : "");
  const rows = [...selected].sort((a, b) => a - b);
  find("#selection").hidden = rows.length === 0;
  const sql = `row IN (${rows.join(", ")})`;
  find("[name=sql]").value = sql;
  find("[name=python]").value = `wb.open_store(${JSON.stringify(about.path)}).where("${sql}")`;
}

async function sinks() {
  const answer = await ask("sinks");
  const table = find("#sinks table");
  find("#sinks .note").textContent = answer.layers.length
    ? `mean over ${answer.rows.toLocaleString("en")} later tokens; a cell shows its head over the text` : "record attn_first or pattern to see it";
  answer.layers.map((layer, at) => [layer, answer.values[at]]).reverse().forEach(([layer, heads]) => {
    const line = make("tr", table);
    make("th", line, layer).scope = "row";
    heads.forEach((value, head) => {
      const button = make("button", make("td", line));
      button.type = "button";
      button.style.setProperty("--a", (0.85 * (value ?? 0)).toFixed(3));
      button.title = `L${layer}H${head}: ${short(value)}`;
      button.setAttribute("aria-label", button.title);
      button.addEventListener("click", () => {
        table.querySelectorAll("[aria-pressed=true]").forEach((other) => other.removeAttribute("aria-pressed"));
        button.setAttribute("aria-pressed", "true");
        if (!about.sites.pattern?.includes(layer)) { note.textContent = `pattern.${layer} was not recorded`; return; }
        controls.colour.value = "head";
        layers();
        controls.layer.value = layer;
        controls.head.value = head;
        if (focus === 0) focus = tokens().length - 1;
        colour();
      });
    });
  });
}

function explain(at) {
  const row = text.first + at;
  attempt(find("#lens .note"), () => lens(row));
  if (about.features) attempt(find("#features .note"), () => active(row));
  if (site()) attempt(find("#neighbours .note"), () => neighbours(row));
}

async function lens(row) {
  const table = find("#lens table");
  table.replaceChildren();
  if (!about.sites.resid_post) { find("#lens .note").textContent = "record resid_post to see it"; return; }
  const answer = await ask("lens", { row });
  find("#lens .note").textContent = `row ${row}: the five most probable tokens at each layer`;
  answer.layers.map((layer, at) => [layer, at]).reverse().forEach(([layer, at]) => {
    const line = make("tr", table);
    make("th", line, layer).scope = "row";
    answer.tokens[at].forEach((token, rank) => {
      const cell = make("td", line, `${token} ${short(answer.probabilities[at][rank])}`);
      cell.style.setProperty("--a", (0.75 * answer.probabilities[at][rank]).toFixed(3));
    });
  });
}

async function active(row) {
  const answer = await ask("active", { row });
  find("#features .note").textContent = answer.features.length ? `active on row ${row}; full is its largest activation` : `none is active on row ${row}`;
  find("#features ol").replaceChildren(...answer.features.map(([feature, value, full, name]) => {
    const line = make("li", null);
    const card = make("button", line, `${feature}`);
    card.type = "button";
    card.addEventListener("click", () => {
      find("dialog iframe").src = `card?feature=${feature}`;
      find("dialog").showModal();
    });
    const over = make("button", line, "over the text");
    over.type = "button";
    over.addEventListener("click", () => { controls.colour.value = "feature"; controls.feature.value = feature; colour(); });
    make("span", line, `${short(value)} of ${short(full)} ${name}`);
    return line;
  }));
}

async function neighbours(row) {
  const answer = await ask("neighbours", { row, site: site(), layer: number("layer") });
  find("#neighbours .note").textContent = `cosine similarity at ${site()}.${number("layer")}, among ${answer.searched.toLocaleString("en")} tokens`;
  find("#neighbours ol").replaceChildren(...answer.neighbours.map(([other, sequence, value, before, word, after]) => {
    const line = make("li", null);
    const go = make("button", line, short(value));
    go.type = "button";
    go.title = `row ${other}, sequence ${sequence}`;
    go.addEventListener("click", () => show(sequence, other));
    make("span", line, before);
    make("mark", line, word);
    make("span", line, after);
    return line;
  }));
}

function move(at) {
  focus = Math.max(0, Math.min(text.texts.length - 1, at));
  if (pattern) values = pattern[focus] ?? [];
  paint();
  place(focus)?.focus();
}

function toggle(at, range) {
  const ends = range ? [Math.min(anchor, at), Math.max(anchor, at)] : [at, at];
  const add = range || !selected.has(text.first + at);
  for (let one = ends[0]; one <= ends[1]; one++) selected[add ? "add" : "delete"](text.first + one);
  anchor = at;
  paint();
  explain(at);
}

list.addEventListener("click", (event) => {
  const token = event.target.closest(".token");
  if (token) { move(Number(token.dataset.at)); toggle(focus, event.shiftKey); }
});
list.addEventListener("keydown", (event) => {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
  if (event.key in steps) move(focus + steps[event.key]);
  else if (event.key === " " || event.key === "Enter") toggle(focus, event.shiftKey);
  else if (event.key === "Escape") { selected.clear(); paint(); }
  else return;
  event.preventDefault();
});
const turn = (step) => show(Math.max(0, Math.min(about.sequences - 1, number("sequence") + step)));
controls.back.addEventListener("click", () => turn(-1));
controls.on.addEventListener("click", () => turn(1));
controls.addEventListener("submit", (event) => event.preventDefault());
controls.addEventListener("change", (event) => (event.target.name === "sequence" ? turn(0) : colour()));
find("[name=clear]").addEventListener("click", () => { selected.clear(); paint(); });
for (const name of ["sql", "python"]) find(`[name=${name}]`).addEventListener("focus", (event) => event.target.select());
attempt(note, begin);
