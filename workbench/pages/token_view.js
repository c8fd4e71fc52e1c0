// Front end of workbench.TokenView. Token text only ever enters the page as textContent.

function make(tag, name, parent, text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.textContent = text;
  parent?.append(element);
  return element;
}

function numbers(view, Kind) {
  return new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

const short = (value) => (Number.isNaN(value) ? "none" : String(Number(value.toPrecision(4))));

function slider(model, root, trait, name, count, format) {
  const label = make("label", "control", root);
  make("span", "", label, name);
  const range = make("input", "", label);
  Object.assign(range, { type: "range", min: 0, step: 1, name: trait });
  const output = make("output", "", label);
  range.addEventListener("input", () => {
    model.set(trait, range.valueAsNumber);
    model.save_changes();
  });
  return () => {
    const last = count() - 1;
    label.hidden = last < 1;
    range.max = Math.max(0, last);
    range.value = model.get(trait);
    output.textContent = format(model.get(trait));
    range.setAttribute("aria-valuetext", output.textContent);
  };
}

function render({ model, el }) {
  const root = make("div", "workbench-tokens", el);
  root.setAttribute("data-lm-suppress-shortcuts", "true"); // otherwise JupyterLab's arrow keys move through the cells
  root.addEventListener("keydown", (event) => event.stopPropagation()); // and its notebook takes the focus away
  const controls = make("div", "controls", root);
  const list = make("div", "tokens", root);
  const status = make("div", "status", root);
  const message = make("span", "", status);
  const buttons = make("span", "features", status);
  const foot = make("div", "foot", root);
  message.setAttribute("role", "status");
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-multiselectable", "true");
  list.setAttribute("aria-label", "tokens");

  let texts, values, entries, focus = 0, anchor = 0;
  const byFeature = () => model.get("colour") === "feature";
  const named = (feature) => {
    const name = model.get("feature_names")[feature];
    return name ? `feature ${feature}: ${name}` : `feature ${feature}`;
  };

  const choice = make("label", "control", controls);
  make("span", "", choice, "colour");
  const select = make("select", "", choice);
  select.name = "colour";
  for (const name of ["values", "feature"]) make("option", "", select, name).value = name;
  select.addEventListener("change", () => {
    model.set("colour", select.value);
    model.save_changes();
  });
  const refreshers = [
    slider(model, controls, "sequence", "sequence", () => model.get("sequences"), String),
    slider(model, controls, "layer", "layer", () => (byFeature() ? 0 : model.get("layers").length),
      (layer) => model.get("layers")[layer] ?? ""),
    slider(model, controls, "feature", "feature", () => (byFeature() ? model.get("features") : 0), String),
  ];

  function load() {
    values = numbers(model.get("values"), Float32Array);
    const kinds = { token: Int32Array, feature: Int32Array, value: Float32Array };
    entries = Object.fromEntries(Object.entries(kinds).map(([name, kind]) => [name, numbers(model.get(`entry_${name}`), kind)]));
    texts = model.get("texts");
    focus = anchor = 0;
    buttons.replaceChildren();
    list.replaceChildren(...texts.map((text, index) => {
      const token = make("span", "token", null, text);
      token.setAttribute("role", "option");
      token.dataset.row = model.get("rows")[index];
      token.tabIndex = index ? -1 : 0;
      return token;
    }));
  }

  function current() {
    const count = texts.length;
    if (!byFeature()) return values.subarray(model.get("layer") * count, (model.get("layer") + 1) * count);
    const activations = new Float32Array(count);
    entries.feature.forEach((feature, at) => {
      if (feature === model.get("feature")) activations[entries.token[at]] = entries.value[at];
    });
    return activations;
  }

  function describe(index) {
    const value = current()[index];
    const name = byFeature() ? named(model.get("feature")) : model.get("measure");
    message.textContent = `${texts[index]}  row ${model.get("rows")[index]}, position ${model.get("positions")[index]}`
      + (value === undefined ? "" : `, ${name}: ${short(value)}`);
    const active = [];
    entries.token.forEach((token, at) => { if (token === index) active.push(at); });
    active.sort((a, b) => entries.value[b] - entries.value[a]);
    buttons.replaceChildren(...active.slice(0, 5).map((at) => {
      const button = make("button", "", null, `${entries.feature[at]}: ${short(entries.value[at])}`);
      button.type = "button";
      button.title = `colour by ${named(entries.feature[at])}`;
      button.addEventListener("click", () => {
        model.set("colour", "feature");
        model.set("feature", entries.feature[at]);
        model.save_changes();
      });
      return button;
    }));
  }

  function paint() {
    refreshers.forEach((refresh) => refresh());
    choice.hidden = !(model.get("layers").length && model.get("features"));
    select.value = model.get("colour");
    const strengths = current();
    const scale = byFeature() ? model.get("feature_scales")[model.get("feature")] : model.get("scales")[model.get("layer")];
    const selected = new Set(model.get("selected"));
    [...list.children].forEach((token, index) => {
      const strength = scale && Number.isFinite(strengths[index]) ? Math.min(1, Math.abs(strengths[index]) / scale) : 0;
      token.style.backgroundColor = strength ? `rgb(${strengths[index] < 0 ? "30 120 200" : "230 125 15"} / ${(0.65 * strength).toFixed(3)})` : "";
      token.setAttribute("aria-selected", selected.has(model.get("rows")[index]));
      token.tabIndex = index === focus ? 0 : -1;
    });
    const name = byFeature() ? named(model.get("feature")) : model.get("measure");
    foot.textContent = `${name}: full colour at ${scale ? short(scale) : "0"}; ${selected.size} selected`
      + (model.get("note") ? `; ${model.get("note")}` : "");
  }

  function toggle(index, range) {
    const rows = model.get("rows");
    const selected = new Set(model.get("selected"));
    if (range) {
      for (let at = Math.min(anchor, index); at <= Math.max(anchor, index); at += 1) selected.add(rows[at]);
    } else if (!selected.delete(rows[index])) selected.add(rows[index]);
    anchor = index;
    model.set("selected", [...selected].sort((a, b) => a - b));
    model.save_changes();
  }

  function move(index) {
    focus = Math.max(0, Math.min(texts.length - 1, index));
    [...list.children].forEach((token, at) => { token.tabIndex = at === focus ? 0 : -1; });
    list.children[focus]?.focus();
  }

  const place = (event) => [...list.children].indexOf(event.target.closest(".token"));
  list.addEventListener("pointerover", (event) => { const index = place(event); if (index >= 0) describe(index); });
  list.addEventListener("focusin", (event) => { const index = place(event); if (index >= 0) { focus = index; describe(index); } });
  list.addEventListener("click", (event) => { const index = place(event); if (index >= 0) { move(index); toggle(index, event.shiftKey); } });
  list.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
    if (event.key in steps) move(focus + steps[event.key]);
    else if (event.key === " " || event.key === "Enter") toggle(focus, event.shiftKey);
    else if (event.key === "Escape") { model.set("selected", []); model.save_changes(); }
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  const reload = () => { load(); paint(); };
  const handlers = [["loaded", reload], ...["layer", "feature", "colour", "selected"].map((name) => [name, paint])];
  handlers.forEach(([name, handler]) => model.on(`change:${name}`, handler));
  reload();
  return () => handlers.forEach(([name, handler]) => model.off(`change:${name}`, handler));
}

export default { render };
