// Draws the report from the JSON in #data (report/data.py says what is in it). Text only ever becomes text nodes.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { step: 0, func: 0, value: null, zoom: { memory: 1, timeline: 1 } };
const fn = () => data.funcs[state.func];
const cost = () => fn().costs[state.step];

// ---- building blocks

function el(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
function svg(tag, props, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(props || {})) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function table(head, rows, right) {
  const cell = (tag, x, i) => {
    const node = el(tag, right && right.includes(i) ? { className: "num" } : {});
    node.append(x instanceof Node ? x : String(x));
    return node;
  };
  const thead = el("thead", {}, el("tr", {}, ...head.map((x, i) => { const c = cell("th", x, i); c.scope = "col"; return c; })));
  return el("table", {}, thead, el("tbody", {}, ...rows.map((r) => el("tr", {}, ...r.map((x, i) => cell("td", x, i))))));
}
function lazy(details, fill) { // fills a details element when it is first opened
  details.fill = () => { if (!details.filled) { details.filled = true; fill(details); } };
  details.addEventListener("toggle", () => { if (details.open) details.fill(); });
  return details;
}

const digits = (x) => (x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(2));
function scaled(x, base, units) {
  let i = 0;
  while (x >= base && i < units.length - 1) { x /= base; i++; }
  return (i === 0 && Number.isInteger(x) ? String(x) : digits(x)) + " " + units[i];
}
const bytes = (x) => scaled(x, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
const flops = (x) => (x === 0 ? "0" : scaled(x, 1000, ["ops", "Kop", "Mop", "Gop", "Top"]));
const rate = (x) => scaled(x, 1000, ["B", "kB", "MB", "GB", "TB"]);
const time = (us) => (us === 0 ? "0" : us < 1 ? Math.round(us * 1000) + " ns" : scaled(us, 1000, ["µs", "ms", "s"]));
const percent = (x) => (x > 0 && x < 0.0005 ? "< 0.1 %" : (100 * x).toFixed(x < 0.0995 ? 1 : 0) + " %");
const count = (n, what) => n.toLocaleString("en") + " " + what + (n === 1 ? "" : "s");
const sum = (xs) => xs.reduce((a, b) => a + b, 0);
const step = () => data.scenarios[state.step];
const sizes = (s) => Object.entries(s.dims).map(([k, v]) => k + "=" + v).join(", ");

const FAMILIES = { linear: "matrix products", kv: "attention and cache", norm: "norms", math: "elementwise", move: "copies and gathers", comm: "collectives", wait: "waits" };
const MOVES = ["t.reshape", "t.transpose", "t.slice", "t.concat", "t.expand", "t.pad", "t.take", "nn.embedding"];
function family(name) {
  if (name === "comm.wait" || name.startsWith("sched.")) return "wait";
  if (name.startsWith("kv.")) return "kv";
  if (name.startsWith("comm.")) return "comm";
  if (name.includes("linear") || name === "t.matmul") return "linear";
  if (name.includes("norm") || name === "t.softmax") return "norm";
  return MOVES.includes(name) ? "move" : "math";
}
const key = (names) => el("div", { className: "key" }, ...Object.keys(FAMILIES).filter((f) => names.includes(f))
  .map((f) => el("span", {}, el("i", { className: f }), FAMILIES[f])));

// ---- ops and values

const TOKEN = /("(?:[^"\\]|\\.)*")|(%[A-Za-z0-9_.'$]+)/g;
function code(text) { // an op's text; values become buttons, text in quotes stays text
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
  const info = el("button", { className: "info", type: "button", textContent: i, "aria-expanded": "false", title: "source, rules, formulas" });
  const text = code(op.text);
  if (op.types.length) text.append(el("span", { className: "type", textContent: " : " + op.types.join(", ") }));
  const row = el("div", { className: "op" + (op.weight ? " weight" : "") }, info, text, el("span", { className: "cost" }));
  row.dataset.op = i;
  paint(row);
  mark(row);
  return row;
}
function paint(row) {
  const i = +row.dataset.op, c = cost();
  row.querySelector(".cost").textContent = c.limit[i] ? time(c.us[i]) + " " + c.limit[i] : "";
}
function opFacts(i) {
  const op = fn().ops[i], c = cost();
  const facts = [["source", op.source || "not known"], ["rules", op.lineage.join(", ") || "none: as it was traced"]];
  if (op.formulas.length) {
    facts.push(["bytes", op.formulas[0] + " = " + bytes(c.bytes[i])], ["operations", op.formulas[1] === "0" ? "none" : op.formulas[1] + " = " + flops(c.flops[i])]);
    if (op.formulas[2] !== "0") facts.push(["sent", op.formulas[2]]);
    facts.push(["of the limits", percent(c.compute[i]) + " of compute, " + percent(c.memory[i]) + " of memory bandwidth"]);
  } else facts.push(["cost", op.weight ? "none: evaluated while compiling" : "none"]);
  return facts;
}
function toggleInfo(row) {
  const button = row.querySelector(".info"), old = row.querySelector("dl");
  button.setAttribute("aria-expanded", String(!old));
  if (old) old.remove();
  else row.append(el("dl", {}, ...opFacts(+row.dataset.op).flatMap(([k, v]) => [el("dt", { textContent: k }), el("dd", { textContent: v })])));
}
function mark(row) {
  const op = fn().ops[+row.dataset.op], v = state.value;
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
  const f = fn(), def = f.ops.findIndex((op) => op.out.includes(name)), arg = f.args.find((a) => a[0] === name);
  const uses = f.ops.flatMap((op, i) => (op.in.includes(name) ? [i] : []));
  const type = arg ? arg[1] : def < 0 ? "" : f.ops[def].types[f.ops[def].out.indexOf(name)];
  const link = (i) => el("button", { className: "v code", type: "button", textContent: i + " " + f.ops[i].op, "data-go": i });
  const list = (xs) => xs.flatMap((x, i) => (i ? [", ", x] : [x]));
  const last = f.returns.includes(name) ? [uses.length ? ", and returned" : "returned"] : [];
  panel.append(
    el("button", { className: "close plain", type: "button", textContent: "Close", "aria-label": "Unmark the value", onclick: () => choose(null) }),
    el("b", { className: "code", textContent: name }), " ", el("span", { className: "soft code", textContent: type }), el("br"),
    "defined ", ...(arg ? ["as an argument of @" + f.name] : def < 0 ? ["nowhere"] : ["by ", link(def)]),
    "; used ", ...(uses.length ? ["by ", ...list(uses.slice(0, 40).map(link)), ...(uses.length > 40 ? [" and " + (uses.length - 40) + " more"] : [])] : last.length ? [] : ["nowhere"]), ...last,
  );
}
function go(i) { // shows op i in the graph
  if ($("filter").value) { $("filter").value = ""; filter(); }
  if (fn().ops[i].weight && !$("weights").checked) { $("weights").checked = true; drawLayers(); }
  let at = document.querySelector(`#layers details[data-layer="${fn().ops[i].layer}"]`);
  const target = at;
  for (; at && at.id !== "layers"; at = at.parentElement) if (at.fill) { at.fill(); at.open = true; }
  const row = target && target.querySelector(`.op[data-op="${i}"]`);
  if (!row) return;
  document.querySelectorAll(".op.here").forEach((x) => x.classList.remove("here"));
  row.classList.add("here");
  row.scrollIntoView({ block: "center" });
  row.querySelector(".info").focus({ preventScroll: true });
}

// ---- graph by layer

const shown = (layer) => ($("weights").checked ? layer.ops : layer.ops.filter((i) => !fn().ops[i].weight));
const spent = (layer) => sum(layer.ops.map((i) => cost().us[i]));
function layerNode(n) {
  const layer = fn().layers[n];
  const head = el("summary", {}, el("span", { className: "right" }), el("span", { className: "name", textContent: layer.name }),
    el("span", { className: "soft", textContent: count(shown(layer).length, "op") }));
  const node = lazy(el("details", { "data-layer": n }, head), (d) => d.append(el("div", { className: "rows" }, ...shown(layer).map(opRow))));
  return node;
}
function drawLayers() {
  const body = $("layers"), layers = fn().layers;
  const open = new Set([...body.querySelectorAll("details[open][data-layer]")].map((d) => +d.dataset.layer));
  body.replaceChildren();
  for (let n = 0; n < layers.length; ) {
    let end = n + 1;
    while (end < layers.length && layers[end].same === layers[n].same && shown(layers[n]).length) end++;
    if (shown(layers[n]).length) {
      const node = layerNode(n);
      body.append(node);
      if (end > n + 1) {
        const rest = lazy(el("details", { className: "alike", "data-from": n + 1, "data-to": end }, el("summary", {}, el("span", { className: "right" }),
          `${count(end - n - 1, "layer")} like it: ${layers[n + 1].name}${end > n + 2 ? " to " + layers[end - 1].name : ""}`)),
          (d) => { for (let k = n + 1; k < end; k++) d.append(layerNode(k)); paintLayers(d); });
        body.append(rest);
      }
    }
    n = end;
  }
  for (const d of body.querySelectorAll("details[data-layer]")) if (open.has(+d.dataset.layer)) { d.fill(); d.open = true; }
  paintLayers(body);
}
function paintLayers(root) {
  const total = sum(cost().us) || 1;
  for (const d of root.querySelectorAll("details[data-layer], details.alike")) {
    const from = +(d.dataset.layer ?? d.dataset.from), to = +(d.dataset.to ?? from + 1);
    const us = sum(fn().layers.slice(from, to).map(spent));
    d.querySelector(".right").textContent = us ? `${time(us)}, ${percent(us / total)}` : "";
  }
}
function filter() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean), most = 500;
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

