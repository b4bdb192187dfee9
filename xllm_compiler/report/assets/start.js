// Draws everything once, and again what depends on sizes or function.

function drawStep() {
  drawSummary();
  drawCosts();
  drawMemory();
  drawTimeline();
  rows().forEach(paint);
  paintLayers($("layers"));
}
function drawFunc() {
  choose(null);
  $("layers").replaceChildren();
  drawLayers();
  filter();
  drawStep();
}
data.scenarios.forEach((s, i) => {
  const input = el("input", {
    type: "radio",
    name: "step",
    value: i,
    checked: i === 0,
    onchange: () => {
      state.step = i;
      drawStep();
    },
  });
  $("steps").append(el("label", { title: sizes(s) }, input, s.name));
});
data.funcs.forEach((f, i) => $("func").append(el("option", { value: i, textContent: "@" + f.name })));
$("pick").hidden = data.funcs.length < 2;
$("func").addEventListener("change", () => {
  state.func = +$("func").value;
  drawFunc();
});
$("facts").append(table(["", ""], data.facts));
$("facts").querySelector("thead").remove();
let timer = 0;
$("filter").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(filter, 60);
});
$("weights").addEventListener("change", () => {
  drawLayers();
  filter();
});
document.addEventListener("click", (e) => {
  const t = e.target.closest("button");
  if (!t) return;
  if (t.dataset.go) go(+t.dataset.go);
  else if (t.dataset.v) choose(t.dataset.v === state.value ? null : t.dataset.v);
  else if (t.className === "info") toggleInfo(t.closest(".op"));
});
document.addEventListener("keydown", (e) => {
  if (e.key === "Escape" && state.value !== null) choose(null);
});
let wide = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== wide) {
    wide = innerWidth;
    drawMemory();
    drawTimeline();
  }
});
drawPasses();
drawRewrites();
if (data.funcs.length) drawFunc();
