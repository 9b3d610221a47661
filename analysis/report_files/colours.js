// From values to colours. The picture, the spots, the colour bars and their ticks all go through
// shareOf and wordOf, so that they cannot disagree.
const look = { palette: null, scale: "linear", fade: true, opacity: 0.7, mixed: false };
const MIX = ["red", "green", "blue"]; // of up to three genes
const FULL_AT = 0.5; // share of the range from which on a colour hides the H&E, at full opacity
const CURVES = { // of a value; of the log, a hundredth of the gene's top is added to it
  linear: (value) => value,
  sqrt: (value) => Math.sqrt(Math.max(0, value)),
  log: (value, field) => Math.log1p(Math.max(0, value) / offsetOf(field)),
};
const BACK = { // and back again
  linear: (height) => height,
  sqrt: (height) => height ** 2,
  log: (height, field) => Math.expm1(height) * offsetOf(field),
};
const offsetOf = (field) => field.top / 100;
const clamp = (value, low = 0, high = 1) => Math.min(high, Math.max(low, value));

function fromHex(text) {
  return Uint8Array.from(text.match(/../g), (byte) => parseInt(byte, 16));
}

function shareOf(field, value, [low, high] = field.range) { // 0 to 1, where it stands in the range
  const [bottom, top] = [low, high].map((end) => CURVES[look.scale](end, field));
  if (top <= bottom) return Number(value >= high);
  return clamp((CURVES[look.scale](value, field) - bottom) / (top - bottom));
}

function valueAt(field, share, [low, high]) { // the value that stands there
  const [bottom, top] = [low, high].map((end) => CURVES[look.scale](end, field));
  return look.scale === "linear" ? low + share * (high - low) : BACK[look.scale](bottom + share * (top - bottom), field);
}

const levelOf = (field, value) => Math.round(255 * shareOf(field, value));
const alphaOf = (level) => (look.fade ? Math.min(255, Math.round(level / FULL_AT)) : 255);