// ---- summary and costs

function card(value, what) { return el("div", { className: "card" }, el("b", { textContent: value }), el("span", { className: "soft", textContent: what })); }
function drawSummary() {
  const t = fn().totals[state.step], place = fn().memory && fn().memory.at[state.step];
  const first = data.passes[0], last = data.passes[data.passes.length - 1];
  const [limit, us] = Object.entries(t.spent)[0] || ["nothing", 0];
  $("cards").replaceChildren(card(time(t.us), "per step, estimated"), card(percent(us / (sum(Object.values(t.spent)) || 1)), "of it limited by " + limit),
    card(bytes(t.bytes), "cross the memory bus"), card(flops(t.flops), "computed"),
    ...(place ? [card(bytes(t.arena), `arena, ${bytes(place.peak)} in use at the peak`)] : []),
    ...(last ? [card(last.after.toLocaleString("en"), `ops, ${first.before.toLocaleString("en")} before the passes`)] : []));
  const m = data.machine;
  $("model-note").textContent = `@${fn().name} at ${sizes(step())}. Times are a roofline on machine "${m.name}": ${flops(m.flops)} and ${rate(m.bandwidth)} a second, ${time(m.launch * 1e6)} to start an op. They are bounds to compare with, not measurements.`;
  $("compare").replaceChildren(table(["step", "time", "bytes", "weights", "KV", "operations", "arena"], data.scenarios.map((s, i) => {
    const x = fn().totals[i];
    return [el("span", { title: sizes(s), textContent: s.name }), time(x.us), bytes(x.bytes), bytes(x.weights), bytes(x.kv), flops(x.flops), x.arena === null ? "not planned" : bytes(x.arena)];
  }), [1, 2, 3, 4, 5, 6]));
}
const bar = (share, kind) => { const b = el("span", { className: "bar " + (kind || "") }); b.style.width = 100 * Math.min(1, share) + "%"; return b; };
function drawCosts() {
  const f = fn(), c = cost(), total = sum(c.us) || 1, kinds = new Map();
  f.ops.forEach((op, i) => {
    if (!c.limit[i]) return;
    const k = kinds.get(op.op) || { n: 0, us: 0, bytes: 0, flops: 0, limits: {} };
    k.n++; k.us += c.us[i]; k.bytes += c.bytes[i]; k.flops += c.flops[i];
    k.limits[c.limit[i]] = (k.limits[c.limit[i]] || 0) + c.us[i];
    kinds.set(op.op, k);
  });
  const most = (limits) => Object.entries(limits).sort((a, b) => b[1] - a[1])[0][0];
  const of = (k) => [percent(k.flops / (k.us * 1e-6) / data.machine.flops), percent(k.bytes / (k.us * 1e-6) / data.machine.bandwidth)];
  const byKind = [...kinds].sort((a, b) => b[1].us - a[1].us).map(([name, k]) =>
    [el("code", { textContent: name }), k.n, time(k.us), percent(k.us / total), bar(k.us / total, family(name)), bytes(k.bytes), flops(k.flops), ...of(k), most(k.limits)]);
  const head = (what, n) => [what, n, "time", "share", "", "bytes", "operations", "of compute", "of bandwidth", "limit"];
  const byLayer = [];
  for (let n = 0; n < f.layers.length; ) {
    let end = n + 1;
    while (end < f.layers.length && f.layers[end].same === f.layers[n].same) end++;
    const ops = f.layers.slice(n, end).flatMap((l) => l.ops).filter((i) => c.limit[i]);
    if (ops.length) {
      const k = { us: sum(ops.map((i) => c.us[i])), bytes: sum(ops.map((i) => c.bytes[i])), flops: sum(ops.map((i) => c.flops[i])), limits: {} };
      for (const i of ops) k.limits[c.limit[i]] = (k.limits[c.limit[i]] || 0) + c.us[i];
      const name = end > n + 1 ? `${f.layers[n].name} to ${f.layers[end - 1].name}` : f.layers[n].name;
      byLayer.push([el("code", { textContent: name }), ops.length, time(k.us), percent(k.us / total), bar(k.us / total), bytes(k.bytes), flops(k.flops), ...of(k), most(k.limits)]);
    }
    n = end;
  }
  const region = (name, t) => el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": name }, t);
  const right = [1, 2, 3, 5, 6, 7, 8];
  $("costs-body").replaceChildren(
    el("p", { className: "note", textContent: `At ${sizes(step())}. An op takes the longest of its operations at the machine's peak, its bytes at the memory's bandwidth and its traffic at the link's, and a launch. "Of compute" and "of bandwidth" are the shares of the machine's peaks that this reaches.` }),
    el("h3", { textContent: "By kind of op" }), region("Costs by kind of op", table(head("op", "count"), byKind, right)),
    el("h3", { textContent: "By layer" }), region("Costs by layer", table(head("layer", "ops"), byLayer, right)));
  for (const td of $("costs-body").querySelectorAll("td:nth-child(5)")) td.className = "share";
}

