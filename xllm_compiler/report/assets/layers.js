// The graph by layer, equal layers folded, and the filter.

const shown = (layer) => ($("weights").checked ? layer.ops : layer.ops.filter((i) => !fn().ops[i].weight));
const spent = (layer) => sum(layer.ops.map((i) => cost().us[i]));
function layerNode(n) {
  const layer = fn().layers[n];
  const head = el(
    "summary",
    {},
    el("span", { className: "right" }),
    el("span", { className: "name", textContent: layer.name }),
    el("span", { className: "soft", textContent: count(shown(layer).length, "op") }),
  );
  const node = lazy(el("details", { "data-layer": n }, head), (d) =>
    d.append(el("div", { className: "rows" }, ...shown(layer).map(opRow))),
  );
  return node;
}
function drawLayers() {
  const body = $("layers"),
    layers = fn().layers;
  const open = new Set([...body.querySelectorAll("details[open][data-layer]")].map((d) => +d.dataset.layer));
  body.replaceChildren();
  for (let n = 0; n < layers.length;) {
    let end = n + 1;
    while (end < layers.length && layers[end].same === layers[n].same && shown(layers[n]).length) end++;
    if (shown(layers[n]).length) {
      const node = layerNode(n);
      body.append(node);
      if (end > n + 1) {
        const rest = lazy(
          el(
            "details",
            { className: "alike", "data-from": n + 1, "data-to": end },
            el(
              "summary",
              {},
              el("span", { className: "right" }),
              `${count(end - n - 1, "layer")} like it: ${layers[n + 1].name}${end > n + 2 ? " to " + layers[end - 1].name : ""}`,
            ),
          ),
          (d) => {
            for (let k = n + 1; k < end; k++) d.append(layerNode(k));
            paintLayers(d);
          },
        );
        body.append(rest);
      }
    }
    n = end;
  }
  for (const d of body.querySelectorAll("details[data-layer]"))
    if (open.has(+d.dataset.layer)) {
      d.fill();
      d.open = true;
    }
  paintLayers(body);
}
function paintLayers(root) {
  const total = sum(cost().us) || 1;
  for (const d of root.querySelectorAll("details[data-layer], details.alike")) {
    const from = +(d.dataset.layer ?? d.dataset.from),
      to = +(d.dataset.to ?? from + 1);
    const us = sum(fn().layers.slice(from, to).map(spent));
    d.querySelector(".right").textContent = us ? `${time(us)}, ${percent(us / total)}` : "";
  }
}
function filter() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean),
    most = 500;
  $("layers").hidden = words.length > 0;
  $("matches").hidden = words.length === 0;
  $("matches").replaceChildren();
  $("found").textContent = "";
  if (!words.length) return;
  const hits = fn().ops.flatMap((op, i) => {
    if (op.weight && !$("weights").checked) return [];
    const text = [op.text, ...op.types, op.source, ...op.lineage].join(" ").toLowerCase();
    return words.every((w) => text.includes(w)) ? [i] : [];
  });
  $("found").textContent = count(hits.length, "op") + (hits.length > most ? `, the first ${most} are shown` : "");
  $("matches").append(...hits.slice(0, most).map(opRow));
}
