// The controls beside the picture, and the state of the view in the address.
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const choose = (name, value) => {
  const input = [...document.querySelectorAll(`input[name="${name}"]`)].find((one) => one.value === value);
  if (input && !input.disabled) input.checked = true;
};

function fail(error) {
  byId("readout").textContent = `${error.message || error}`;
  byId("announced").textContent = byId("readout").textContent;
}

function setLayers() { // what can be chosen, now and with this gene
  const there = { uncertainty: Boolean(gene && gene.sd), regions: Boolean(labels.regions), annotation: Boolean(labels.annotation) };
  for (const [name, is] of Object.entries(there)) document.querySelector(`[name="layer"][value="${name}"]`).disabled = !is;
  document.querySelector('[name="kind"][value="uncertainty"]').disabled = !there.uncertainty;
  document.querySelector('[name="kind"][value="spots"]').disabled = !data.spots || !spotFields().length;
  byId("cells").disabled = !cells;
  if (document.querySelector('[name="layer"]:checked').disabled) choose("layer", "map");
  layer = chosen("layer");
  setKinds();
}

function setKinds() { // one picture, or those that are ticked side by side
  const ticked = [...document.querySelectorAll('[name="kind"]:checked:not(:disabled)')].map((input) => input.value);
  const side = byId("side").getAttribute("aria-pressed") === "true" && ticked.length > 0;
  const next = side ? ticked : ["overlay"];
  byId("kinds").hidden = byId("side").getAttribute("aria-pressed") !== "true";
  if (String(next) === String(kinds)) return;
  kinds = next;
  wholeSection();
}

function readLook() { // palette, scale, opacity, fading
  look.palette = fromHex(data.palettes[chosen("palette")]);
  look.scale = chosen("scale");
  look.fade = byId("fade").checked;
  look.opacity = byId("opacity").value / 100;
  const text = `${byId("opacity").value} %`;
  byId("opacity-text").textContent = text;
  byId("opacity").setAttribute("aria-valuetext", text);
}

function changeLook() {
  readLook();
  paintLayers();
  showRange();
  noteAddress();
}

function setTool(name) {
  tool = name;
  dropArea();
  canvas.dataset.tool = name;
  for (const button of document.querySelectorAll("[data-for]")) button.setAttribute("aria-pressed", button.dataset.for === name);
  byId("tool-text").textContent = {
    move: "",
    rectangle: "Drag a rectangle over the picture. By keys: space puts a corner at the mark, enter ends, escape drops.",
    lasso: "Draw around an area. By keys: space puts a corner at the mark, enter ends, escape drops.",
  }[name];
}

// ----- range: two handles over all values of the field, along the scale -----
const ENDS = ["range-low", "range-high"], HANDLE_STEPS = 1000;
const extentOf = (field) => [Math.min(0, field.low), Math.max(field.high, field.top)];
const rangeField = () => (kinds[0] === "overlay" && layer === "uncertainty" && gene.sd ? gene.sd : gene);

function showRange() {
  const field = rangeField();
  ENDS.forEach((id, end) => {
    byId(id).value = Math.round(HANDLE_STEPS * shareOf(field, field.range[end], extentOf(field)));
    byId(id).setAttribute("aria-valuetext", `${show(field.range[end])} counts`);
  });
  byId("range-text").textContent = `${field.range.map(show).join(" to ")}`;
}

function moveRange(end) {
  const field = rangeField(), handles = ENDS.map((id) => Number(byId(id).value));
  const held = end ? Math.max(handles[1], handles[0] + 1) : Math.min(handles[0], handles[1] - 1);
  field.range[end] = valueAt(field, clamp(held, 0, HANDLE_STEPS) / HANDLE_STEPS, extentOf(field));
  if (field.range[0] >= field.range[1]) field.range[end] = valueAt(field, Number(end), extentOf(field));
  paintLayers();
  showRange();
  noteAddress();
}

function resetRange() {
  const field = rangeField();
  field.range = [Math.min(0, field.low), field.top];
  paintLayers();
  showRange();
  noteAddress();
}

// ----- the address: what is not as it was at first -----
let noting = 0, isStarted = false;