// ---- passes and rewrites

function drawPasses() {
  let idle = [];
  const rest = () => { if (idle.length) $("runs").append(el("p", { className: "idle soft", textContent: "no change: " + idle.join(", ") })); idle = []; };
  for (const p of data.passes) {
    const name = `${String(p.index).padStart(2, "0")} ${p.text}`;
    if (!p.changed) { idle.push(name); continue; }
    rest();
    const stats = Object.entries(p.stats).map(([k, v]) => `${k} ${v.toLocaleString("en")}`).join(", ");
    const head = el("summary", {}, el("span", { className: "right", textContent: p.before === p.after ? count(p.after, "op") : `${p.before} → ${p.after} ops` }),
      el("span", { className: "name code", textContent: name }), " ", el("span", { className: "plus", textContent: "+" + p.come }), " ",
      el("span", { className: "minus", textContent: "−" + p.gone }), el("span", { className: "soft", textContent: stats }));
    $("runs").append(lazy(el("details", { className: "run", "data-run": p.index }, head), (d) => {
      for (const s of p.sections) {
        d.append(el("h3", { className: "code", textContent: s.layer + (s.same.length ? `, and alike in ${count(s.same.length, "other layer")}` : ""), title: s.same.join(", ") }), diff(s.lines));
      }
      if (!p.sections.length) d.append(el("p", { className: "empty", textContent: "Nothing but the numbers in names." }));
    }));
  }
  rest();
  if (!data.passes.length) $("runs").append(el("p", { className: "empty", textContent: "No pass was run." }));
}
function diff(lines) {
  const kinds = { "+": "add", "-": "del", " ": "same", "…": "gap" };
  return el("div", { className: "diff", tabIndex: 0, role: "region", "aria-label": "Changed lines" },
    ...lines.map(([kind, text]) => el("div", { className: kinds[kind], textContent: kind === "…" ? "  ⋯" : kind + " " + text })));
}
function drawRewrites() {
  const body = $("rewrites-body"), passes = new Map(), rules = new Map(data.rules.map((r) => [r.rule, r]));
  for (const p of data.passes) { // what each pass counted, over all of its runs
    const hits = passes.get(p.name) || new Map();
    passes.set(p.name, hits);
    for (const [k, v] of Object.entries(p.stats)) hits.set(k, (hits.get(k) || 0) + v);
  }
  body.append(el("p", { className: "note", textContent: "A hit is a rewrite that was made, or what else a pass counted. A miss is a rule that was tried at an op and made nothing: it gave up at a line of its own, which says why." }));
  for (const [name, hits] of passes) {
    const of = [...rules.values()].filter((r) => r.rule.startsWith(name + "/")), known = new Set(of.map((r) => r.rule.slice(name.length + 1)));
    const rows = of.sort((a, b) => b.fired - a.fired).map((r) => [el("code", { textContent: r.rule.slice(name.length + 1) }), r.tried, r.fired, r.tried - r.fired, reasons(r)]);
    for (const [k, n] of hits) if (!known.has(k)) rows.push([el("code", { textContent: k }), "", n.toLocaleString("en"), "", ""]);
    if (!rows.length) continue;
    const fired = sum(of.map((r) => r.fired)), tried = sum(of.map((r) => r.tried));
    const head = el("summary", {}, el("span", { className: "right", textContent: of.length ? `${count(fired, "hit")}, ${(tried - fired).toLocaleString("en")} misses` : "" }), el("span", { className: "name code", textContent: name }),
      el("span", { className: "soft", textContent: [...hits].map(([k, n]) => `${k} ${n.toLocaleString("en")}`).join(", ") }));
    const box = el("details", { className: "rules", "data-pass": name, open: name.startsWith("fuse") }, head);
    box.append(el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Rules of " + name }, table(["rule", "tried", "hits", "misses", "where it gave up"], rows, [1, 2, 3])));
    body.append(box);
  }
  if (!body.querySelector(".rules")) body.append(el("p", { className: "empty", textContent: "No pass counted anything." }));
  body.append(el("h3", { textContent: "Remarks" }));
  if (data.remarks.length) body.append(el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Remarks" },
    table(["pass", "what", "op", "source"], data.remarks.map((r) => [el("code", { textContent: r.pass }), r.text, el("code", { textContent: r.where }), r.source]))));
  else body.append(el("p", { className: "empty", textContent: "No pass left a remark." }));
}
function reasons(r) {
  if (!r.reasons.length) return "";
  const lines = (x) => [el("span", { className: "soft", textContent: `${x.count} × ${r.file}:${x.line} ` }), el("code", { textContent: x.source })];
  return el("div", {}, ...r.reasons.map((x) => lazy(el("details", { className: "reason" }, el("summary", {}, ...lines(x))), (d) => {
    d.append(el("ul", {}, ...x.examples.map((e) => el("li", {}, el("code", { textContent: e })))));
  })));
}

