// Front end of workbench.TokenView. Text of models only ever enters the page as textContent.

const FILL = 0.65, WEAKEST = 0.35, UNDERLINE = 4; // as in token_picture.py
const ABOVE = "230 125 15", BELOW = "30 120 200";

function make(tag, name, parent, text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.textContent = text;
  parent?.append(element);
  return element;
}

function press(name, parent, text, does, title = "") {
  const button = make("button", name, parent, text);
  button.type = "button";
  if (title) { button.title = title; button.setAttribute("aria-label", title); }
  button.addEventListener("click", does);
  return button;
}

function numbers(view, Kind) {
  return new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

const short = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(4))) : "none");
const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

function set(model, state) {
  for (const [name, value] of Object.entries(state)) model.set(name, value);
  model.save_changes();
}

// ---- what is shown -----------------------------------------------------------------------------------------

const byFeature = (model) => model.get("colour") === "feature";

function named(model, feature) {
  const name = model.get("feature_names")[feature];
  return name ? `feature ${feature}: ${name}` : `feature ${feature}`;
}

// Values of the tokens, their name, and the value of full colour, as Colouring in token_picture.py.
function activations(model, data, feature) {
  const values = new Float32Array(data.texts.length);
  data.entries.feature.forEach((other, at) => {
    if (other === feature) values[data.entries.token[at]] = data.entries.value[at];
  });
  return { name: named(model, feature), values, full: model.get("feature_scales")[feature] ?? 0 };
}

function colouring(model, data) {
  if (byFeature(model)) return activations(model, data, model.get("feature"));
  const length = data.texts.length, layer = model.get("layer"), number = model.get("layers")[layer];
  const name = model.get("measure") + (number ? `, layer ${number}` : "");
  return { name, values: data.values.subarray(layer * length, (layer + 1) * length), full: model.get("scales")[layer] ?? 0 };
}

function beyond({ values, full }) {
  const tokens = values.reduce((sum, value) => sum + (Number.isFinite(value) && Math.abs(value) > full), 0);
  return tokens ? `, ${count(tokens, "token")} beyond` : "";
}

const fillStrength = (value, full) => (full && Number.isFinite(value) ? FILL * Math.min(1, Math.abs(value) / full) : 0);
const underlineStrength = (value, full) => (full && value > 0 ? WEAKEST + (1 - WEAKEST) * Math.min(1, value / full) : 0);
const alpha = (hue, strength) => `rgb(${[1, 3, 5].map((at) => parseInt(hue.slice(at, at + 2), 16)).join(" ")} / ${strength.toFixed(3)})`;

// Underlines are images of the border below a token, which the token's own colour does not fill.
function underline(token, index, lines) {
  const { style } = token, images = [], places = [];
  lines.forEach(({ values, full, hue }, line) => {
    const strength = underlineStrength(values[index], full);
    if (!strength) return;
    images.push(`linear-gradient(${alpha(hue, strength)} 0 0)`);
    places.push(`left 0 bottom ${UNDERLINE * (lines.length - 1 - line)}px`);
  });
  style.borderBottomWidth = `${UNDERLINE * lines.length}px`;
  style.backgroundImage = [...images, "none"].join(", ");
  style.backgroundPosition = [...places, "0 0"].join(", ");
  style.backgroundClip = [...images.map(() => "border-box"), "padding-box"].join(", ");
}

// Numbers of the pinned selections by row.
function pinNumbers(model) {
  const pins = new Map();
  model.get("pinned").forEach((rows, at) => rows.forEach((row) => pins.set(row, [...(pins.get(row) ?? []), at + 1])));
  return pins;
}

// Rows in words; runs of rows as their ends.
function ranges(rows) {
  const parts = [];
  for (let at = 0, end; at < rows.length; at = end) {
    for (end = at + 1; rows[end] === rows[end - 1] + 1;) end += 1;
    parts.push(end - at > 1 ? `${rows[at]} to ${rows[end - 1]}` : `${rows[at]}`);
  }
  return parts.length > 6 ? `${parts.slice(0, 6).join(", ")}, …` : parts.join(", ");
}

