// Elements, tables, and numbers for people. Text only ever becomes text nodes.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { step: 0, func: 0, value: null, zoom: { memory: 1, timeline: 1 } };
const fn = () => data.funcs[state.func];
const cost = () => fn().costs[state.step];

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
  const thead = el(
    "thead",
    {},
    el(
      "tr",
      {},
      ...head.map((x, i) => {
        const c = cell("th", x, i);
        c.scope = "col";
        return c;
      }),
    ),
  );
  return el(
    "table",
    {},
    thead,
    el("tbody", {}, ...rows.map((r) => el("tr", {}, ...r.map((x, i) => cell("td", x, i))))),
  );
}
function lazy(details, fill) {
  // fills a details element when it is first opened
  details.fill = () => {
    if (!details.filled) {
      details.filled = true;
      fill(details);
    }
  };
  details.addEventListener("toggle", () => {
    if (details.open) details.fill();
  });
  return details;
}

const digits = (x) => (x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(2));
function scaled(x, base, units) {
  let i = 0;
  while (x >= base && i < units.length - 1) {
    x /= base;
    i++;
  }
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
const sizes = (s) =>
  Object.entries(s.dims)
    .map(([k, v]) => k + "=" + v)
    .join(", ");

const FAMILIES = {
  linear: "matrix products",
  kv: "attention and cache",
  norm: "norms",
  math: "elementwise",
  move: "copies and gathers",
  comm: "collectives",
  wait: "waits",
};
const MOVES = ["t.reshape", "t.transpose", "t.slice", "t.concat", "t.expand", "t.pad", "t.take", "nn.embedding"];
function family(name) {
  if (name === "comm.wait" || name.startsWith("sched.")) return "wait";
  if (name.startsWith("kv.")) return "kv";
  if (name.startsWith("comm.")) return "comm";
  if (name.includes("linear") || name === "t.matmul") return "linear";
  if (name.includes("norm") || name === "t.softmax") return "norm";
  return MOVES.includes(name) ? "move" : "math";
}
const key = (names) =>
  el(
    "div",
    { className: "key" },
    ...Object.keys(FAMILIES)
      .filter((f) => names.includes(f))
      .map((f) => el("span", {}, el("i", { className: f }), FAMILIES[f])),
  );