// ---- pictures

const NICE = (span, n) => { const raw = span / n, p = 10 ** Math.floor(Math.log10(raw || 1)); return [1, 2, 5, 10].map((k) => k * p).find((k) => k >= raw) || p; };
function tools(name, redraw) {
  const zoom = (k) => el("button", { className: "plain", type: "button", textContent: k > 1 ? "Zoom in" : "Zoom out", "data-zoom": k,
    onclick: () => { state.zoom[name] = Math.min(64, Math.max(1, state.zoom[name] * k)); redraw(); } });
  return el("div", { className: "tools" }, zoom(2), zoom(0.5), el("span", { className: "soft", textContent: "Arrow keys walk through the picture, Enter shows the op in the graph." }));
}
function picture(id, label, width, height, parts, marks, describe, open) {
  // `marks`: elements that can be hovered and walked through; `describe(i)`: [title, lines]; `open(i)`: an op's index
  const root = svg("svg", { width, height, tabindex: 0, role: "img", "aria-label": label, id }, ...parts);
  marks.forEach((m, i) => { m.classList.add("b"); m.setAttribute("data-i", i); });
  let current = -1;
  const set = (i) => { if (current >= 0) marks[current].classList.remove("current"); current = i; if (i >= 0) marks[i].classList.add("current"); };
  const tip = (i, x, y) => showTip(...describe(i), x, y);
  root.addEventListener("mousemove", (e) => { const i = e.target.getAttribute("data-i"); if (i === null) hideTip(); else tip(+i, e.clientX, e.clientY); });
  root.addEventListener("mouseleave", hideTip);
  root.addEventListener("blur", () => { set(-1); hideTip(); });
  root.addEventListener("click", (e) => { const i = e.target.getAttribute("data-i"); if (i !== null) { hideTip(); go(open(+i)); } });
  root.addEventListener("keydown", (e) => {
    const d = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (d && marks.length) {
      e.preventDefault();
      set(Math.min(marks.length - 1, Math.max(0, current + d)));
      marks[current].scrollIntoView({ block: "nearest", inline: "nearest" });
      const r = marks[current].getBoundingClientRect();
      tip(current, r.left + Math.min(r.width / 2, 60), r.bottom);
    } else if (e.key === "Enter" && current >= 0) { hideTip(); go(open(current)); } else if (e.key === "Escape") hideTip();
  });
  return root;
}
function showTip(title, lines, x, y) {
  const t = $("tip");
  t.replaceChildren(el("b", { textContent: title }), ...lines.map((l) => el("div", { textContent: l })));
  t.hidden = false;
  const r = t.getBoundingClientRect();
  t.style.left = Math.max(4, Math.min(x + 14, innerWidth - r.width - 8)) + "px";
  t.style.top = (y + 18 + r.height > innerHeight ? Math.max(4, y - r.height - 10) : y + 18) + "px";
}
function hideTip() { $("tip").hidden = true; }
const frame = (id) => Math.max(300, $(id).clientWidth - 2);
function swap(id, nodes) { // redraws without losing the place in the picture
  const old = $(id).querySelector(".picture"), ratio = old && old.scrollWidth > old.clientWidth ? old.scrollLeft / old.scrollWidth : 0;
  $(id).replaceChildren(...nodes);
  const now = $(id).querySelector(".picture");
  if (now) now.scrollLeft = ratio * now.scrollWidth;
}
function drawMemory() {
  const f = fn(), memory = f.memory;
  if (!memory) { $("memory-body").replaceChildren(el("p", { className: "empty", textContent: "The module has no memory plan: pass plan-memory was not run." })); return; }
  const at = memory.at[state.step], arena = f.totals[state.step].arena || 1;
  const runs = f.ops.flatMap((op, i) => (op.weight ? [] : [i])), column = new Map(runs.map((i, n) => [i, n]));
  const left = 70, top = 18, bottom = 92, height = 440;
  const width = frame("memory-body") * state.zoom.memory, inner = width - left - 12, h = height - top - bottom;
  const x = (n) => left + (n / runs.length) * inner, y = (b) => top + h - (b / arena) * h;
  const parts = [], unit = 2 ** Math.ceil(Math.log2(arena / 6));
  for (let b = 0; b <= arena; b += unit) parts.push(svg("line", { x1: left, x2: width - 12, y1: y(b), y2: y(b), class: "grid" }), svg("text", { x: left - 6, y: y(b) + 4, "text-anchor": "end" }, bytes(b)));
  const marks = memory.buffers.map((b, i) => {
    const a = column.get(b.start), z = column.get(b.end) ?? runs.length - 1;
    return svg("rect", { x: x(a), width: Math.max(0.6, x(z + 1) - x(a)), y: y(at.offset[i] + at.size[i]), height: Math.max(0.6, (at.size[i] / arena) * h), class: family(f.ops[b.start].op) });
  });
  const labels = marks.flatMap((m, i) => {
    const w = +m.getAttribute("width"), tall = +m.getAttribute("height"), name = memory.buffers[i].name;
    return w > name.length * 6.6 + 8 && tall > 13 ? [svg("text", { x: +m.getAttribute("x") + 4, y: +m.getAttribute("y") + Math.min(tall / 2 + 4, 14), class: "in" }, name)] : [];
  });
  const used = new Array(runs.length).fill(0);
  memory.buffers.forEach((b, i) => { for (let n = column.get(b.start); n <= (column.get(b.end) ?? runs.length - 1); n++) used[n] += at.size[i]; });
  const low = height - 24, strip = 46; // below the picture: the sum of the buffers in use
  const line = svg("polygon", { class: "use", points: [`${x(0)},${low}`, ...used.flatMap((u, n) => [`${x(n)},${low - (u / (at.peak || 1)) * strip}`, `${x(n + 1)},${low - (u / (at.peak || 1)) * strip}`]), `${x(runs.length)},${low}`].join(" ") });
  const peak = column.get(at.peak_at) ?? 0, px = x(peak + 0.5), flip = px > width * 0.7;
  parts.push(...marks, ...labels, line, svg("line", { x1: px, x2: px, y1: top, y2: low, class: "peak" }),
    svg("text", { x: left - 6, y: low - strip + 10, "text-anchor": "end" }, "in use"), svg("text", { x: left - 6, y: low - strip + 24, "text-anchor": "end" }, bytes(at.peak)),
    svg("text", { x: px + (flip ? -5 : 5), y: 12, class: "peak", "text-anchor": flip ? "end" : "start" }, `peak: ${bytes(at.peak)} at op ${at.peak_at}`),
    svg("text", { x: left, y: height - 8 }, `ops of the step, ${runs[0]} to ${runs[runs.length - 1]}`));
  const describe = (i) => { const b = memory.buffers[i]; return [`${b.name} : ${b.type}`, [`at ${at.offset[i].toLocaleString("en")} = ${b.offset}`, `${bytes(at.size[i])} = ${b.size}`,
    `in use by ops ${b.start} to ${b.end}: ${[...new Set(b.users.map((u) => f.ops[u].op))].join(", ")}`]]; };
  const root = picture("memory-svg", "Memory plan: buffers over op time", width, height, parts, marks, describe, (i) => memory.buffers[i].start);
  const rows = memory.buffers.map((b, i) => [el("code", { textContent: b.name }), `${b.start} to ${b.end}`, at.offset[i].toLocaleString("en"), at.size[i].toLocaleString("en"), el("code", { textContent: b.offset }), el("code", { textContent: b.size })]);
  const list = lazy(el("details", {}, el("summary", { textContent: `${count(memory.buffers.length, "buffer")} as a table` })), (d) =>
    d.append(el("div", { className: "tall", tabIndex: 0, role: "region", "aria-label": "Buffers" }, table(["buffer", "ops", "offset", "bytes", "offset formula", "bytes formula"], rows, [2, 3]))));
  swap("memory-body", [el("p", { className: "note", textContent: `Buffers over the ops that use them, at ${sizes(step())}, and below their sum. Arena: ${f.arena} = ${bytes(f.totals[state.step].arena)}.` }),
    tools("memory", drawMemory), el("div", { className: "picture" }, root), key(marks.map((m) => m.classList[0])), list]);
}
function drawTimeline() {
  const f = fn(), t = f.timeline[state.step], c = cost(), end = Math.max(...t.slots.map((s) => s[3]), 1e-9);
  if (!t.slots.length) { $("timeline-body").replaceChildren(el("p", { className: "empty", textContent: "No op takes time." })); return; }
  const left = 90, lane = 40, top = 8, width = frame("timeline-body") * state.zoom.timeline, inner = width - left - 16;
  const height = top + lane * t.streams.length + 28, x = (us) => left + (us / end) * inner, y = (n) => top + n * lane;
  const parts = [], unit = NICE(end, 8 * state.zoom.timeline);
  for (let n = 0; n * unit <= end; n++) parts.push(svg("line", { x1: x(n * unit), x2: x(n * unit), y1: top, y2: height - 22, class: "grid" }), svg("text", { x: x(n * unit) + 2, y: height - 8 }, time(n * unit)));
  t.streams.forEach((name, n) => parts.push(svg("text", { x: 6, y: y(n) + lane / 2 + 4 }, name)));
  const marks = t.slots.map(([op, n, a, z]) => svg("rect", { x: x(a), width: Math.max(0.5, x(z) - x(a)), y: y(n) + 4, height: lane - 8, class: family(f.ops[op].op) }));
  const labels = t.slots.flatMap(([op, n, a, z]) => (x(z) - x(a) > f.ops[op].op.length * 6.6 + 8 ? [svg("text", { x: x(a) + 4, y: y(n) + lane / 2 + 4, class: family(f.ops[op].op) === "wait" ? "in dim" : "in" }, f.ops[op].op)] : []));
  const flows = t.slots.flatMap(([, n, , z, from]) => (from < 0 ? [] : [svg("path", { class: "flow", d: `M${x(t.slots[from][3])},${y(t.slots[from][1]) + lane / 2} L${x(z)},${y(n) + lane / 2}` })]));
  parts.push(...marks, ...labels, ...flows);
  const describe = (i) => { const [op, n, a, z, from] = t.slots[i], o = f.ops[op]; return [`${o.out.join(", ")}${o.out.length ? " = " : ""}${o.op}`, [
    `${t.streams[n]}, ${time(a)} to ${time(z)}: ${time(z - a)}`, ...(c.limit[op] ? [`limit: ${c.limit[op]}; ${bytes(c.bytes[op])}, ${flops(c.flops[op])}; ${percent(c.compute[op])} of compute, ${percent(c.memory[op])} of bandwidth`] : []),
    ...(from >= 0 ? [`waits for op ${t.slots[from][0]}, ${f.ops[t.slots[from][0]].op}`] : []), ...(o.source ? [o.source] : [])]]; };
  const root = picture("timeline-svg", "Schedule: ops per stream over time", width, height, parts, marks, describe, (i) => t.slots[i][0]);
  const busy = t.streams.map((name, n) => `${name} ${percent(sum(t.slots.filter((s, i) => s[1] === n && !t.waits.includes(i)).map((s) => s[3] - s[2])) / end)}`);
  swap("timeline-body", [el("p", { className: "note", textContent: `Estimated, at ${sizes(step())}: ${time(end)}. Busy: ${busy.join(", ")}.` }), tools("timeline", drawTimeline), el("div", { className: "picture" }, root), key(marks.map((m) => m.classList[0]))]);
}