// ---- controls ----------------------------------------------------------------------------------------------

function slider(model, root, trait, amount, format) {
  const label = make("label", "control", root);
  make("span", "", label, trait);
  const range = make("input", "", label);
  Object.assign(range, { type: "range", min: 0, step: 1, name: trait });
  const output = format && make("output", "", label);
  range.addEventListener("input", () => set(model, { [trait]: range.valueAsNumber }));
  return () => {
    const last = amount() - 1;
    label.hidden = last < 1;
    range.max = Math.max(0, last);
    range.value = model.get(trait);
    if (output) output.textContent = format(model.get(trait));
    range.setAttribute("aria-valuetext", format ? output.textContent : model.get(trait));
  };
}

// A number that is typed. One that does not exist is reported and put back.
function numberBox(model, root, trait, amount, report, chosen = {}) {
  const box = make("input", "number", root);
  Object.assign(box, { type: "number", min: 0, step: 1, name: `${trait}_number`, inputMode: "numeric" });
  box.setAttribute("aria-label", `${trait} number`);
  box.addEventListener("change", () => {
    const value = box.valueAsNumber;
    if (Number.isInteger(value) && value >= 0 && value < amount()) return set(model, { ...chosen, [trait]: value });
    report(`${trait} ${box.value || "without a number"} does not exist; there are ${amount()}: 0 to ${amount() - 1}`);
    box.value = model.get(trait);
  });
  return () => {
    box.hidden = amount() < 2;
    box.max = Math.max(0, amount() - 1);
    box.value = model.get(trait);
  };
}

function colourChoice(model, root) {
  const label = make("label", "control", root);
  make("span", "", label, "colour");
  const select = make("select", "", label);
  select.name = "colour";
  for (const name of ["values", "feature"]) make("option", "", select, name).value = name;
  select.addEventListener("change", () => set(model, { colour: select.value }));
  return () => {
    label.hidden = !(model.get("layers").length && model.get("features"));
    select.value = model.get("colour");
  };
}

function addUnderline(model, feature, report) {
  const lines = model.get("underlined");
  if (lines.includes(feature)) return report(`feature ${feature} is underlined`);
  if (lines.length >= model.get("hues").length) return report(`${lines.length} features are underlined; remove one first`);
  return set(model, { underlined: [...lines, feature] });
}

// Number box, search box and the list of the features found. Python searches.
function featureChoice(model, controls, results, report) {
  const group = make("span", "control", controls);
  make("span", "", group, "feature");
  const refresh = numberBox(model, group, "feature", () => model.get("features"), report, { colour: "feature" });
  press("", group, "underline", () => addUnderline(model, model.get("feature"), report),
    "underline this feature, to see it together with others");
  const label = make("label", "control", controls);
  make("span", "", label, "search");
  const search = make("input", "", label);
  Object.assign(search, { type: "search", name: "search", placeholder: "number, label or token" });
  let timer = null;
  const ask = (words) => { clearTimeout(timer); if (words !== model.get("search")) set(model, { search: words }); };
  search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => ask(search.value), 200); });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { search.value = ""; ask(""); }
    else if (event.key === "Enter" && search.value === model.get("search")) results.querySelector("button")?.click();
    else if (event.key === "Enter") ask(search.value);
    else if (event.key === "ArrowDown") results.querySelector("button")?.focus();
    else return;
    event.preventDefault();
  });
  const show = () => showFound(model, results, report);
  const refreshAll = () => {
    refresh();
    group.hidden = label.hidden = !model.get("features");
    if (document.activeElement !== search) search.value = model.get("search");
  };
  return { show, refresh: refreshAll };
}

