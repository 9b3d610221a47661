// Where superpixels are on the screen: one picture, or several side by side that move together.
const CLOSEST = 48; // CSS px per superpixel: beyond, the H&E shows nothing new
const GAP = 8; // CSS px between pictures
const canvas = byId("view"), pen = canvas.getContext("2d");
const view = { scale: 1, top: 0, left: 0, whole: true }; // scale: CSS px per superpixel
let kinds = ["overlay"]; // of the pictures: overlay, or some of image, spots, map, uncertainty
let mark = null, drawing = 0;

function frames(width = canvas.clientWidth, height = canvas.clientHeight) { // arranged to be large
  let best = null;
  for (let across = 1; across <= kinds.length; across++) {
    const down = Math.ceil(kinds.length / across);
    const each = { width: (width - GAP * (across - 1)) / across, height: (height - GAP * (down - 1)) / down };
    const scale = Math.min(each.width / COLUMNS, each.height / ROWS);
    if (!best || scale > best.scale * 1.001) best = { ...each, across, scale };
  }
  return kinds.map((kind, i) => ({
    kind,
    x: (i % best.across) * (best.width + GAP),
    y: Math.floor(i / best.across) * (best.height + GAP),
    width: best.width,
    height: best.height,
  }));
}

function size() {
  const [{ width, height }] = frames();
  return [width, height];
}

function toFrame(x, y) { // from a place in the canvas to that in the picture around it
  const all = frames();
  const hit = all.find((f) => x < f.x + f.width + GAP && y < f.y + f.height + GAP) || all[0];
  return [x - hit.x, y - hit.y];
}

function toSection(x, y) { // column and row, from a place in a picture
  return [view.left + x / view.scale, view.top + y / view.scale];
}

function limit() {
  const [width, height] = size();
  const smallest = Math.min(width / COLUMNS, height / ROWS);
  view.whole = view.scale <= smallest * 1.0001;
  view.scale = clamp(view.scale, smallest, Math.max(CLOSEST, smallest));
  const held = (first, shown, all) => (shown >= all ? (all - shown) / 2 : clamp(first, 0, all - shown));
  view.left = held(view.left, width / view.scale, COLUMNS);
  view.top = held(view.top, height / view.scale, ROWS);
  canvas.dataset.whole = view.whole; // then a finger scrolls the page
  redraw();
  noteAddress();
}

function zoom(times, x = size()[0] / 2, y = size()[1] / 2) {
  const [column, row] = toSection(x, y), [width, height] = size();
  const smallest = Math.min(width / COLUMNS, height / ROWS);
  view.scale = clamp(view.scale * times, smallest, Math.max(CLOSEST, smallest));
  view.left = column - x / view.scale;
  view.top = row - y / view.scale;
  limit();
}

function wholeSection() {
  view.scale = 0;
  limit();
}

function redraw() {
  if (!drawing) drawing = requestAnimationFrame(() => { drawing = 0; draw(); });
}

// ----- pointer -----
const fingers = new Map(); // of the pointers that are down, where they are
let pressedAt = null; // where the first of them came down, until it moves

function moved(event) {
  const [x, y] = toFrame(event.offsetX, event.offsetY), old = fingers.get(event.pointerId);
  const [column, row] = toSection(x, y);
  if (!old || tool !== "move") place(Math.floor(row), Math.floor(column), column, row);
  if (!old) return;
  if (tool !== "move" && fingers.size === 1) {
    fingers.set(event.pointerId, { x, y });
    drawTo(column, row);
    return;
  }
  const apart = () => { const [a, b] = fingers.values(); return Math.hypot(a.x - b.x, a.y - b.y); };
  const before = fingers.size === 2 ? apart() : 0;
  fingers.set(event.pointerId, { x, y });
  if (pressedAt && Math.hypot(x - pressedAt.x, y - pressedAt.y) > 4) pressedAt = null;
  view.left -= (x - old.x) / view.scale / fingers.size;
  view.top -= (y - old.y) / view.scale / fingers.size;
  if (before) {
    const [a, b] = fingers.values();
    zoom(apart() / before, (a.x + b.x) / 2, (a.y + b.y) / 2);
  }
  limit();
}

function pressed(event) {
  moved(event); // a finger that taps reads the value
  const [x, y] = toFrame(event.offsetX, event.offsetY);
  fingers.set(event.pointerId, { x, y });
  canvas.setPointerCapture(event.pointerId);
  pressedAt = fingers.size === 1 ? { x, y } : null;
  if (tool !== "move" && fingers.size === 1) beginArea(...toSection(x, y));
  else if (tool !== "move") dropArea(); // a second finger zooms
}

function released(event) {
  const last = fingers.delete(event.pointerId) && fingers.size === 0;
  if (!last) return;
  if (tool !== "move" && event.type === "pointerup") endArea();
  else if (tool !== "move") dropArea();
  else if (pressedAt && event.type === "pointerup") pickArea(...toSection(pressedAt.x, pressedAt.y));
  pressedAt = null;
}

function wheeled(event) {
  if (view.whole && event.deltaY > 0) return; // nothing to zoom out: the page scrolls
  event.preventDefault();
  const px = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 33 : 1);
  zoom(Math.exp(clamp(-px / 400, -0.3, 0.3)), ...toFrame(event.offsetX, event.offsetY));
}

// ----- keys on the picture -----
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function keyed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
  else if (event.key === "0") wholeSection();
  else if (event.key === " " && tool !== "move") addCorner();
  else if (event.key === "Enter" && tool !== "move") endArea();
  else if (event.key === "Escape") dropArea();
  else if (event.key in STEPS) {
    const times = event.shiftKey ? 10 : 1, [down, right] = STEPS[event.key];
    const from = mark || { row: ROWS >> 1, column: COLUMNS >> 1 };
    place(clamp(from.row + down * times, 0, ROWS - 1), clamp(from.column + right * times, 0, COLUMNS - 1));
    follow();
  } else return;
  event.preventDefault();
}

function follow() { // the view goes along when the mark comes near its edge
  const [width, height] = size().map((side) => side / view.scale);
  const along = (first, shown, at) => clamp(first, at + 1 - 0.9 * shown, at - 0.1 * shown);
  view.left = along(view.left, width, mark.column);
  view.top = along(view.top, height, mark.row);
  limit();
}
