// What passes changed, as diffs; rules that fired and where others gave up.

function drawPasses() {
  let idle = [];
  const rest = () => {
    if (idle.length)
      $("runs").append(el("p", { className: "idle soft", textContent: "no change: " + idle.join(", ") }));
    idle = [];
  };
  for (const p of data.passes) {
    const name = `${String(p.index).padStart(2, "0")} ${p.text}`;
    if (!p.changed) {
      idle.push(name);
      continue;
    }
    rest();
    const stats = Object.entries(p.stats)
      .map(([k, v]) => `${k} ${v.toLocaleString("en")}`)
      .join(", ");
    const head = el(
      "summary",
      {},
      el("span", {
        className: "right",
        textContent: p.before === p.after ? count(p.after, "op") : `${p.before} → ${p.after} ops`,
      }),
      el("span", { className: "name code", textContent: name }),
      " ",
      el("span", { className: "plus", textContent: "+" + p.come }),
      " ",
      el("span", { className: "minus", textContent: "−" + p.gone }),
      el("span", { className: "soft", textContent: stats }),
    );
    $("runs").append(
      lazy(el("details", { className: "run", "data-run": p.index }, head), (d) => {
        for (const s of p.sections) {
          d.append(
            el("h3", {
              className: "code",
              textContent: s.layer + (s.same.length ? `, and alike in ${count(s.same.length, "other layer")}` : ""),
              title: s.same.join(", "),
            }),
            diff(s.lines),
          );
        }
        if (!p.sections.length)
          d.append(el("p", { className: "empty", textContent: "Nothing but the numbers in names." }));
      }),
    );
  }
  rest();
  if (!data.passes.length) $("runs").append(el("p", { className: "empty", textContent: "No pass was run." }));
}
function diff(lines) {
  const kinds = { "+": "add", "-": "del", " ": "same", "…": "gap" };
  return el(
    "div",
    { className: "diff", tabIndex: 0, role: "region", "aria-label": "Changed lines" },
    ...lines.map(([kind, text]) =>
      el("div", { className: kinds[kind], textContent: kind === "…" ? "  ⋯" : kind + " " + text }),
    ),
  );
}
function drawRewrites() {
  const body = $("rewrites-body"),
    passes = new Map(),
    rules = new Map(data.rules.map((r) => [r.rule, r]));
  for (const p of data.passes) {
    // what each pass counted, over all of its runs
    const hits = passes.get(p.name) || new Map();
    passes.set(p.name, hits);
    for (const [k, v] of Object.entries(p.stats)) hits.set(k, (hits.get(k) || 0) + v);
  }
  body.append(
    el("p", {
      className: "note",
      textContent:
        "A hit is a rewrite that was made, or what else a pass counted. A miss is a rule that was tried at an op and made nothing: it gave up at a line of its own, which says why.",
    }),
  );
  for (const [name, hits] of passes) {
    const of = [...rules.values()].filter((r) => r.rule.startsWith(name + "/")),
      known = new Set(of.map((r) => r.rule.slice(name.length + 1)));
    const rows = of
      .sort((a, b) => b.fired - a.fired)
      .map((r) => [
        el("code", { textContent: r.rule.slice(name.length + 1) }),
        r.tried,
        r.fired,
        r.tried - r.fired,
        reasons(r),
      ]);
    for (const [k, n] of hits)
      if (!known.has(k)) rows.push([el("code", { textContent: k }), "", n.toLocaleString("en"), "", ""]);
    if (!rows.length) continue;
    const fired = sum(of.map((r) => r.fired)),
      tried = sum(of.map((r) => r.tried));
    const head = el(
      "summary",
      {},
      el("span", {
        className: "right",
        textContent: of.length ? `${count(fired, "hit")}, ${(tried - fired).toLocaleString("en")} misses` : "",
      }),
      el("span", { className: "name code", textContent: name }),
      el("span", {
        className: "soft",
        textContent: [...hits].map(([k, n]) => `${k} ${n.toLocaleString("en")}`).join(", "),
      }),
    );
    const box = el("details", { className: "rules", "data-pass": name, open: name.startsWith("fuse") }, head);
    box.append(
      el(
        "div",
        { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Rules of " + name },
        table(["rule", "tried", "hits", "misses", "where it gave up"], rows, [1, 2, 3]),
      ),
    );
    body.append(box);
  }
  if (!body.querySelector(".rules"))
    body.append(el("p", { className: "empty", textContent: "No pass counted anything." }));
  body.append(el("h3", { textContent: "Remarks" }));
  if (data.remarks.length)
    body.append(
      el(
        "div",
        { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Remarks" },
        table(
          ["pass", "what", "op", "source"],
          data.remarks.map((r) => [
            el("code", { textContent: r.pass }),
            r.text,
            el("code", { textContent: r.where }),
            r.source,
          ]),
        ),
      ),
    );
  else body.append(el("p", { className: "empty", textContent: "No pass left a remark." }));
}
function reasons(r) {
  if (!r.reasons.length) return "";
  const lines = (x) => [
    el("span", { className: "soft", textContent: `${x.count} × ${r.file}:${x.line} ` }),
    el("code", { textContent: x.source }),
  ];
  return el(
    "div",
    {},
    ...r.reasons.map((x) =>
      lazy(el("details", { className: "reason" }, el("summary", {}, ...lines(x))), (d) => {
        d.append(el("ul", {}, ...x.examples.map((e) => el("li", {}, el("code", { textContent: e })))));
      }),
    ),
  );
}
