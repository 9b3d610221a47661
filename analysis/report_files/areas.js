// Areas: drawn by rectangle or lasso, or a region or label that was clicked, with their counts.
const areas = []; // { name, points } with points [column, row], or { name, layer, number }
let tool = "move", sketch = null, chosenArea = null, summing = 0;

// ----- drawing -----
function beginArea(column, row) {
  sketch = { points: [[column, row]], last: [column, row] };
  redraw();
}

function drawTo(column, row) {
  if (!sketch) return;
  sketch.last = [column, row];
  if (tool === "lasso") sketch.points.push([column, row]);
  redraw();
}

function addCorner() { // by keys: at the mark
  if (!mark) return;
  const corner = [mark.column + 0.5, mark.row + 0.5];
  if (!sketch) sketch = { points: [], byKeys: true };
  sketch.points.push(corner);
  sketch.last = corner;
  byId("announced").textContent = `Corner ${sketch.points.length} at row ${mark.row}, column ${mark.column}`;
  redraw();
}

function outlineOf({ points, last }) {
  if (tool === "lasso") return points;
  const [[a, b], [c, d]] = [points[0], last];
  return [[a, b], [c, b], [c, d], [a, d]];
}

function endArea() {
  if (!sketch) return;
  const points = outlineOf(sketch).map(([column, row]) => [clamp(column, 0, COLUMNS), clamp(row, 0, ROWS)]);
  sketch = null;
  redraw();
  if (points.length < 3 || coverage(points).indices.length === 0) return;
  const numbers = areas.map((area) => Number((/^area (\d+)$/.exec(area.name) || [0, 0])[1]));
  addArea({ name: `area ${Math.max(0, ...numbers) + 1}`, points });
}

function dropArea() {
  sketch = null;
  redraw();
}

function addArea(area) {
  areas.push(area);
  chooseArea(area);
}

function removeArea(area) {
  areas.splice(areas.indexOf(area), 1);
  chooseArea(areas.at(-1) || null);
}

const labelName = (name, number) => (name === "regions" || !data[name].texts[number - 1]
  ? `${name === "regions" ? "region" : name} ${number}` : data[name].texts[number - 1]);

function pickArea(column, row) { // a click: an area that was drawn there, or the label
  const inside = areas.findLast((area) => area.points && winding(area.points, column, row) !== 0);
  if (inside) return chooseArea(inside);
  const codes = labels[layer], at = Math.floor(row) * COLUMNS + Math.floor(column);
  if (!codes || column < 0 || row < 0 || column >= COLUMNS || row >= ROWS || !codes[at]) return undefined;
  const old = areas.find((area) => area.layer === layer && area.number === codes[at]);
  return old ? chooseArea(old) : addArea({ name: labelName(layer, codes[at]), layer, number: codes[at] });
}

function winding(points, x, y) {
  let turns = 0;
  points.forEach(([x1, y1], i) => {
    const [x2, y2] = points[(i + 1) % points.length];
    if ((y1 <= y) === (y2 <= y)) return;
    if (x1 + ((y - y1) / (y2 - y1)) * (x2 - x1) > x) turns += y2 > y1 ? 1 : -1;
  });
  return turns;
}

function drawAreas(to, px) {
  const path = (points, closed) => {
    to.beginPath();
    points.forEach(([column, row]) => to.lineTo(column, row));
    if (closed) to.closePath();
    for (const [width, colour] of [[4 * px, "rgba(0, 0, 0, .75)"], [2 * px, "#fff"]]) {
      to.lineWidth = width;
      to.strokeStyle = colour;
      to.stroke();
    }
  };
  for (const area of areas) {
    if (!area.points) continue;
    if (area === chosenArea) to.setLineDash([8 * px, 5 * px]);
    path(area.points, true);
    to.setLineDash([]);
  }
  if (sketch) path(outlineOf(sketch), tool === "rectangle");
}

