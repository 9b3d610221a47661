// The page's events, and its start.
canvas.addEventListener("pointerdown", pressed);
canvas.addEventListener("pointermove", moved);
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, released);
canvas.addEventListener("wheel", wheeled, { passive: false });
canvas.addEventListener("keydown", keyed);

const onClick = (id, act) => byId(id).addEventListener("click", act);
const onChange = (selector, act) => {
  for (const input of document.querySelectorAll(selector)) input.addEventListener("change", () => act(input));
};

onClick("in", () => zoom(1.5));
onClick("out", () => zoom(1 / 1.5));
onClick("whole", wholeSection);
onClick("save-picture", savePicture);
onClick("save-counts", () => saveCounts().catch(fail));
onClick("save-outlines", saveOutlines);
onClick("range-reset", resetRange);
onClick("help-open", () => byId("help").showModal());
onClick("help-close", () => byId("help").close());
onClick("side", () => {
  byId("side").setAttribute("aria-pressed", byId("side").getAttribute("aria-pressed") !== "true");
  setLayers();
  showGene();
});
for (const button of document.querySelectorAll("[data-for]")) button.addEventListener("click", () => setTool(button.dataset.for));
for (const button of document.querySelectorAll(".save-chart")) button.addEventListener("click", () => saveChart(button));
byId("genes").addEventListener("change", (event) => chooseGene(Number(event.target.value)).catch(fail));
byId("search").addEventListener("input", findGenes);
byId("search").addEventListener("keydown", enterSearch);
byId("opacity").addEventListener("input", changeLook);
ENDS.forEach((id, end) => byId(id).addEventListener("input", () => moveRange(end)));
onChange('#fade, [name="palette"], [name="scale"]', changeLook);
onChange('#spots, #cells, [name="layer"], [name="kind"]', showGene);
onChange('[name="mode"]', (input) => setMode(input.value === "three"));
onChange('[name="slot"]', (input) => chooseSlot(Number(input.value)));
MIX.forEach((_, i) => onClick(`clear-${i}`, () => clearSlot(i)));
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches('input[type="search"]');
  if (event.key === "?" && !typing && !byId("help").open) byId("help").showModal();
});
window.addEventListener("hashchange", () => followAddress().catch(fail));
window.addEventListener("beforeprint", draw);

async function start() {
  if (!("DecompressionStream" in window)) throw new Error("The page cannot be shown: it needs a browser of 2023 or newer");
  for (const name of ["regions", "annotation"]) {
    if (!data[name]) continue;
    labels[name] = await unpack(data[name].codes);
    paintLabels(layers[name], labels[name], data[name].colours);
  }
  if (data.cells) cells = await unpackCells(data.cells);
  setTool("move");
  findGenes();
  byId("readout").textContent = "Point at the tissue, or move the mark with the arrow keys, to read the map.";
  await Promise.all([byId("image").decode(), followAddress()]);
  new ResizeObserver(() => (view.whole ? wholeSection() : limit())).observe(canvas);
  draw();
  isStarted = true;
  document.documentElement.dataset.ready = Math.round(performance.now()); // ms after the page was asked for
}

start().catch(fail);
