// Files that the page hands out: tables, outlines, pictures. They are made here; nothing is sent.
function save(name, content, type) {
  const link = document.createElement("a"), blob = content instanceof Blob ? content : new Blob([content], { type });
  link.href = URL.createObjectURL(blob);
  link.download = name.replace(/[\\/:*?"<>|\s]+/g, "-");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const csvCell = (value) => {
  const text = value === null ? "" : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};

function countsTable() { // a row for every area and gene
  const header = ["area", "area_mm2", "superpixels", "superpixels_on_tissue", "gene", "counts", "sd_counts"];
  const digits = (value) => (value === null ? null : Number(value.toPrecision(6)));
  const rows = areas.filter((area) => area.rows).flatMap((area) => area.rows.map((row) =>
    [area.name, mm2(area.all), digits(area.all), digits(area.tissue), row.gene, digits(row.counts), digits(row.sd)]));
  return [header, ...rows].map((row) => row.map(csvCell).join(",")).join("\n") + "\n";
}

async function saveCounts() {
  for (const area of areas) await sumArea(area); // genes may have been loaded since
  save(`${data.sample}-areas.csv`, countsTable(), "text/csv");
}

function outlines() { // GeoJSON in pixels of the image of data.frame, as QuPath and cells.py read it
  const { px } = data.frame, digits = (value) => Number(value.toFixed(2));
  const features = areas.filter((area) => area.points).map(({ name, points }) => ({
    type: "Feature",
    geometry: {
      type: "Polygon",
      coordinates: [[...points, points[0]].map(([column, row]) => [digits(column * px[0]), digits(row * px[1])])],
    },
    properties: { objectType: "annotation", name, classification: { name, color: [200, 0, 120] } },
  }));
  return JSON.stringify({ type: "FeatureCollection", features });
}

function saveOutlines() {
  save(`${data.sample}-areas.geojson`, outlines(), "application/geo+json");
}

// ----- the picture -----
const MARGIN = 12, TITLE = 34, BAR_HEIGHT = 64, KEY_HEIGHT = 20; // CSS px

function drawLegend(to, bars, left, top, width) { // colour bars below the picture
  bars.forEach(({ field, channel }, i) => {
    const y = top + i * BAR_HEIGHT, wide = Math.min(360, width);
    to.fillStyle = "#1d1f21";
    to.font = "600 13px system-ui, sans-serif";
    to.fillText(field.name + (channel === null ? "" : ` in ${MIX[channel]}`), left, y + 12);
    to.imageSmoothingEnabled = false;
    to.drawImage(rampOf(field, channel), left, y + 18, wide, 14);
    to.font = "11px system-ui, sans-serif";
    for (const { value, share } of roundValues(field)) {
      to.fillRect(left + share * wide - 0.5, y + 32, 1, 4);
      to.textAlign = "center";
      to.fillText(show(value), Math.max(left + 4, left + share * wide), y + 46);
    }
    to.textAlign = "left";
    to.fillText([barText(field), aloneText(field)].filter(Boolean).join("; "), left, y + 59, Math.max(wide, width));
  });
}

function drawKeyLine(to, left, top) { // names of labels and classes; returns its height
  let [x, y] = [left, top];
  to.font = "12px system-ui, sans-serif";
  for (const { colour, text } of keyItems()) {
    const wide = to.measureText(text).width + 34;
    if (x > left && x + wide > left + canvas.clientWidth) [x, y] = [left, y + KEY_HEIGHT];
    to.fillStyle = colour;
    to.fillRect(x, y, 12, 12);
    to.fillStyle = "#1d1f21";
    to.fillText(text, x + 17, y + 11);
    x += wide;
  }
  return keyItems().length ? y + KEY_HEIGHT - top : 0;
}

function pictureOf(sharp) { // the view with its scale bar, colour bars and names, as a canvas
  const [width, height] = [canvas.clientWidth, canvas.clientHeight], bars = legend(), sheet = document.createElement("canvas");
  const all = frames().map((frame) => ({ ...frame, x: frame.x + MARGIN, y: frame.y + MARGIN + TITLE }));
  sheet.width = (width + 2 * MARGIN) * sharp;
  const to = sheet.getContext("2d"), keyHeight = drawKeyLine(to, MARGIN, 0); // which it then loses
  sheet.height = (height + 3 * MARGIN + TITLE + bars.length * BAR_HEIGHT + keyHeight) * sharp;
  to.fillStyle = "#ffffff";
  to.fillRect(0, 0, sheet.width, sheet.height);
  drawScene(to, all, sharp, false);
  to.setTransform(sharp, 0, 0, sharp, 0, 0);
  to.fillStyle = "#1d1f21";
  to.font = "600 17px system-ui, sans-serif";
  to.fillText(bars.length ? `${data.sample}: ${shownNames()}` : data.sample, MARGIN, MARGIN + 18, width);
  const { length, text } = scaleBar(), bottom = MARGIN + TITLE + height;
  to.fillStyle = "rgba(255, 255, 255, .88)";
  to.fillRect(MARGIN + 8, bottom - 42, length + 20, 34);
  to.fillStyle = "#1d1f21";
  to.fillRect(MARGIN + 18, bottom - 18, length, 4);
  to.font = "13px system-ui, sans-serif";
  to.textAlign = "center";
  to.fillText(text, MARGIN + 18 + length / 2, bottom - 24);
  to.textAlign = "left";
  drawLegend(to, bars, MARGIN, bottom + MARGIN, width);
  drawKeyLine(to, MARGIN, bottom + MARGIN + bars.length * BAR_HEIGHT);
  return sheet;
}

function savePicture() {
  pictureOf(2).toBlob((blob) => save(`${data.sample}-${shownNames()}.png`, blob), "image/png");
}