// ---- putting it together

function drawStep() { drawSummary(); drawCosts(); drawMemory(); drawTimeline(); rows().forEach(paint); paintLayers($("layers")); }
function drawFunc() { choose(null); $("layers").replaceChildren(); drawLayers(); filter(); drawStep(); }
data.scenarios.forEach((s, i) => {
  const input = el("input", { type: "radio", name: "step", value: i, checked: i === 0, onchange: () => { state.step = i; drawStep(); } });
  $("steps").append(el("label", { title: sizes(s) }, input, s.name));
});
data.funcs.forEach((f, i) => $("func").append(el("option", { value: i, textContent: "@" + f.name })));
$("pick").hidden = data.funcs.length < 2;
$("func").addEventListener("change", () => { state.func = +$("func").value; drawFunc(); });
$("facts").append(table(["", ""], data.facts));
$("facts").querySelector("thead").remove();
let timer = 0;
$("filter").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 60); });
$("weights").addEventListener("change", () => { drawLayers(); filter(); });
document.addEventListener("click", (e) => {
  const t = e.target.closest("button");
  if (!t) return;
  if (t.dataset.go) go(+t.dataset.go);
  else if (t.dataset.v) choose(t.dataset.v === state.value ? null : t.dataset.v);
  else if (t.className === "info") toggleInfo(t.closest(".op"));
});
document.addEventListener("keydown", (e) => { if (e.key === "Escape" && state.value !== null) choose(null); });
let wide = innerWidth;
addEventListener("resize", () => { if (innerWidth !== wide) { wide = innerWidth; drawMemory(); drawTimeline(); } });
drawPasses();
drawRewrites();
if (data.funcs.length) drawFunc();
})();
