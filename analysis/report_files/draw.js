// The picture: the H&E, what lies over it, the spots, cells, areas and the mark.
const layers = { map: makeLayer(), uncertainty: makeLayer(), regions: makeLayer(), annotation: makeLayer() };
const labels = {}; // codes of regions and annotation, by name
let cells = null, layer = "map";
const NO_CLASS = "#30343a"; // of cells

const discArea = () => Math.PI * data.radius ** 2; // superpixels under a spot
const inkOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw() {
  const sharp = window.devicePixelRatio || 1;
  const pixels = [Math.round(canvas.clientWidth * sharp), Math.round(canvas.clientHeight * sharp)];
  if (canvas.width !== pixels[0] || canvas.height !== pixels[1]) [canvas.width, canvas.height] = pixels;
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  drawScene(pen, frames(), sharp, true);
  const { length, text } = scaleBar();
  byId("scale-text").textContent = text;
  byId("scale-bar").style.width = `${length}px`;
}

function drawScene(to, all, sharp, withMark) { // sharp: pixels of the canvas per CSS px
  for (const frame of all) {
    to.save();
    to.setTransform(sharp, 0, 0, sharp, frame.x * sharp, frame.y * sharp);
    to.beginPath();
    to.rect(0, 0, frame.width, frame.height);
    to.clip();
    const scale = view.scale * sharp;
    to.setTransform(scale, 0, 0, scale, frame.x * sharp - view.left * scale, frame.y * sharp - view.top * scale);
    drawFrame(to, frame.kind, scale, withMark);
    to.setTransform(sharp, 0, 0, sharp, frame.x * sharp, frame.y * sharp);
    if (all.length > 1) drawTitle(to, frame);
    to.restore();
  }
}

function drawFrame(to, kind, scale, withMark) {
  const px = 1 / view.scale, alone = kind === "overlay";
  to.imageSmoothingEnabled = true;
  to.imageSmoothingQuality = "high";
  to.drawImage(byId("image"), 0, 0, COLUMNS, ROWS);
  const over = alone ? layers[layer] : layers[kind];
  const hasSd = gene && gene.sd;
  if (over && gene && !(over === layers.uncertainty && !hasSd)) {
    to.globalAlpha = look.opacity;
    to.imageSmoothingEnabled = scale < 1; // larger superpixels are shown as they are
    to.drawImage(over, 0, 0, COLUMNS, ROWS);
    to.globalAlpha = 1;
  }
  if (cells && byId("cells").checked && alone) drawCells(to, px);
  if (kind === "spots" || (alone && byId("spots").checked)) drawSpots(to, px);
  drawAreas(to, px);
  if (mark && withMark) drawMark(to, px);
}

function drawTitle(to, { kind, width }) {
  const names = { image: "H&E", spots: "spots, as measured", map: "map", uncertainty: "uncertainty (sd)" };
  to.font = "600 13px system-ui, sans-serif";
  const text = names[kind], wide = to.measureText(text).width + 14;
  to.fillStyle = "rgba(255, 255, 255, .88)";
  to.fillRect(width - wide - 6, 6, wide, 22);
  to.fillStyle = "#1d1f21";
  to.fillText(text, width - wide + 1, 21);
}

function drawSpots(to, px) {
  if (!data.spots || !spotFields().length) return;
  to.lineWidth = px;
  to.strokeStyle = "rgba(255, 255, 255, .8)";
  data.spots.rows.forEach((row, i) => {
    to.fillStyle = cssOf(spotWord(i));
    to.beginPath();
    to.arc(data.spots.columns[i], row, data.radius, 0, 2 * Math.PI);
    to.fill();
    to.stroke();
  });
}

const spotFields = () => (look.mixed ? trio : [gene]).filter((field) => field && field.spots);

function spotWord(i) { // its counts divided by the superpixels under it, in the colours of the map
  const level = (field) => (field && field.spots ? levelOf(field, field.spots.measured[i] / discArea()) : 0);
  return look.mixed ? mixedWord(...trio.map(level), true) : wordOf(level(gene), null, true);
}

async function unpackCells({ places, radii, classes }) {
  const [xy, radius, kind] = await Promise.all([places, radii, classes].map(unpack));
  const steps = new Uint16Array(xy.buffer), n = radius.length;
  const along = (from, side) => Float32Array.from(steps.subarray(from, from + n), (step) => (step / 65535) * side);
  return { n, columns: along(0, COLUMNS), rows: along(n, ROWS), radii: Float32Array.from(radius, (r) => r / 32), kind };
}

function drawCells(to, px) { // circles of the cells' areas, in the colours of their classes
  const [width, height] = size().map((side) => side / view.scale), least = 0.8 * px;
  const paths = [null, ...data.cells.colours].map(() => new Path2D());
  for (let i = 0; i < cells.n; i++) {
    const column = cells.columns[i], row = cells.rows[i], radius = Math.max(least, cells.radii[i]);
    if (column < view.left - 2 || row < view.top - 2 || column > view.left + width + 2 || row > view.top + height + 2) continue;
    const path = paths[cells.kind[i]];
    if (radius < 2.5 * px) path.rect(column - radius, row - radius, 2 * radius, 2 * radius);
    else {
      path.moveTo(column + radius, row);
      path.arc(column, row, radius, 0, 2 * Math.PI);
    }
  }
  const near = view.scale > 6;
  to.lineWidth = near ? 2 * px : 1.2 * px;
  if (!near) { // a dark rim: a region below may have the colour of the class
    to.strokeStyle = NO_CLASS;
    paths.forEach((path) => to.stroke(path));
  }
  paths.forEach((path, i) => {
    to.fillStyle = to.strokeStyle = i ? data.cells.colours[i - 1] : NO_CLASS;
    to.globalAlpha = near ? 0.35 : 1; // near by, what lies under them is to be seen
    to.fill(path);
    to.globalAlpha = 1;
    if (near) to.stroke(path);
  });
}

