// The memory plan and the schedule as SVG, walked through with the mouse or the arrow keys.

const NICE = (span, n) => {
  const raw = span / n,
    p = 10 ** Math.floor(Math.log10(raw || 1));
  return [1, 2, 5, 10].map((k) => k * p).find((k) => k >= raw) || p;
};
function tools(name, redraw) {
  const zoom = (k) =>
    el("button", {
      className: "plain",
      type: "button",
      textContent: k > 1 ? "Zoom in" : "Zoom out",
      "data-zoom": k,
      onclick: () => {
        state.zoom[name] = Math.min(64, Math.max(1, state.zoom[name] * k));
        redraw();
      },
    });
  return el(
    "div",
    { className: "tools" },
    zoom(2),
    zoom(0.5),
    el("span", {
      className: "soft",
      textContent: "Arrow keys walk through the picture, Enter shows the op in the graph.",
    }),
  );
}
function picture(id, label, width, height, parts, marks, describe, open) {
  // `marks`: elements that can be hovered and walked through; `describe(i)`: [title, lines]; `open(i)`: an op's index
  const root = svg("svg", { width, height, tabindex: 0, role: "img", "aria-label": label, id }, ...parts);
  marks.forEach((m, i) => {
    m.classList.add("b");
    m.setAttribute("data-i", i);
  });
  let current = -1;
  const set = (i) => {
    if (current >= 0) marks[current].classList.remove("current");
    current = i;
    if (i >= 0) marks[i].classList.add("current");
  };
  const tip = (i, x, y) => showTip(...describe(i), x, y);
  root.addEventListener("mousemove", (e) => {
    const i = e.target.getAttribute("data-i");
    if (i === null) hideTip();
    else tip(+i, e.clientX, e.clientY);
  });
  root.addEventListener("mouseleave", hideTip);
  root.addEventListener("blur", () => {
    set(-1);
    hideTip();
  });
  root.addEventListener("click", (e) => {
    const i = e.target.getAttribute("data-i");
    if (i !== null) {
      hideTip();
      go(open(+i));
    }
  });
  root.addEventListener("keydown", (e) => {
    const d = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (d && marks.length) {
      e.preventDefault();
      set(Math.min(marks.length - 1, Math.max(0, current + d)));
      marks[current].scrollIntoView({ block: "nearest", inline: "nearest" });
      const r = marks[current].getBoundingClientRect();
      tip(current, r.left + Math.min(r.width / 2, 60), r.bottom);
    } else if (e.key === "Enter" && current >= 0) {
      hideTip();
      go(open(current));
    } else if (e.key === "Escape") hideTip();
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
function hideTip() {
  $("tip").hidden = true;
}
const frame = (id) => Math.max(300, $(id).clientWidth - 2);
function swap(id, nodes) {
  // redraws without losing the place in the picture
  const old = $(id).querySelector(".picture"),
    ratio = old && old.scrollWidth > old.clientWidth ? old.scrollLeft / old.scrollWidth : 0;
  $(id).replaceChildren(...nodes);
  const now = $(id).querySelector(".picture");
  if (now) now.scrollLeft = ratio * now.scrollWidth;
}
function drawMemory() {
  const f = fn(),
    memory = f.memory;
  if (!memory) {
    $("memory-body").replaceChildren(
      el("p", { className: "empty", textContent: "The module has no memory plan: pass plan-memory was not run." }),
    );
    return;
  }
  const at = memory.at[state.step],
    arena = f.totals[state.step].arena || 1;
  const runs = f.ops.flatMap((op, i) => (op.weight ? [] : [i])),
    column = new Map(runs.map((i, n) => [i, n]));
  const left = 70,
    top = 18,
    bottom = 92,
    height = 440;
  const width = frame("memory-body") * state.zoom.memory,
    inner = width - left - 12,
    h = height - top - bottom;
  const x = (n) => left + (n / runs.length) * inner,
    y = (b) => top + h - (b / arena) * h;
  const parts = [],
    unit = 2 ** Math.ceil(Math.log2(arena / 6));
  for (let b = 0; b <= arena; b += unit)
    parts.push(
      svg("line", { x1: left, x2: width - 12, y1: y(b), y2: y(b), class: "grid" }),
      svg("text", { x: left - 6, y: y(b) + 4, "text-anchor": "end" }, bytes(b)),
    );
  const marks = memory.buffers.map((b, i) => {
    const a = column.get(b.start),
      z = column.get(b.end) ?? runs.length - 1;
    return svg("rect", {
      x: x(a),
      width: Math.max(0.6, x(z + 1) - x(a)),
      y: y(at.offset[i] + at.size[i]),
      height: Math.max(0.6, (at.size[i] / arena) * h),
      class: family(f.ops[b.start].op),
    });
  });
  const labels = marks.flatMap((m, i) => {
    const w = +m.getAttribute("width"),
      tall = +m.getAttribute("height"),
      name = memory.buffers[i].name;
    return w > name.length * 6.6 + 8 && tall > 13
      ? [
          svg(
            "text",
            { x: +m.getAttribute("x") + 4, y: +m.getAttribute("y") + Math.min(tall / 2 + 4, 14), class: "in" },
            name,
          ),
        ]
      : [];
  });
  const used = new Array(runs.length).fill(0);
  memory.buffers.forEach((b, i) => {
    for (let n = column.get(b.start); n <= (column.get(b.end) ?? runs.length - 1); n++) used[n] += at.size[i];
  });
  const low = height - 24,
    strip = 46; // below the picture: the sum of the buffers in use
  const line = svg("polygon", {
    class: "use",
    points: [
      `${x(0)},${low}`,
      ...used.flatMap((u, n) => [
        `${x(n)},${low - (u / (at.peak || 1)) * strip}`,
        `${x(n + 1)},${low - (u / (at.peak || 1)) * strip}`,
      ]),
      `${x(runs.length)},${low}`,
    ].join(" "),
  });
  const peak = column.get(at.peak_at) ?? 0,
    px = x(peak + 0.5),
    flip = px > width * 0.7;
  parts.push(
    ...marks,
    ...labels,
    line,
    svg("line", { x1: px, x2: px, y1: top, y2: low, class: "peak" }),
    svg("text", { x: left - 6, y: low - strip + 10, "text-anchor": "end" }, "in use"),
    svg("text", { x: left - 6, y: low - strip + 24, "text-anchor": "end" }, bytes(at.peak)),
    svg(
      "text",
      { x: px + (flip ? -5 : 5), y: 12, class: "peak", "text-anchor": flip ? "end" : "start" },
      `peak: ${bytes(at.peak)} at op ${at.peak_at}`,
    ),
    svg("text", { x: left, y: height - 8 }, `ops of the step, ${runs[0]} to ${runs[runs.length - 1]}`),
  );
  const describe = (i) => {
    const b = memory.buffers[i];
    return [
      `${b.name} : ${b.type}`,
      [
        `at ${at.offset[i].toLocaleString("en")} = ${b.offset}`,
        `${bytes(at.size[i])} = ${b.size}`,
        `in use by ops ${b.start} to ${b.end}: ${[...new Set(b.users.map((u) => f.ops[u].op))].join(", ")}`,
      ],
    ];
  };
  const root = picture(
    "memory-svg",
    "Memory plan: buffers over op time",
    width,
    height,
    parts,
    marks,
    describe,
    (i) => memory.buffers[i].start,
  );
  const rows = memory.buffers.map((b, i) => [
    el("code", { textContent: b.name }),
    `${b.start} to ${b.end}`,
    at.offset[i].toLocaleString("en"),
    at.size[i].toLocaleString("en"),
    el("code", { textContent: b.offset }),
    el("code", { textContent: b.size }),
  ]);
  const list = lazy(
    el("details", {}, el("summary", { textContent: `${count(memory.buffers.length, "buffer")} as a table` })),
    (d) =>
      d.append(
        el(
          "div",
          { className: "tall", tabIndex: 0, role: "region", "aria-label": "Buffers" },
          table(["buffer", "ops", "offset", "bytes", "offset formula", "bytes formula"], rows, [2, 3]),
        ),
      ),
  );
  swap("memory-body", [
    el("p", {
      className: "note",
      textContent: `Buffers over the ops that use them, at ${sizes(step())}, and below their sum. Arena: ${f.arena} = ${bytes(f.totals[state.step].arena)}.`,
    }),
    tools("memory", drawMemory),
    el("div", { className: "picture" }, root),
    key(marks.map((m) => m.classList[0])),
    list,
  ]);
}
function drawTimeline() {
  const f = fn(),
    t = f.timeline[state.step],
    c = cost(),
    end = Math.max(...t.slots.map((s) => s[3]), 1e-9);
  if (!t.slots.length) {
    $("timeline-body").replaceChildren(el("p", { className: "empty", textContent: "No op takes time." }));
    return;
  }
  const left = 90,
    lane = 40,
    top = 8,
    width = frame("timeline-body") * state.zoom.timeline,
    inner = width - left - 16;
  const height = top + lane * t.streams.length + 28,
    x = (us) => left + (us / end) * inner,
    y = (n) => top + n * lane;
  const parts = [],
    unit = NICE(end, 8 * state.zoom.timeline);
  for (let n = 0; n * unit <= end; n++)
    parts.push(
      svg("line", { x1: x(n * unit), x2: x(n * unit), y1: top, y2: height - 22, class: "grid" }),
      svg("text", { x: x(n * unit) + 2, y: height - 8 }, time(n * unit)),
    );
  t.streams.forEach((name, n) => parts.push(svg("text", { x: 6, y: y(n) + lane / 2 + 4 }, name)));
  const marks = t.slots.map(([op, n, a, z]) =>
    svg("rect", {
      x: x(a),
      width: Math.max(0.5, x(z) - x(a)),
      y: y(n) + 4,
      height: lane - 8,
      class: family(f.ops[op].op),
    }),
  );
  const labels = t.slots.flatMap(([op, n, a, z]) =>
    x(z) - x(a) > f.ops[op].op.length * 6.6 + 8
      ? [
          svg(
            "text",
            { x: x(a) + 4, y: y(n) + lane / 2 + 4, class: family(f.ops[op].op) === "wait" ? "in dim" : "in" },
            f.ops[op].op,
          ),
        ]
      : [],
  );
  const flows = t.slots.flatMap(([, n, , z, from]) =>
    from < 0
      ? []
      : [
          svg("path", {
            class: "flow",
            d: `M${x(t.slots[from][3])},${y(t.slots[from][1]) + lane / 2} L${x(z)},${y(n) + lane / 2}`,
          }),
        ],
  );
  parts.push(...marks, ...labels, ...flows);
  const describe = (i) => {
    const [op, n, a, z, from] = t.slots[i],
      o = f.ops[op];
    return [
      `${o.out.join(", ")}${o.out.length ? " = " : ""}${o.op}`,
      [
        `${t.streams[n]}, ${time(a)} to ${time(z)}: ${time(z - a)}`,
        ...(c.limit[op]
          ? [
              `limit: ${c.limit[op]}; ${bytes(c.bytes[op])}, ${flops(c.flops[op])}; ${percent(c.compute[op])} of compute, ${percent(c.memory[op])} of bandwidth`,
            ]
          : []),
        ...(from >= 0 ? [`waits for op ${t.slots[from][0]}, ${f.ops[t.slots[from][0]].op}`] : []),
        ...(o.source ? [o.source] : []),
      ],
    ];
  };
  const root = picture(
    "timeline-svg",
    "Schedule: ops per stream over time",
    width,
    height,
    parts,
    marks,
    describe,
    (i) => t.slots[i][0],
  );
  const busy = t.streams.map(
    (name, n) =>
      `${name} ${percent(sum(t.slots.filter((s, i) => s[1] === n && !t.waits.includes(i)).map((s) => s[3] - s[2])) / end)}`,
  );
  swap("timeline-body", [
    el("p", {
      className: "note",
      textContent: `Estimated, at ${sizes(step())}: ${time(end)}. Busy: ${busy.join(", ")}.`,
    }),
    tools("timeline", drawTimeline),
    el("div", { className: "picture" }, root),
    key(marks.map((m) => m.classList[0])),
  ]);
}
