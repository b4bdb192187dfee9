// Rows of ops: their text, cost and facts; marking a value's definition and uses; going to an op.

const TOKEN = /("(?:[^"\\]|\\.)*")|(%[A-Za-z0-9_.'$]+)/g;
function code(text) {
  // an op's text; values become buttons, text in quotes stays text
  const out = el("span", { className: "code" });
  let at = 0;
  for (const m of text.matchAll(TOKEN)) {
    out.append(text.slice(at, m.index));
    at = m.index + m[0].length;
    if (m[2]) out.append(el("button", { className: "v", type: "button", textContent: m[2], "data-v": m[2] }));
    else out.append(m[0]);
  }
  out.append(text.slice(at));
  return out;
}
function opRow(i) {
  const op = fn().ops[i];
  const info = el("button", {
    className: "info",
    type: "button",
    textContent: i,
    "aria-expanded": "false",
    title: "source, rules, formulas",
  });
  const text = code(op.text);
  if (op.types.length) text.append(el("span", { className: "type", textContent: " : " + op.types.join(", ") }));
  const row = el(
    "div",
    { className: "op" + (op.weight ? " weight" : "") },
    info,
    text,
    el("span", { className: "cost" }),
  );
  row.dataset.op = i;
  paint(row);
  mark(row);
  return row;
}
function paint(row) {
  const i = +row.dataset.op,
    c = cost();
  row.querySelector(".cost").textContent = c.limit[i] ? time(c.us[i]) + " " + c.limit[i] : "";
}
function opFacts(i) {
  const op = fn().ops[i],
    c = cost();
  const facts = [
    ["source", op.source || "not known"],
    ["rules", op.lineage.join(", ") || "none: as it was traced"],
  ];
  if (op.formulas.length) {
    facts.push(
      ["bytes", op.formulas[0] + " = " + bytes(c.bytes[i])],
      ["operations", op.formulas[1] === "0" ? "none" : op.formulas[1] + " = " + flops(c.flops[i])],
    );
    if (op.formulas[2] !== "0") facts.push(["sent", op.formulas[2]]);
    facts.push([
      "of the limits",
      percent(c.compute[i]) + " of compute, " + percent(c.memory[i]) + " of memory bandwidth",
    ]);
  } else facts.push(["cost", op.weight ? "none: evaluated while compiling" : "none"]);
  return facts;
}
function toggleInfo(row) {
  const button = row.querySelector(".info"),
    old = row.querySelector("dl");
  button.setAttribute("aria-expanded", String(!old));
  if (old) old.remove();
  else
    row.append(
      el(
        "dl",
        {},
        ...opFacts(+row.dataset.op).flatMap(([k, v]) => [el("dt", { textContent: k }), el("dd", { textContent: v })]),
      ),
    );
}
function mark(row) {
  const op = fn().ops[+row.dataset.op],
    v = state.value;
  row.classList.toggle("def", v !== null && op.out.includes(v));
  row.classList.toggle("use", v !== null && op.in.includes(v));
  for (const b of row.querySelectorAll(".v")) b.classList.toggle("hit", b.dataset.v === v);
}
const rows = () => document.querySelectorAll("#graph .op");
function choose(name) {
  state.value = name;
  rows().forEach(mark);
  const panel = $("value");
  panel.hidden = name === null;
  panel.replaceChildren();
  if (name === null) return;
  const f = fn(),
    def = f.ops.findIndex((op) => op.out.includes(name)),
    arg = f.args.find((a) => a[0] === name);
  const uses = f.ops.flatMap((op, i) => (op.in.includes(name) ? [i] : []));
  const type = arg ? arg[1] : def < 0 ? "" : f.ops[def].types[f.ops[def].out.indexOf(name)];
  const link = (i) =>
    el("button", { className: "v code", type: "button", textContent: i + " " + f.ops[i].op, "data-go": i });
  const list = (xs) => xs.flatMap((x, i) => (i ? [", ", x] : [x]));
  const last = f.returns.includes(name) ? [uses.length ? ", and returned" : "returned"] : [];
  panel.append(
    el("button", {
      className: "close plain",
      type: "button",
      textContent: "Close",
      "aria-label": "Unmark the value",
      onclick: () => choose(null),
    }),
    el("b", { className: "code", textContent: name }),
    " ",
    el("span", { className: "soft code", textContent: type }),
    el("br"),
    "defined ",
    ...(arg ? ["as an argument of @" + f.name] : def < 0 ? ["nowhere"] : ["by ", link(def)]),
    "; used ",
    ...(uses.length
      ? [
          "by ",
          ...list(uses.slice(0, 40).map(link)),
          ...(uses.length > 40 ? [" and " + (uses.length - 40) + " more"] : []),
        ]
      : last.length
        ? []
        : ["nowhere"]),
    ...last,
  );
}
function go(i) {
  // shows op i in the graph
  if ($("filter").value) {
    $("filter").value = "";
    filter();
  }
  if (fn().ops[i].weight && !$("weights").checked) {
    $("weights").checked = true;
    drawLayers();
  }
  let at = document.querySelector(`#layers details[data-layer="${fn().ops[i].layer}"]`);
  const target = at;
  for (; at && at.id !== "layers"; at = at.parentElement)
    if (at.fill) {
      at.fill();
      at.open = true;
    }
  const row = target && target.querySelector(`.op[data-op="${i}"]`);
  if (!row) return;
  document.querySelectorAll(".op.here").forEach((x) => x.classList.remove("here"));
  row.classList.add("here");
  row.scrollIntoView({ block: "center" });
  row.querySelector(".info").focus({ preventScroll: true });
}