// ----- which superpixels, and how much of each -----
const SUB_ROWS = 8; // lines in a superpixel along which an outline is measured

function spansAt(points, y) { // stretches of a line inside an outline, also one that crosses itself
  const crossings = [], spans = [];
  points.forEach(([x1, y1], i) => {
    const [x2, y2] = points[(i + 1) % points.length];
    if ((y1 <= y) !== (y2 <= y)) crossings.push([x1 + ((y - y1) / (y2 - y1)) * (x2 - x1), y2 > y1 ? 1 : -1]);
  });
  crossings.sort((a, b) => a[0] - b[0]);
  let turns = 0, from = 0;
  for (const [x, turn] of crossings) {
    if (turns === 0) from = x;
    turns += turn;
    if (turns === 0) spans.push([from, x]);
  }
  return spans;
}

function coverage(points) { // share of each superpixel that lies inside: exact along rows
  const weight = new Float64Array(ROWS * COLUMNS), rows = points.map(([, row]) => row);
  const first = Math.max(0, Math.floor(Math.min(...rows))), last = Math.min(ROWS - 1, Math.floor(Math.max(...rows)));
  for (let line = first * SUB_ROWS; line < (last + 1) * SUB_ROWS; line++) {
    const row = Math.floor(line / SUB_ROWS);
    for (const [from, to] of spansAt(points, (line + 0.5) / SUB_ROWS)) {
      for (let column = Math.max(0, Math.floor(from)); column < Math.min(COLUMNS, to); column++) {
        const part = (Math.min(to, column + 1) - Math.max(from, column)) / SUB_ROWS;
        if (part > 0) weight[row * COLUMNS + column] += part;
      }
    }
  }
  return collect((at) => weight[at]);
}

function collect(weightAt) { // superpixels that have a weight
  const indices = [], weights = [];
  for (let at = 0; at < ROWS * COLUMNS; at++) {
    const weight = weightAt(at);
    if (!weight) continue;
    indices.push(at);
    weights.push(weight);
  }
  return { indices, weights };
}

function superpixelsOf(area) {
  if (area.points) return coverage(area.points);
  const codes = labels[area.layer];
  return collect((at) => Number(codes[at] === area.number));
}

// ----- sums -----
// The standard deviation of a sum of superpixels; null where the maps have none. Errors of
// superpixels that lie together go together: data.correlation has shares of the variance and the
// widths of the Gaussians by which they do; the rest is a superpixel's own. This is the only place
// in the page that knows.
function sdOfSum(sd, part) {
  if (!sd || !part.indices.length) return sd ? 0 : null;
  const box = boxOf(sd, part), own = 1 - data.correlation.reduce((sum, [share]) => sum + share, 0);
  let variance = own * product(box.values, box.values);
  for (const [share, width] of data.correlation) variance += share * product(box.values, blurred(box, width));
  return Math.sqrt(variance);
}

function boxOf(sd, { indices, weights }) { // weight times sd of the superpixels, in a rectangle
  const rows = indices.map((at) => Math.floor(at / COLUMNS)), columns = indices.map((at) => at % COLUMNS);
  const edge = (places, pick) => places.reduce((one, other) => pick(one, other));
  const [top, left] = [edge(rows, Math.min), edge(columns, Math.min)];
  const height = edge(rows, Math.max) - top + 1, wide = edge(columns, Math.max) - left + 1;
  const values = new Float64Array(height * wide), known = valuesOf(sd);
  indices.forEach((at, i) => { values[(rows[i] - top) * wide + columns[i] - left] = weights[i] * known[sd.codes[at]]; });
  return { values, height, wide };
}

function product(one, other) {
  let sum = 0;
  for (let i = 0; i < one.length; i++) sum += one[i] * other[i];
  return sum;
}

const REACH = 12; // superpixels, beyond which there is no correlation

