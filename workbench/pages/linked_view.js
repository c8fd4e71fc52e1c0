"use strict";
// Linked views of a store. Text of models only ever enters the page as textContent; answers come from the same address.
const find = (selector) => document.querySelector(selector);
const controls = find("#controls");
const list = find("#tokens");
const note = find("#note");
let about;
let blocks = [];  // the sequences in the list, one after another
let focus = 0, anchor = 0;  // rows
let shows = 0;  // how often the list was begun anew
let full = 1;  // the value of full colour, the same for all sequences
let explained = null;  // the row whose lens, features and neighbours are shown
const selected = new Set();
const AHEAD = 2;  // heights of the list that are filled beyond what is seen, on either side

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
const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
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
  find("#about").textContent = `${about.name}, ${about.model}; ${counted(about.rows, "token")} in ${counted(about.sequences, "sequence")}`
    + about.features.map(([name, count]) => `; ${counted(count, "feature")} ${name}`).join("");
  controls.sequence.max = about.sequences - 1;
  choices(controls.site, about.norms);
  about.features.forEach(([name], at) => { make("option", controls.features, name).value = at; });
  controls.features.closest("label").hidden = about.features.length < 2;
  layers();
  if (!about.features.length) controls.querySelector("option[value=feature]").remove();
  if (!about.sites.pattern) controls.querySelector("option[value=head]").remove();
  find("#features").hidden = !about.features.length;
  const text = show(0);
  attempt(find("#sinks .note"), sinks);
  await text;
}

function layers() {
  const kind = controls.colour.value === "head" ? "pattern" : site();
  choices(controls.layer, about.sites[kind] ?? []);
  controls.feature.max = (about.features[number("features")]?.[1] ?? 1) - 1;
  for (const name of ["site", "layer", "head", "feature"]) {
    const used = { norm: ["site", "layer"], head: ["layer", "head"], feature: ["feature"] }[controls.colour.value];
    controls[name].closest("label").hidden = !used.includes(name);
  }
}

const holds = (block, row) => row >= block.first && row < block.first + block.texts.length;
const blockOf = (row) => blocks.find((block) => holds(block, row));
const place = (row) => { const block = blockOf(row); return block?.tokens[row - block.first]; };

async function show(sequence, row = null) {
  const mine = ++shows;
  await attempt(note, async () => {
    const block = await blockAt(sequence);
    if (mine !== shows) return;
    note.textContent = "";
    focus = anchor = row !== null && holds(block, row) ? row : block.first;
    blocks = [block];
    list.replaceChildren(block.element);
    list.scrollTop = 0;
    controls.sequence.value = sequence;
    await colour();
    if (focus === row) place(row).focus();
    else if (row !== null) note.textContent = `row ${row} lies beyond the tokens of its sequence that are shown`;
    await fill();
  });
}

// A sequence with its tokens drawn, without colours.
async function blockAt(sequence) {
  const block = { ...await ask("sequence", { number: sequence }), values: [], pattern: null, tokens: [] };
  block.element = make("div", null, "", "sequence");
  block.element.setAttribute("role", "group");
  block.element.setAttribute("aria-label", `sequence ${sequence}`);
  block.element.dataset.name = sequence;
  if (block.left_out) block.element.dataset.left = `not shown: ${counted(block.left_out, "more token")} of this sequence`;
  let run = null;
  block.texts.forEach((word, at) => {
    const backward = rtl.test(word);
    if (backward && !run) { run = make("bdi", block.element); run.dir = "rtl"; }
    if (!backward && run && /\p{L}/u.test(word)) run = null;
    const token = make("span", run ?? block.element, word, "token");
    token.setAttribute("role", "option");
    token.dataset.row = block.first + at;
    block.tokens.push(token);
    if (block.ends[at]) { run = null; make("br", block.element); }
  });
  return block;
}

async function readValues(block) {
  const kind = controls.colour.value, which = { number: block.sequence };
  block.pattern = null;
  block.values = [];
  block.full = 0;
  if (kind === "feature") Object.assign(block, await ask("feature", { ...which, folder: number("features"), feature: number("feature") }));
  else if (kind === "norm" && site()) Object.assign(block, await ask("norms", { ...which, site: site(), layer: number("layer") }));
  else if (kind === "head" && holds(block, focus)) {
    block.pattern = (await ask("head", { ...which, layer: number("layer"), head: number("head") })).pattern;
    block.values = block.pattern[focus - block.first] ?? [];
  }
}