function showFound(model, results, report) {
  const found = model.get("found"), all = model.get("found_count");
  results.hidden = !model.get("search").trim();
  const list = make("ul", "", null);
  for (const { feature, name, tokens } of found) {
    const line = make("li", "", list);
    const choose = press("choose", line, "", () => set(model, { colour: "feature", feature }), `colour by feature ${feature}`);
    choose.removeAttribute("aria-label"); // its text says more
    make("b", "", choose, feature);
    if (name) make("span", "", choose, name);
    for (const token of tokens) make("code", "", choose, token);
    press("", line, "underline", () => addUnderline(model, feature, report), `underline feature ${feature}`);
  }
  const status = all > found.length ? `${found.length} of ${count(all, "feature")}` : all ? count(all, "feature") : "no feature has these words";
  results.replaceChildren(list, make("span", "remark", null, status));
}

// ---- key and pinned selections -----------------------------------------------------------------------------

function bar(parent, kind, colours, ends) {
  const box = make("span", `bar ${kind}`, parent);
  make("span", "colours", box).style.background = `linear-gradient(to right, ${colours.join(", ")})`;
  const line = make("span", "ends", box);
  ends.forEach((end) => make("span", "", line, short(end)));
}

function showKey(model, key, fill, lines) {
  const first = make("div", "", null);
  make("span", "", first, fill.name);
  const signed = fill.values.some((value) => value < 0), { full } = fill;
  const above = [`rgb(${ABOVE} / 0)`, `rgb(${ABOVE} / ${FILL})`];
  bar(first, "fill", signed ? [`rgb(${BELOW} / ${FILL})`, ...above] : above, signed ? [-full, 0, full] : [0, full / 2, full]);
  make("span", "", first, beyond(fill).slice(2));
  const others = lines.map((line, at) => {
    const part = make("div", "", null);
    make("span", "", part, lines.length > 1 ? `underline ${at + 1}` : "underline");
    bar(part, "line", [alpha(line.hue, WEAKEST), alpha(line.hue, 1)], [0, line.full]);
    make("span", "", part, `${line.name}${beyond(line)}`);
    press("remove", part, "×", () => {
      set(model, { underlined: model.get("underlined").filter((feature) => feature !== line.feature) });
      (key.querySelectorAll("button")[at] ?? [...key.querySelectorAll("button")].at(-1))?.focus();
    }, `do not underline feature ${line.feature}`);
    return part;
  });
  key.replaceChildren(first, ...others);
  if (lines.length > 1) make("div", "remark", key, "underlines are numbered from top to bottom; a token that is active in several features has several");
}

function showPins(model, list) {
  const here = new Set(model.get("rows"));
  list.replaceChildren(...model.get("pinned").map((rows, at) => {
    const line = make("li", "", null);
    const inside = rows.filter((row) => here.has(row)).length;
    const elsewhere = inside < rows.length ? `, ${inside} of them in this sequence` : "";
    make("span", "", line, `pinned ${at + 1}: ${count(rows.length, "row")}, ${ranges(rows)}${elsewhere}`);
    press("", line, "select", () => set(model, { selected: rows }), `select the rows of pinned selection ${at + 1}`);
    press("remove", line, "×", () => {
      set(model, { pinned: model.get("pinned").filter((_, other) => other !== at) });
      list.querySelectorAll(".remove")[Math.min(at, model.get("pinned").length - 1)]?.focus();
    }, `remove pinned selection ${at + 1}`);
    return line;
  }));
}

// ---- the text ----------------------------------------------------------------------------------------------

function read(model) {
  const kinds = { token: Int32Array, feature: Int32Array, value: Float32Array };
  return {
    values: numbers(model.get("values"), Float32Array),
    entries: Object.fromEntries(Object.entries(kinds).map(([name, kind]) => [name, numbers(model.get(`entry_${name}`), kind)])),
    texts: model.get("texts"),
    rows: model.get("rows"),
  };
}