function keyItems() { // colour and name of all that has a colour of its own: labels and classes of cells
  const items = [];
  if (kinds[0] !== "overlay") return items;
  if (labels[layer]) data[layer].colours.forEach((colour, i) => items.push({ colour, text: labelName(layer, i + 1) }));
  if (!cells || !byId("cells").checked) return items;
  data.cells.names.forEach((name, i) => items.push({ colour: data.cells.colours[i], text: `cells: ${name}` }));
  return [...items, { colour: NO_CLASS, text: data.cells.names.length ? "cells without a class" : "cells" }];
}

function drawKey() {
  byId("key").replaceChildren(...keyItems().map(({ colour, text }) => {
    const item = document.createElement("li"), box = svg("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" });
    box.append(svg("rect", { width: 12, height: 12, rx: 2, fill: colour }));
    item.append(box, text);
    return item;
  }));
}

function drawMark(to, px) { // a box around the superpixel, black and white to be seen on anything
  const side = Math.max(1, 9 * px), middle = [mark.column + 0.5, mark.row + 0.5];
  for (const [width, colour] of [[4 * px, "#000"], [2 * px, "#fff"]]) {
    to.lineWidth = width;
    to.strokeStyle = colour;
    to.strokeRect(middle[0] - side / 2, middle[1] - side / 2, side, side);
  }
}

function scaleBar() { // its length in CSS px, and what it says
  const longest = (Math.min(160, size()[0] / 3) / view.scale) * data.um;
  const power = 10 ** Math.floor(Math.log10(longest));
  const um = [5, 2, 1].find((times) => times * power <= longest) * power;
  return { length: (um / data.um) * view.scale, text: um >= 1000 ? `${um / 1000} mm` : `${um} µm` };
}

// ----- the value at the mark -----
function spotAt(row, column) {
  if (!data.spots) return -1;
  const reach = data.radius ** 2;
  return data.spots.rows.findIndex((r, i) => (r - row) ** 2 + (data.spots.columns[i] - column) ** 2 <= reach);
}

function cellAt(row, column) {
  if (!cells || !byId("cells").checked) return -1;
  for (let i = 0; i < cells.n; i++) {
    if ((cells.rows[i] - row) ** 2 + (cells.columns[i] - column) ** 2 <= cells.radii[i] ** 2) return i;
  }
  return -1;
}

function place(row, column, x = column + 0.5, y = row + 0.5) {
  if (row < 0 || column < 0 || row >= ROWS || column >= COLUMNS) return;
  mark = { row, column, spot: spotAt(y, x), cell: cellAt(y, x) };
  tell();
  redraw();
}

function valueText(field, at) {
  const code = field.codes[at];
  return code ? `${inSteps(field, valueOf(field, code))} counts` : "no tissue";
}

function factsAt(at) { // what there is to say of a superpixel beside the gene's value
  const parts = [`row ${mark.row}, column ${mark.column}`];
  parts.push(`x ${Math.round((mark.column + 0.5) * data.um)} µm, y ${Math.round((mark.row + 0.5) * data.um)} µm`);
  if (gene.sd && gene.sd.codes[at]) parts.unshift(`sd ${inSteps(gene.sd, valueOf(gene.sd, gene.sd.codes[at]))}`);
  if (look.mixed) trio.forEach((other) => other && other !== gene && parts.unshift(`${other.name} ${valueText(other, at)}`));
  if (labels.regions && labels.regions[at]) parts.push(`region ${labels.regions[at]}`);
  if (labels.annotation && labels.annotation[at]) parts.push(labelName("annotation", labels.annotation[at]));
  if (mark.cell >= 0) parts.push(`cell${cells.kind[mark.cell] ? ` of class ${data.cells.names[cells.kind[mark.cell] - 1]}` : ""}`);
  if (mark.spot >= 0) {
    const { measured, summed } = gene.spots || {};
    parts.push(`spot ${data.spots.ids[mark.spot]}`);
    if (measured) parts.push(`${show(measured[mark.spot])} counted`);
    if (measured && summed[mark.spot] !== null) parts.push(`${show(summed[mark.spot])} in the map`);
  }
  if (aloneText(gene)) parts.push(aloneText(gene));
  return parts;
}

const SPOKEN_AFTER = 400; // ms without a move, so that a screen reader is not flooded
let speaking = 0;

function tell() {
  if (!mark || !gene) return;
  const at = mark.row * COLUMNS + mark.column, value = valueText(gene, at), parts = factsAt(at);
  const strong = document.createElement("strong"), rest = document.createElement("span");
  strong.textContent = `${gene.name}: ${value}`;
  rest.textContent = parts.join(" · ");
  byId("readout").replaceChildren(strong, rest);
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    byId("announced").textContent = `${gene.name}: ${value}, ${parts.join(", ")}`;
  }, SPOKEN_AFTER);
  markSpot();
}