// The bytes red, green, blue and alpha of a colour, the lowest first. It is solid in spots, and
// where nothing fades.
function wordOf(level, channel = null, solid = !look.fade) {
  if (channel !== null) return mixedWord(...MIX.map((_, i) => (i === channel ? level : 0)), solid);
  const at = 3 * level, [red, green, blue] = [look.palette[at], look.palette[at + 1], look.palette[at + 2]];
  return (((solid ? 255 : alphaOf(level)) << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

function mixedWord(red, green, blue, solid = !look.fade) { // up to three genes: one colour each, added
  if (solid) return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  const most = Math.max(red, green, blue), times = most ? 255 / most : 0; // the lower, the clearer, not darker
  return ((alphaOf(most) << 24) | ((blue * times) << 16) | ((green * times) << 8) | (red * times)) >>> 0;
}

const bytesOf = (word) => [word & 255, (word >> 8) & 255, (word >> 16) & 255, word >>> 24];
const cssOf = (word) => `rgb(${bytesOf(word).slice(0, 3)})`;

function overTissue(word) { // as it looks over the mean colour of the tissue
  const [red, green, blue, alpha] = bytesOf(word), share = (alpha / 255) * look.opacity;
  return [red, green, blue].map((byte, i) => Math.round(share * byte + (1 - share) * data.tissue[i]));
}

function wordsOf(field, word) { // the word of every code; 0, no value, stays clear
  const words = new Uint32Array(256);
  for (let code = 1; code <= field.levels; code++) words[code] = word(levelOf(field, valueOf(field, code)));
  return words;
}

// ----- layers: an image of one pixel a superpixel -----
function makeLayer() {
  const layer = document.createElement("canvas");
  [layer.width, layer.height] = [COLUMNS, ROWS];
  return layer;
}

function paintCodes(layer, codes, words) {
  const image = new ImageData(COLUMNS, ROWS), pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = words[codes[i]];
  layer.getContext("2d").putImageData(image, 0, 0);
}

function paintField(layer, field) {
  paintCodes(layer, field.codes, wordsOf(field, (level) => wordOf(level)));
}

function paintMix(layer, fields) { // of three, some of which may be null
  const none = { codes: new Uint8Array(ROWS * COLUMNS), words: new Uint32Array(256) };
  const [red, green, blue] = fields.map((field) =>
    field ? { codes: field.codes, words: wordsOf(field, (level) => level) } : none);
  const image = new ImageData(COLUMNS, ROWS), pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) {
    if (red.codes[i] | green.codes[i] | blue.codes[i]) pixels[i] = mixedWord(red.words[red.codes[i]], green.words[green.codes[i]], blue.words[blue.codes[i]]);
  }
  layer.getContext("2d").putImageData(image, 0, 0);
}

function paintLabels(layer, codes, colours) {
  const words = new Uint32Array(256);
  colours.forEach((colour, i) => {
    const [red, green, blue] = fromHex(colour.slice(1));
    words[i + 1] = ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  });
  paintCodes(layer, codes, words);
}

// ----- colour bars -----
function roundValues(field) { // for ticks: multiples of 1, 2 or 5, no two of them close together
  const [low, high] = field.range, found = [], close = 0.13;
  const add = (value) => {
    const share = shareOf(field, value);
    if (value >= low && value <= high && found.every((old) => Math.abs(old.share - share) >= close)) {
      found.push({ value, share });
    }
  };
  if (look.scale === "linear") ticksBetween(low, high).forEach(add);
  else {
    const power = Math.floor(Math.log10(high)), values = [];
    for (let p = power; p > power - 5; p--) for (const times of [5, 2, 1]) values.push(Number((times * 10 ** p).toPrecision(1)));
    [Math.max(low, 0), ...values].forEach(add);
  }
  return found.sort((a, b) => a.value - b.value);
}

function ticksBetween(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  if (!(rough > 0)) return [low];
  const step = [1, 2, 5, 10].find((times) => times * power >= rough * (1 - 1e-9)) * power, values = [];
  for (let i = Math.ceil(low / step - 1e-6); i <= high / step + 1e-6; i++) values.push(Number((i * step).toPrecision(6)));
  return values;
}

function rampOf(field, channel) { // two rows: the colours as they are, and as they look over tissue
  const image = new ImageData(256, 2);
  for (let level = 0; level < 256; level++) {
    image.data.set(bytesOf(wordOf(level, channel, true)), 4 * level);
    image.data.set([...overTissue(wordOf(level, channel)), 255], 4 * (256 + level));
  }
  const ramp = document.createElement("canvas");
  [ramp.width, ramp.height] = [256, 2];
  ramp.getContext("2d").putImageData(image, 0, 0);
  return ramp;
}

function barText(field) {
  const [low, high] = field.range.map(show), curve = { linear: "", sqrt: ", square-root scale", log: ", logarithmic scale" };
  return `counts per superpixel of ${data.um} µm in steps of ${show(Number(stepOf(field).toPrecision(2)))}; ` +
    `colours from ${low} to ${high} and more${curve[look.scale]}`;
}

function drawBar({ field, channel }) { // a <figure> with the ramp, its ticks and its words
  const bar = byId("bar-form").content.firstElementChild.cloneNode(true), ramp = rampOf(field, channel);
  ramp.setAttribute("role", "img");
  ramp.setAttribute("aria-label", `Colour scale of ${field.name}: ${barText(field)}`);
  bar.prepend(ramp);
  bar.querySelector(".ticks").replaceChildren(...roundValues(field).map(({ value, share }) => {
    const tick = document.createElement("span");
    tick.textContent = show(value);
    tick.style.left = `${100 * share}%`;
    return tick;
  }));
  const colour = channel === null ? "" : ` in ${MIX[channel]}`, rank = field.index === undefined ? "" : rankOf(field.index);
  bar.querySelector("strong").textContent = field.name + colour;
  bar.querySelector(".rank").textContent = [rank, aloneText(field)].filter(Boolean).join("; ");
  bar.querySelector(".bar-text").textContent = barText(field) + (field.why ? `. Without ${field.beside.join(", ")}: ${field.why}` : "");
  return bar;
}

const aloneText = (field) => (data.alone.includes(field.index) ? "predicted from the H&E by a reference, not measured" : "");