// Returns the elements of the tokens. Runs from right to left are one element, in which the browser orders the tokens.
function layOut(model, data, list) {
  const breaks = new Set(model.get("breaks"));
  const runs = new Map(model.get("backward").map(([first, stop]) => [first, stop]));
  let run = null, stop = 0;
  list.replaceChildren();
  return data.texts.map((text, index) => {
    if (index === stop) run = null;
    if (runs.has(index)) {
      stop = runs.get(index);
      run = make("bdi", "", list);
      run.dir = "rtl";
      run.setAttribute("role", "presentation");
    }
    const token = make("span", "token", run ?? list, text);
    token.setAttribute("role", "option");
    token.dataset.row = data.rows[index];
    if (run) make("wbr", "", run);
    if (breaks.has(index)) make("br", "", list);
    return token;
  });
}

function describe(model, { data, fill, lines, pins }, index, message, buttons) {
  const row = data.rows[index], piece = model.get("pieces")[index], numbersOfPins = pins.get(row);
  message.textContent = [
    `${data.texts[index]}${piece ? `  token ${piece}` : ""}  row ${row}, position ${model.get("positions")[index]}`,
    ...(fill.values.length ? [`${byFeature(model) ? fill.name : model.get("measure")}: ${short(fill.values[index])}`] : []),
    ...lines.filter(({ name }) => name !== fill.name).map(({ name, values }) => `${name}: ${short(values[index])}`),
    ...(numbersOfPins ? [`pinned ${numbersOfPins.join(", ")}`] : []),
  ].join(", ");
  const active = [];
  data.entries.token.forEach((token, at) => { if (token === index) active.push(at); });
  active.sort((a, b) => data.entries.value[b] - data.entries.value[a]);
  buttons.replaceChildren(...active.slice(0, 5).map((at) => {
    const feature = data.entries.feature[at];
    const text = `${feature}: ${short(data.entries.value[at])}`;
    return press("", null, text, () => set(model, { colour: "feature", feature }), `colour by ${named(model, feature)}`);
  }));
}

