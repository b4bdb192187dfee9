// Summary and cost tables at the chosen sizes.

function card(value, what) {
  return el(
    "div",
    { className: "card" },
    el("b", { textContent: value }),
    el("span", { className: "soft", textContent: what }),
  );
}
function drawSummary() {
  const t = fn().totals[state.step],
    place = fn().memory && fn().memory.at[state.step];
  const first = data.passes[0],
    last = data.passes[data.passes.length - 1];
  const [limit, us] = Object.entries(t.spent)[0] || ["nothing", 0];
  $("cards").replaceChildren(
    card(time(t.us), "per step, estimated"),
    card(percent(us / (sum(Object.values(t.spent)) || 1)), "of it limited by " + limit),
    card(bytes(t.bytes), "cross the memory bus"),
    card(flops(t.flops), "computed"),
    ...(place ? [card(bytes(t.arena), `arena, ${bytes(place.peak)} in use at the peak`)] : []),
    ...(last
      ? [card(last.after.toLocaleString("en"), `ops, ${first.before.toLocaleString("en")} before the passes`)]
      : []),
  );
  const m = data.machine;
  $("model-note").textContent =
    `@${fn().name} at ${sizes(step())}. Times are a roofline on machine "${m.name}": ${flops(m.flops)} and ${rate(m.bandwidth)} a second, ${time(m.launch * 1e6)} to start an op. They are bounds to compare with, not measurements.`;
  $("compare").replaceChildren(
    table(
      ["step", "time", "bytes", "weights", "KV", "operations", "arena"],
      data.scenarios.map((s, i) => {
        const x = fn().totals[i];
        return [
          el("span", { title: sizes(s), textContent: s.name }),
          time(x.us),
          bytes(x.bytes),
          bytes(x.weights),
          bytes(x.kv),
          flops(x.flops),
          x.arena === null ? "not planned" : bytes(x.arena),
        ];
      }),
      [1, 2, 3, 4, 5, 6],
    ),
  );
}
const bar = (share, kind) => {
  const b = el("span", { className: "bar " + (kind || "") });
  b.style.width = 100 * Math.min(1, share) + "%";
  return b;
};
function drawCosts() {
  const f = fn(),
    c = cost(),
    total = sum(c.us) || 1,
    kinds = new Map();
  f.ops.forEach((op, i) => {
    if (!c.limit[i]) return;
    const k = kinds.get(op.op) || { n: 0, us: 0, bytes: 0, flops: 0, limits: {} };
    k.n++;
    k.us += c.us[i];
    k.bytes += c.bytes[i];
    k.flops += c.flops[i];
    k.limits[c.limit[i]] = (k.limits[c.limit[i]] || 0) + c.us[i];
    kinds.set(op.op, k);
  });
  const most = (limits) => Object.entries(limits).sort((a, b) => b[1] - a[1])[0][0];
  const of = (k) => [
    percent(k.flops / (k.us * 1e-6) / data.machine.flops),
    percent(k.bytes / (k.us * 1e-6) / data.machine.bandwidth),
  ];
  const byKind = [...kinds]
    .sort((a, b) => b[1].us - a[1].us)
    .map(([name, k]) => [
      el("code", { textContent: name }),
      k.n,
      time(k.us),
      percent(k.us / total),
      bar(k.us / total, family(name)),
      bytes(k.bytes),
      flops(k.flops),
      ...of(k),
      most(k.limits),
    ]);
  const head = (what, n) => [
    what,
    n,
    "time",
    "share",
    "",
    "bytes",
    "operations",
    "of compute",
    "of bandwidth",
    "limit",
  ];
  const byLayer = [];
  for (let n = 0; n < f.layers.length;) {
    let end = n + 1;
    while (end < f.layers.length && f.layers[end].same === f.layers[n].same) end++;
    const ops = f.layers
      .slice(n, end)
      .flatMap((l) => l.ops)
      .filter((i) => c.limit[i]);
    if (ops.length) {
      const k = {
        us: sum(ops.map((i) => c.us[i])),
        bytes: sum(ops.map((i) => c.bytes[i])),
        flops: sum(ops.map((i) => c.flops[i])),
        limits: {},
      };
      for (const i of ops) k.limits[c.limit[i]] = (k.limits[c.limit[i]] || 0) + c.us[i];
      const name = end > n + 1 ? `${f.layers[n].name} to ${f.layers[end - 1].name}` : f.layers[n].name;
      byLayer.push([
        el("code", { textContent: name }),
        ops.length,
        time(k.us),
        percent(k.us / total),
        bar(k.us / total),
        bytes(k.bytes),
        flops(k.flops),
        ...of(k),
        most(k.limits),
      ]);
    }
    n = end;
  }
  const region = (name, t) => el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": name }, t);
  const right = [1, 2, 3, 5, 6, 7, 8];
  $("costs-body").replaceChildren(
    el("p", {
      className: "note",
      textContent: `At ${sizes(step())}. An op takes the longest of its operations at the machine's peak, its bytes at the memory's bandwidth and its traffic at the link's, and a launch. "Of compute" and "of bandwidth" are the shares of the machine's peaks that this reaches.`,
    }),
    el("h3", { textContent: "By kind of op" }),
    region("Costs by kind of op", table(head("op", "count"), byKind, right)),
    el("h3", { textContent: "By layer" }),
    region("Costs by layer", table(head("layer", "ops"), byLayer, right)),
  );
  for (const td of $("costs-body").querySelectorAll("td:nth-child(5)")) td.className = "share";
}