function blurred({ values, height, wide }, width) { // by a Gaussian of height 1, along columns, then rows
  const reach = Math.min(REACH, Math.ceil(4 * width)), steps = Array.from({ length: 2 * reach + 1 }, (_, i) => i - reach);
  const kernel = steps.map((step) => Math.exp(-(step ** 2) / (2 * width ** 2)));
  const along = (from, length, stride, other, jump) => {
    const to = new Float64Array(from.length);
    for (let line = 0; line < other; line++) {
      for (let at = 0; at < length; at++) {
        const value = from[line * jump + at * stride];
        if (!value) continue;
        for (let k = Math.max(0, reach - at); k < Math.min(kernel.length, length + reach - at); k++) {
          to[line * jump + (at + k - reach) * stride] += kernel[k] * value;
        }
      }
    }
    return to;
  };
  return along(along(values, height, wide, wide, 1), wide, 1, height, wide);
}

function sumOf(field, { indices, weights }) {
  const { codes } = field, values = valuesOf(field); // 0 where there is no value
  let counts = 0, superpixels = 0; // superpixels on the tissue
  for (let i = 0; i < indices.length; i++) {
    const code = codes[indices[i]];
    counts += weights[i] * values[code];
    if (code) superpixels += weights[i];
  }
  return { counts, superpixels };
}

async function sumArea(area) { // of all genes that are loaded: those of the page and of the folder
  const part = superpixelsOf(area), numbers = new Set([...Array(data.here).keys(), ...loaded.keys()]);
  const rows = [], unread = [];
  for (const index of [...numbers].sort((a, b) => a - b)) {
    const field = await loadGene(index).catch(() => unread.push(data.genes[index]) && null);
    if (field) rows.push({ index, gene: field.name, ...sumOf(field, part), sd: sdOfSum(field.sd, part) });
  }
  const all = part.weights.reduce((sum, weight) => sum + weight, 0);
  return Object.assign(area, { rows, all, unread, tissue: Math.max(0, ...rows.map((row) => row.superpixels)) });
}

async function chooseArea(area) {
  chosenArea = area;
  byId("areas").hidden = areas.length === 0;
  redraw();
  listAreas();
  if (!area) return;
  const mine = ++summing;
  byId("area-text").textContent = "Adding up …";
  await sumArea(area);
  if (mine !== summing) return; // another one was chosen meanwhile
  listAreas();
  showArea(area);
}

function listAreas() {
  byId("area-list").replaceChildren(...areas.map((area) => {
    const row = byId("area-form").content.firstElementChild.cloneNode(true), [pick, drop] = row.querySelectorAll("button");
    pick.textContent = area.name;
    pick.setAttribute("aria-pressed", area === chosenArea);
    pick.addEventListener("click", () => chooseArea(area));
    drop.setAttribute("aria-label", `Remove ${area.name}`);
    drop.addEventListener("click", () => removeArea(area));
    return row;
  }));
}

const mm2 = (superpixels) => Number((superpixels * SUPERPIXEL_MM2).toPrecision(4));

function showArea(area) {
  const texts = area.layer ? data[area.layer].texts : [], about = texts[area.number - 1];
  const marker = area.layer === "regions" && about ? ` Marker genes: ${about}.` : "";
  byId("area-text").textContent = `${area.name}: ${mm2(area.all)} mm², ${show(area.all)} superpixels, ` +
    `${show(area.tissue)} of them on the tissue.${marker}` +
    (area.unread.length ? ` Without ${area.unread.join(", ")}, whose maps cannot be read.` : "");
  const rows = [...area.rows].sort((a, b) => b.counts - a.counts);
  byId("area-rows").replaceChildren(...rows.map(({ gene: name, counts, sd, superpixels }) => {
    const row = document.createElement("tr"), first = document.createElement("th");
    first.scope = "row";
    first.textContent = name;
    row.append(first, ...[show(counts), sd === null ? "unknown" : show(sd), superpixels ? show(counts / superpixels) : ""].map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return row;
  }));
  const drawn = areas.some((one) => one.points);
  byId("save-outlines").disabled = !drawn;
}