async function colour() {
  layers();
  await attempt(note, async () => {
    await Promise.all(blocks.map(readValues));
    note.textContent = "";
    paint();
  });
}

// Sequences are added before the list is scrolled to them, and those far away are removed: a store of any length scrolls.
let filling = null;
const fill = () => (filling ??= attempt(note, fillOnce).finally(() => { filling = null; }));

async function fillOnce() {
  for (;;) {
    const room = AHEAD * list.clientHeight, above = list.scrollTop, below = list.scrollHeight - above - list.clientHeight;
    const last = blocks.at(-1).sequence, first = blocks[0].sequence;
    const next = below < room && last + 1 < about.sequences ? last + 1 : above < room && first > 0 ? first - 1 : null;
    if (next === null) break;
    const mine = shows, block = await blockAt(next);
    await readValues(block);
    if (mine !== shows) continue;
    if (next > last) { blocks.push(block); list.append(block.element); }
    else { blocks.unshift(block); keepPlace(() => list.prepend(block.element)); }
    paint([block]);
  }
  const far = 2 * AHEAD * list.clientHeight;
  while (blocks.length > 1 && list.scrollTop - blocks[0].element.offsetHeight > far) { const block = blocks.shift(); keepPlace(() => block.element.remove()); }
  while (blocks.length > 1 && list.scrollHeight - blocks.at(-1).element.offsetHeight - list.scrollTop - list.clientHeight > far) blocks.pop().element.remove();
  if (!blockOf(focus)) { focus = anchor = seen().first; paint([seen()]); }
}

// What is seen stays where it is while something changes above it.
function keepPlace(change) {
  const height = list.scrollHeight, top = list.scrollTop;
  change();
  list.scrollTop = top + list.scrollHeight - height;
}

// The first sequence that is seen.
function seen() {
  const top = list.getBoundingClientRect().top + 8;
  return blocks.find((block) => block.element.getBoundingClientRect().bottom > top) ?? blocks.at(-1);
}

// Full colour is a number of the store for norms and features; for attention it is the largest weight of the query.
const SCALES = { norm: " and above", feature: ", its largest activation", head: ", the query's largest" };
function paint(changed = blocks) {
  const query = blocks.find((block) => block.pattern && holds(block, focus));
  const now = (query ? largest(query.values) : blocks.find((block) => block.full)?.full) || 1;
  for (const block of now === full ? changed : blocks) paintTokens(block, now);
  full = now;
  find("#scale output").textContent = `0 to ${short(full)}${SCALES[controls.colour.value]}`;
}

const largest = (values) => values.reduce((most, value) => Math.max(most, value), 0);

function paintTokens(block, most) {
  block.tokens.forEach((token, at) => {
    const value = block.values[at] ?? null, row = block.first + at;
    token.style.setProperty("--a", value === null ? 0 : (0.75 * Math.min(1, Math.max(0, value) / most)).toFixed(3));
    token.title = `row ${row}, position ${block.positions[at]}` + (value === null ? "" : `: ${short(value)}`);
    token.setAttribute("aria-selected", selected.has(row));
    token.classList.toggle("query", block.pattern !== null && row === focus);
    token.tabIndex = row === focus ? 0 : -1;
  });
}

// The selected rows as a query; runs of rows as their ends.
function showSelection() {
  const rows = [...selected].sort((a, b) => a - b), single = [], parts = [];
  for (let at = 0, end; at < rows.length; at = end) {
    for (end = at + 1; rows[end] === rows[end - 1] + 1;) end++;
    if (end - at < 3) single.push(...rows.slice(at, end));
    else parts.push(`row BETWEEN ${rows[at]} AND ${rows[end - 1]}`);
  }
  if (single.length) parts.unshift(`row IN (${single.join(", ")})`);
  find("#selection").hidden = rows.length === 0;
  find("[name=sql]").value = parts.join(" OR ");
  find("[name=python]").value = `wb.open_store(${JSON.stringify(about.path)}).where("${parts.join(" OR ")}")`;
}

