// Which gene is shown, or which three; the list of genes and the search in it.
const MOST_FOUND = 200; // genes of the folder in the list at once
const trio = [null, null, null]; // genes in red, green and blue
const asked = [null, null, null]; // what was asked for last for each of them: only that is shown
let gene = null, slot = 0; // the gene that is read out; its place in the trio
let replaces = false; // the next gene goes to the slot that was chosen, even if it has one

async function chooseGene(index) {
  const into = look.mixed ? nextSlot() : 0, mine = { index };
  asked[into] = mine;
  const next = await loadGene(index).catch((error) => {
    if (asked[into] === mine) asked[into] = null;
    if (gene) tickGene(gene.index);
    throw error;
  });
  if (asked[into] !== mine) return; // another one was chosen meanwhile
  asked[into] = null;
  if (look.mixed) trio[into] = next;
  gene = next;
  slot = into;
  showGene();
}

function nextSlot() { // the one that was chosen, else the first that has no gene, else the last one
  const free = trio.findIndex((one, i) => !one && !asked[i]), into = replaces || free < 0 ? slot : free;
  replaces = false;
  return into;
}

function shownNames() {
  return look.mixed ? trio.filter(Boolean).map((one) => one.name).join(" ") : gene.name;
}

function legend() { // the fields whose colours are in the picture, and their channels
  const single = kinds[0] === "overlay", bars = [], shows = (kind) => (single ? layer === kind : kinds.includes(kind));
  const spots = spotFields().length > 0 && (single ? byId("spots").checked : kinds.includes("spots"));
  const has = (field) => field && (shows("map") || (spots && field.spots));
  if (look.mixed) trio.forEach((field, channel) => has(field) && bars.push({ field, channel }));
  else if (shows("map") || spots) bars.push({ field: gene, channel: null });
  if (gene.sd && shows("uncertainty")) bars.push({ field: gene.sd, channel: null });
  return bars;
}

function paintLayers() {
  if (look.mixed) paintMix(layers.map, trio);
  else paintField(layers.map, gene);
  if (gene.sd) paintField(layers.uncertainty, gene.sd);
  byId("bars").replaceChildren(...legend().map(drawBar));
  drawKey();
  redraw();
}

function showGene() { // all that depends on the gene
  const names = look.mixed
    ? trio.map((one, i) => one && `${one.name} in ${MIX[i]}`).filter(Boolean).join(", ") : gene.name;
  canvas.setAttribute("aria-label", `H&E with the map of ${names}`);
  byId("spots").disabled = !spotFields().length;
  setLayers();
  paintLayers();
  showRange();
  drawScatter();
  markHeldOut();
  showSlots();
  tickGene(gene.index);
  if (mark) tell();
  noteAddress();
}

// ----- three genes -----
function showSlots() {
  byId("slots").hidden = !look.mixed;
  MIX.forEach((_, i) => {
    byId(`slot-${i}`).textContent = trio[i] ? trio[i].name : "none yet";
    byId(`clear-${i}`).disabled = !trio[i] || trio.filter(Boolean).length < 2;
  });
  document.querySelector(`[name="slot"][value="${slot}"]`).checked = true;
}

function setMode(mixed) { // one gene or three
  look.mixed = mixed;
  asked.fill(null);
  if (mixed && !trio.includes(gene)) trio[slot] = gene;
  if (mixed) slot = trio.indexOf(gene);
  document.querySelector(`[name="mode"][value="${mixed ? "three" : "one"}"]`).checked = true;
  showGene();
}

function chooseSlot(number) {
  slot = number;
  replaces = true;
  if (trio[slot]) gene = trio[slot];
  showGene();
}

function clearSlot(number) {
  asked[number] = null;
  trio[number] = null;
  if (!trio.includes(gene)) gene = trio.find(Boolean);
  slot = trio.indexOf(gene);
  showGene();
}

// ----- the list -----
function tickGene(index) {
  const input = document.querySelector(`#genes input[value="${index}"]`) || besideLabel(index).querySelector("input");
  input.checked = true;
}

function besideLabel(index) { // a gene of the folder in the list
  const label = byId("gene-form").content.firstElementChild.cloneNode(true);
  label.querySelector("input").value = index;
  label.querySelector(".name").textContent = data.genes[index];
  label.querySelector(".r").textContent = data.r[index] === null ? "" : data.r[index].toFixed(2);
  label.title = rankOf(index);
  byId("beside").append(label);
  return label;
}

function findGenes() {
  const text = byId("search").value.trim().toLowerCase();
  const fits = (index) => data.genes[index].toLowerCase().includes(text);
  for (const label of document.querySelectorAll("#genes > label")) label.hidden = !fits(Number(label.control.value));
  const all = text ? [...data.genes.keys()].filter(fits) : [];
  byId("beside").replaceChildren();
  all.filter((index) => index >= data.here).slice(0, MOST_FOUND).forEach(besideLabel);
  if (gene) tickGene(gene.index);
  byId("found").textContent = foundText(text, all);
  return all;
}

function foundText(text, all) {
  const n = data.genes.length.toLocaleString("en"), beside = data.genes.length - data.here;
  if (!text) return beside ? `${data.here} of ${n} genes; type a name to find any of the others.` : "";
  const exact = all.filter((index) => data.genes[index].toLowerCase() === text);
  if (all.length === 1 || exact.length === 1) {
    const index = exact[0] ?? all[0], rest = all.length > 1 ? `; ${all.length} genes have it in their name` : "";
    return [data.genes[index], rankOf(index)].filter(Boolean).join(": ") + rest;
  }
  if (!all.length) return `None of the ${n} genes with a map has “${text}” in its name.`;
  return `${all.length} of ${n} genes${all.length > MOST_FOUND ? `; the first ${MOST_FOUND} are listed` : ""}`;
}

function enterSearch(event) { // the first that is found, or the one of just that name
  if (event.key !== "Enter") return;
  const all = findGenes(), text = byId("search").value.trim(), same = (one) => data.genes[one].toLowerCase() === text.toLowerCase();
  const index = all.find((one) => data.genes[one] === text) ?? all.find(same) ?? all[0];
  if (index !== undefined) chooseGene(index).catch(fail);
}