function describeView() {
  const words = new URLSearchParams(), round = (value) => Number(value.toPrecision(6));
  if (look.mixed) trio.forEach((one) => words.append("rgb", one ? one.name : ""));
  else if (gene.index) words.set("gene", gene.name);
  if (look.mixed) words.set("slot", slot);
  if (layer !== "map") words.set("layer", layer);
  for (const name of ["spots", "cells"]) if (byId(name).checked) words.set(name, "1");
  if (kinds[0] !== "overlay") words.set("side", kinds.join(" "));
  if (chosen("palette") !== Object.keys(data.palettes)[0]) words.set("palette", chosen("palette"));
  if (look.scale !== "linear") words.set("scale", look.scale);
  if (!look.fade) words.set("fade", "0");
  if (byId("opacity").value !== byId("opacity").defaultValue) words.set("opacity", byId("opacity").value);
  const field = rangeField(), first = [Math.min(0, field.low), field.top];
  if (field.range.some((end, i) => end !== first[i])) words.set("range", field.range.map(round).join(" "));
  if (!view.whole) {
    const [column, row] = toSection(...size().map((side) => side / 2));
    words.set("at", [column, row, view.scale].map(round).join(" "));
  }
  return words.toString();
}

function noteAddress() {
  if (!isStarted) return;
  clearTimeout(noting);
  noting = setTimeout(() => {
    const text = `#${describeView()}`;
    if (text !== (location.hash || "#")) history.replaceState(null, "", text);
  }, 250);
}

let following = 0; // of several addresses the last one counts

async function followAddress() { // the genes first, since the layers depend on them
  const words = new URLSearchParams(location.hash.slice(1)), mine = ++following;
  const found = await findNamed(words);
  if (mine !== following) return;
  takeGenes(found, Number(words.get("slot")));
  choose("mode", look.mixed ? "three" : "one");
  choose("palette", words.get("palette") || Object.keys(data.palettes)[0]);
  choose("scale", words.get("scale") || "linear");
  byId("fade").checked = words.get("fade") !== "0";
  byId("opacity").value = words.get("opacity") || byId("opacity").defaultValue;
  readLook();
  for (const name of ["spots", "cells"]) byId(name).checked = words.get(name) === "1";
  byId("cells").checked &&= Boolean(cells);
  const side = (words.get("side") || "").split(" ").filter(Boolean);
  byId("side").setAttribute("aria-pressed", side.length > 0);
  if (side.length) for (const input of document.querySelectorAll('[name="kind"]')) input.checked = side.includes(input.value);
  setLayers();
  choose("layer", words.get("layer") || "map");
  setLayers();
  const [range, at] = ["range", "at"].map((name) => (words.get(name) || "").split(" ").map(Number));
  const meant = layer === (words.get("layer") || "map"); // that layer may not be there
  if (meant && range.length === 2 && range.every(Number.isFinite) && range[0] < range[1]) rangeField().range = range;
  showGene();
  wholeSection();
  if (at.length === 3 && at.every(Number.isFinite)) lookAt(...at);
  if (found.error) fail(found.error);
}

async function findNamed(words) { // the gene of the address, or up to three; those that cannot be read are left out
  const found = { trio: [], gene: null, error: null }, indexOf = (name) => data.genes.indexOf(name);
  const load = (name) => (indexOf(name) < 0 ? null : loadGene(indexOf(name)).catch((error) => { found.error = error; return null; }));
  found.trio = await Promise.all(words.getAll("rgb").slice(0, 3).map(load));
  if (!found.trio.some(Boolean)) found.gene = (await load(words.get("gene"))) || (await loadGene(0));
  return found;
}

function takeGenes(found, wanted) {
  look.mixed = !found.gene;
  if (found.gene) {
    gene = found.gene;
    return;
  }
  MIX.forEach((_, i) => { trio[i] = found.trio[i] || null; });
  gene = trio[clamp(wanted || 0, 0, 2)] || trio.find(Boolean);
  slot = trio.indexOf(gene);
}

function lookAt(column, row, scale) {
  const [width, height] = size();
  Object.assign(view, { scale, left: column - width / scale / 2, top: row - height / scale / 2 });
  limit();
}
