"use strict";
// The pointer on a small picture shows its head, a click keeps it.
function watchHeads(plot) {
  const { heads, title } = plot.layout?.meta ?? {};
  const small = plot.data?.find((trace) => trace.meta?.part === "heads");
  if (!small || plot.dataset.heads) return;
  plot.dataset.heads = heads;
  let kept = 0;
  const show = (head) => {
    const visible = Array.from({ length: heads }, (_, at) => at === head);
    Plotly.update(plot, { visible }, { ...(plot.layout.title?.text && { "title.text": `${title}, ${plot.data[head].name}` }),
      "updatemenus[0].active": head }, [...visible.keys()]);
  };
  const at = (event) => {
    const point = event.points.find(({ data }) => data.meta?.part === "heads");
    return point ? Math.min(heads - 1, Math.floor(point.x / small.meta.width)) : null;
  };
  plot.on("plotly_hover", (event) => { const head = at(event); if (head !== null) show(head); });
  plot.on("plotly_unhover", (event) => { if (at(event) !== null) show(kept); });
  plot.on("plotly_click", (event) => { const head = at(event); if (head !== null) { kept = head; show(head); } });
  plot.on("plotly_buttonclicked", ({ button }) => {
    const head = plot.data.slice(0, heads).findIndex((trace) => trace.name === button.label);
    if (head >= 0) kept = head; // from the menu of heads
  });
}
