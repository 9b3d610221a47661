// Charts that depend on the gene, as SVG.
function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function drawScatter() {
  const box = byId("scatter"), text = byId("scatter-text");
  box.replaceChildren();
  byId("scatter-save").hidden = !gene.spots;
  if (!gene.spots) {
    const absent = data.spots ? `cnts.csv has no counts of ${gene.name}.`
      : "Without locs.csv, radius.txt and cnts.csv there is nothing to compare.";
    text.textContent = gene.why && gene.beside.includes("spots") ? `Without spots: ${gene.why}` : absent;
    return;
  }
  const { measured, summed, r, ratio } = gene.spots;
  const pairs = measured.map((count, i) => [count, summed[i]]).filter(([, sum]) => sum !== null);
  const known = (value, form) => (value === null ? "unknown" : form(value));
  text.textContent = `${gene.name}, ${pairs.length} spots with enough tissue: r ${known(r, (v) => v.toFixed(2))}; ` +
    `the map holds ${known(ratio, (v) => `${(100 * v).toFixed(0)} %`)} of the measured counts.`;
  const top = Math.max(1e-9, ...pairs.flat()) * 1.03;
  const [left, right, upper, lower] = [60, 448, 12, 252];
  const x = (value) => (left + (value / top) * (right - left)).toFixed(1);
  const y = (value) => (lower - (value / top) * (lower - upper)).toFixed(1);
  gene.axes = [x, y];
  const chart = svg("svg", { viewBox: "0 0 460 296", role: "img", "aria-labelledby": "scatter-name", "aria-describedby": "scatter-words" });
  chart.append(svg("title", { id: "scatter-name" }, `Map against measured counts of ${gene.name}`));
  chart.append(svg("desc", { id: "scatter-words" }, text.textContent));
  for (const value of ticksBetween(0, top)) {
    chart.append(svg("path", { class: "grid", d: `M${left} ${y(value)}H${right}` }));
    chart.append(svg("text", { x: left - 6, y: y(value), dy: ".35em", class: "end" }, show(value)));
    chart.append(svg("text", { x: x(value), y: lower + 16, class: "middle" }, show(value)));
  }
  chart.append(svg("path", { class: "axis", d: `M${left} ${lower}H${right}M${left} ${lower}L${right} ${upper}` }));
  chart.append(svg("path", { class: "dots", d: pairs.map(([a, b]) => `M${x(a)} ${y(b)}h0`).join("") }));
  chart.append(svg("circle", { class: "chosen", id: "dot", r: 6, visibility: "hidden" }));
  chart.append(svg("text", { x: (left + right) / 2, y: 288, class: "middle" }, "counts measured in the spot"));
  chart.append(svg("text", { transform: "translate(12 132) rotate(-90)", class: "middle" }, "sum of the map over the spot"));
  box.append(chart);
}

function markSpot() { // where the spot under the mark stands in the scatter
  const dot = byId("dot");
  if (!dot) return;
  const known = mark.spot >= 0 && gene.spots.summed[mark.spot] !== null;
  dot.setAttribute("visibility", known ? "visible" : "hidden");
  if (known) [["cx", "measured", 0], ["cy", "summed", 1]].forEach(([name, key, axis]) =>
    dot.setAttribute(name, gene.axes[axis](gene.spots[key][mark.spot])));
}

function markHeldOut() { // where the gene stands in the histogram
  document.querySelectorAll(".marker").forEach((old) => old.remove());
  const title = byId("held-out-title"), x = data.markers[gene.index];
  if (!title || x === null) return;
  const chart = title.parentNode, end = x > 300;
  chart.append(svg("path", { class: "chosen marker", d: `M${x} 12V216` }));
  chart.append(svg("text", { x: x + (end ? -5 : 5), y: 22, class: `chosen marker ${end ? "end" : ""}` }, gene.name));
}

// ----- a chart as a file -----
const DRAWN_BY = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "opacity", "font-size", "font-weight", "text-anchor"];

function chartText(chart) { // SVG that needs no style sheet, on white, in the colours of print
  document.documentElement.classList.add("paper");
  const copy = chart.cloneNode(true), [, , width, height] = chart.getAttribute("viewBox").split(" ");
  const from = chart.querySelectorAll("*"), to = copy.querySelectorAll("*");
  from.forEach((element, i) => {
    const style = getComputedStyle(element);
    DRAWN_BY.forEach((name) => to[i].setAttribute(name, style.getPropertyValue(name)));
  });
  document.documentElement.classList.remove("paper");
  for (const [name, value] of Object.entries({ xmlns: "http://www.w3.org/2000/svg", width, height, "font-family": "sans-serif" })) copy.setAttribute(name, value);
  copy.querySelector("desc").after(svg("rect", { width, height, fill: "#ffffff" }));
  return new XMLSerializer().serializeToString(copy);
}

function saveChart(button) {
  const chart = button.closest("figure, section").querySelector("svg[role=img]");
  const name = chart.querySelector("title").textContent;
  save(`${name}.svg`, chartText(chart), "image/svg+xml");
}
