"use strict";
// What the page holds, and how maps are unpacked. A field is a map of one value a superpixel: codes
// (0 for no value, else a step between low and high), levels, top (where colours end at first) and
// range (where they begin and end now). A gene is a field; its sd, if there is one, is another.
// Places are in superpixels, continuous: 0 is the upper or left edge of the first one.
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const [ROWS, COLUMNS] = data.shape;
const SUPERPIXEL_MM2 = (data.um / 1000) ** 2;
const KEPT = 120; // genes in memory, the last used

const loaded = new Map(); // number of a gene -> promise of it, the last used at the end
const awaited = new Map(); // number of a gene -> what to call with the facts that its script brings

async function unpack(text) {
  const letters = atob(text), packed = new Uint8Array(letters.length);
  for (let i = 0; i < packed.length; i++) packed[i] = letters.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function undoDifferences(codes) { // to the mean of the left and the upper neighbour, in place
  for (let row = 0, i = 0; row < ROWS; row++) {
    for (let column = 0, left = 0; column < COLUMNS; column++, i++) {
      const upper = row ? codes[i - COLUMNS] : 0;
      left = (codes[i] + ((left + upper) >> 1)) & 255;
      codes[i] = left;
    }
  }
  return codes;
}

async function unpackField(name, packed) {
  const codes = undoDifferences(await unpack(packed.codes).catch(() => { throw new Error(`The map of ${name} is damaged`); }));
  if (codes.length !== ROWS * COLUMNS) throw new Error(`The map of ${name} is of another section`);
  return { ...packed, name, codes, range: [Math.min(0, packed.low), packed.top] };
}

const stepOf = (field) => (field.high - field.low) / (field.levels - 1);
const valueOf = (field, code) => field.low + (code - 1) * stepOf(field);
const valuesOf = (field) => Float64Array.from({ length: 256 }, (_, code) => field.means[code - 1] || 0); // for sums

// ----- genes -----
function takeGene(index, facts, stamp) { // called by the scripts in the folder beside the page
  const receive = awaited.get(index);
  if (receive && stamp === data.stamp) receive(facts);
}

function readBeside(index) {
  const name = data.genes[index], script = document.createElement("script");
  const gone = `The map of ${name} is in the folder ${data.folder}, which is not beside this page ` +
    "or is of another page or run. Put the page and its folder into one place, or make both anew.";
  return new Promise((resolve, reject) => {
    awaited.set(index, resolve);
    script.onload = () => reject(new Error(gone)); // without effect if it has called takeGene
    script.onerror = () => reject(new Error(gone));
    script.src = `${encodeURIComponent(data.folder)}/${index}.js`;
    document.head.append(script);
  }).then((facts) => {
    if (facts.name !== name) throw new Error(gone);
    return facts;
  }).finally(() => {
    script.remove();
    awaited.delete(index);
  });
}

async function unpackGene(index, facts) {
  const gene = await unpackField(facts.name, facts);
  if (facts.sd) gene.sd = await unpackField(`uncertainty of ${facts.name}`, facts.sd);
  return Object.assign(gene, { index });
}

async function makeGene(index) {
  const here = index < data.here ? JSON.parse(byId(`gene-${index}`).textContent) : null;
  if (here && !here.beside) return unpackGene(index, here);
  return readBeside(index).then((facts) => unpackGene(index, facts)).catch((error) => {
    if (!here) throw error;
    return unpackGene(index, { ...here, why: error.message }); // less than all is better than nothing
  });
}

function loadGene(index) {
  const promise = loaded.get(index) || makeGene(index);
  loaded.delete(index);
  loaded.set(index, promise);
  promise.catch(() => loaded.delete(index)); // so that it can be tried again
  if (loaded.size > KEPT) loaded.delete(loaded.keys().next().value);
  return promise;
}

// ----- words -----
function show(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 0.001 || size >= 1e6) return value.toExponential(2);
  return size >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
}

function inSteps(field, value) { // with as many decimals as the map was stored with
  const step = stepOf(field);
  return step < 1e-6 ? show(value) : value.toFixed(Math.max(0, Math.ceil(-Math.log10(step))));
}

function rankOf(index) {
  const rank = data.ranks[index];
  const r = data.r[index] === null ? "" : `, ${data.score} ${data.r[index].toFixed(2)}`;
  if (rank === null) return data.score ? `no ${data.score} is known` : "";
  return `rank ${rank} of ${data.ranked.toLocaleString("en")}${r}`;
}