async function sinks() {
  const answer = await ask("sinks");
  const table = find("#sinks table");
  find("#sinks .note").textContent = answer.layers.length
    ? `mean over ${counted(answer.rows, "later token")}; columns are heads; a cell shows its head over the text` : "record attn_first or pattern to see it";
  find("#sinks .key").hidden = !answer.layers.length;
  if (!answer.layers.length) return;
  const numbers = make("tr", table);
  make("th", numbers, "layer").scope = "col";
  for (let head = 0; head < Math.max(0, ...answer.values.map((heads) => heads.length)); head++) make("th", numbers, head).scope = "col";
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
        const block = blockOf(focus);
        if (focus === block.first) focus = anchor = block.first + block.texts.length - 1;
        colour();
      });
    });
  });
}

function explain(row) {
  explained = row;
  attempt(find("#lens .note"), () => lens(row));
  if (about.features.length) attempt(find("#features .note"), () => active(row));
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
  const folder = number("features"), answer = await ask("active", { folder, row });
  find("#features .note").textContent = answer.features.length ? `active on row ${row}; full is its largest activation` : `none is active on row ${row}`;
  find("#features ol").replaceChildren(...answer.features.map(([feature, value, full, name]) => {
    const line = make("li", null);
    const card = make("button", line, `${feature}`);
    card.type = "button";
    card.addEventListener("click", () => {
      find("dialog iframe").src = `card?folder=${folder}&feature=${feature}`;
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
  find("#neighbours .note").textContent = `cosine similarity at ${site()}.${number("layer")}, among ${counted(answer.searched, "token")}`;
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

// The row some tokens further on, over the ends of sequences.
function stepped(row, steps) {
  let at = blocks.indexOf(blockOf(row)), index = row - blocks[at].first + steps;
  while (index < 0 && at > 0) index += blocks[--at].texts.length;
  while (index >= blocks[at].texts.length && at + 1 < blocks.length) index -= blocks[at++].texts.length;
  return blocks[at].first + Math.max(0, Math.min(blocks[at].texts.length - 1, index));
}

function move(row) {
  const old = blockOf(focus), now = blockOf(row);
  focus = row;
  if (now.pattern) now.values = now.pattern[row - now.first] ?? [];
  if (old !== now && controls.colour.value === "head") colour();
  else paint(old === now ? [now] : [old, now]);
  place(row).focus();
}

function toggle(row, range) {
  const [low, high] = range ? [Math.min(anchor, row), Math.max(anchor, row)] : [row, row];
  const add = range || !selected.has(row);
  for (let one = low; one <= high; one++) selected[add ? "add" : "delete"](one);
  anchor = row;
  paint();
  showSelection();
  explain(row);
}

function clear() {
  selected.clear();
  paint();
  showSelection();
}

list.addEventListener("click", (event) => {
  const token = event.target.closest(".token");
  if (token) { move(Number(token.dataset.row)); toggle(focus, event.shiftKey); }
});
list.addEventListener("keydown", (event) => {
  const block = blockOf(focus), steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
  if (event.key in steps) move(stepped(focus, steps[event.key]));
  else if (event.key === "Home") move(block.first);
  else if (event.key === "End") move(block.first + block.texts.length - 1);
  else if (event.key === " " || event.key === "Enter") toggle(focus, event.shiftKey);
  else if (event.key === "Escape") clear();
  else return;
  event.preventDefault();
});
let scrolled = false;
list.addEventListener("scroll", () => {
  if (scrolled) return;
  scrolled = true;
  requestAnimationFrame(() => {
    scrolled = false;
    if (!blocks.length) return;
    if (document.activeElement !== controls.sequence) controls.sequence.value = seen().sequence;
    fill();
  });
}, { passive: true });
const turn = (step) => show(Math.max(0, Math.min(about.sequences - 1, number("sequence") + step)));
controls.back.addEventListener("click", () => turn(-1));
controls.on.addEventListener("click", () => turn(1));
controls.addEventListener("submit", (event) => event.preventDefault());
controls.addEventListener("change", (event) => {
  if (event.target.name === "sequence") return turn(0);
  if (event.target.name === "features" && explained !== null) attempt(find("#features .note"), () => active(explained));
  return colour();
});
find("[name=clear]").addEventListener("click", clear);
for (const name of ["sql", "python"]) find(`[name=${name}]`).addEventListener("focus", (event) => event.target.select());
attempt(note, begin);