// Selection by mouse, touch and keyboard.
function selection(model, list, view, tools) {
  const range = press("", tools, "select a range", () => pressed(range.getAttribute("aria-pressed") !== "true"),
    "the next token chosen ends a range that begins at the last one");
  const pressed = (value) => range.setAttribute("aria-pressed", value);
  pressed(false);
  const clear = () => set(model, { selected: [] });
  press("clear", tools, "clear", clear, "clear the selection");
  press("pin", tools, "pin", () => {
    set(model, { pinned: [...model.get("pinned"), model.get("selected")], selected: [] });
    view.tokens[view.focus].focus();
  }, "keep this selection marked while another is made");

  function toggle(index, extend) {
    const { rows } = view.data, selected = new Set(model.get("selected"));
    if (extend) for (let at = Math.min(view.anchor, index); at <= Math.max(view.anchor, index); at += 1) selected.add(rows[at]);
    else if (!selected.delete(rows[index])) selected.add(rows[index]);
    view.anchor = index;
    pressed(false);
    set(model, { selected: [...selected].sort((a, b) => a - b) });
  }
  function move(index) {
    view.focus = Math.max(0, Math.min(view.tokens.length - 1, index));
    view.tokens.forEach((token, at) => { token.tabIndex = at === view.focus ? 0 : -1; });
    view.tokens[view.focus]?.focus();
  }
  const extends_ = (event) => event.shiftKey || range.getAttribute("aria-pressed") === "true";
  const place = (event) => view.tokens.indexOf(event.target.closest(".token"));
  list.addEventListener("pointerover", (event) => { if (place(event) >= 0) view.describe(place(event)); });
  list.addEventListener("focusin", (event) => { if (place(event) >= 0) { view.focus = place(event); view.describe(view.focus); } });
  list.addEventListener("click", (event) => { const index = place(event); if (index >= 0) { move(index); toggle(index, extends_(event)); } });
  list.addEventListener("keydown", (event) => {
    const forward = event.target.closest("bdi") ? -1 : 1; // an arrow goes where it points
    const steps = { ArrowRight: forward, ArrowLeft: -forward, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
    if (event.key in steps) move(view.focus + steps[event.key]);
    else if (event.key === " " || event.key === "Enter") toggle(view.focus, extends_(event));
    else if (event.key === "Escape") clear();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
}

function paintTokens(model, view) {
  const selected = new Set(model.get("selected")), { rows } = view.data, { fill, lines, pins } = view;
  view.tokens.forEach((token, index) => {
    const value = fill.values[index], strength = fillStrength(value, fill.full), numbersOfPins = pins.get(rows[index]);
    token.style.backgroundColor = strength ? `rgb(${value < 0 ? BELOW : ABOVE} / ${strength.toFixed(3)})` : "";
    underline(token, index, lines);
    token.setAttribute("aria-selected", selected.has(rows[index]));
    if (numbersOfPins) token.dataset.pins = numbersOfPins.join(",");
    else delete token.dataset.pins;
    token.tabIndex = index === view.focus ? 0 : -1;
  });
}

function render({ model, el }) {
  const root = make("div", "workbench-tokens", el);
  root.setAttribute("data-lm-suppress-shortcuts", "true"); // otherwise JupyterLab's arrow keys move through the cells
  root.addEventListener("keydown", (event) => event.stopPropagation()); // and its notebook takes the focus away
  const [controls, results, key, list, status, tools] = ["controls", "results", "key", "tokens", "status", "tools"].map((name) => make("div", name, root));
  const message = make("span", "", status), buttons = make("span", "features", status);
  const pinned = make("ul", "pins", root), foot = make("div", "foot", root);
  message.setAttribute("role", "status");
  for (const [name, value] of [["role", "listbox"], ["aria-multiselectable", "true"], ["aria-label", "tokens"]]) list.setAttribute(name, value);

  const view = { tokens: [], data: null, focus: 0, anchor: 0 };
  const report = (text) => { message.textContent = text; buttons.replaceChildren(); };
  view.describe = (index) => describe(model, view, index, message, buttons);
  const refreshers = [colourChoice(model, controls)];
  const sequence = make("span", "control", controls), sequences = () => model.get("sequences");
  refreshers.push(slider(model, sequence, "sequence", sequences), numberBox(model, sequence, "sequence", sequences, report));
  refreshers.push(slider(model, controls, "layer", () => (byFeature(model) ? 0 : model.get("layers").length), (layer) => model.get("layers")[layer] ?? ""));
  const features = featureChoice(model, controls, results, report);
  selection(model, list, view, tools);

  const paint = () => {
    [...refreshers, features.refresh].forEach((refresh) => refresh());
    sequence.hidden = sequences() < 2;
    view.fill = colouring(model, view.data);
    view.lines = model.get("underlined").map((feature, at) => ({ ...activations(model, view.data, feature), feature, hue: model.get("hues")[at] }));
    view.pins = pinNumbers(model);
    list.classList.toggle("underlined", view.lines.length > 0);
    paintTokens(model, view);
    showKey(model, key, view.fill, view.lines);
    showPins(model, pinned);
    const { length } = model.get("selected");
    tools.querySelectorAll(".clear, .pin").forEach((button) => { button.disabled = !length; });
    foot.textContent = `${view.fill.name}: full colour at ${short(view.fill.full)}${beyond(view.fill)}; ${length} selected`
      + (model.get("note") ? `; ${model.get("note")}` : "");
  };
  const reload = () => {
    view.data = read(model);
    view.tokens = layOut(model, view.data, list);
    view.focus = view.anchor = 0;
    report("");
    paint();
  };
  const handlers = [["loaded", reload], ...["found", "found_count", "search"].map((name) => [name, features.show])];
  handlers.push(...["layer", "feature", "colour", "selected", "underlined", "pinned"].map((name) => [name, paint]));
  handlers.forEach(([name, handler]) => model.on(`change:${name}`, handler));
  reload();
  features.show();
  return () => handlers.forEach(([name, handler]) => model.off(`change:${name}`, handler));
}

export default { render };
