// The first screen. It is drawn once; what it shows does not change with the review.

const SVG = "http://www.w3.org/2000/svg";
const VALUES_SHOWN = 12; // classes up to which the cells of the matrix carry numbers
const SWATCHES = 5; // of the scale beside cells without numbers
const FULL_HEAT = 0.02; // share of a cell that may have the full colour: clean data stays pale
const CUT = 2; // a first bar more than so much higher than the others is cut

function drawSummary() {
  drawMatrix();
  drawHistogram();
  drawConfused();
  drawClasses();
  drawDuplicates();
  drawCurves();
  drawUnreadable();
  drawTruth();
  drawAbout();
}

function drawMatrix() {
  byId("matrix-card").hidden = !data.matrix;
  if (!data.matrix) return;
  const { classes: ids, values } = data.matrix;
  const part = `The ${ids.length} most confused of ${number(classes.length)} classes. `;
  byId("matrix-hint").textContent =
    "Of pictures that truly are the class on the left: the share with each label. " +
    `${ids.length < classes.length ? part : ""}Choose a cell to review it.`;
  const errors = values.flatMap((row, i) => row.filter((p, j) => i !== j && p !== null));
  const highest = Math.max(...errors, FULL_HEAT);
  if (!hasValues() && errors.every((p) => p < 0.0005)) byId("matrix-card").hidden = true; // pale
  const header = (scope, id) => h("th", { scope, title: classes[id] }, shortName(classes[id]));
  const body = ids.map((truth, i) => {
    const cells = ids.map((given, j) => matrixCell(truth, given, values[i][j], highest));
    return h("tr", header("row", truth), ...cells);
  });
  const table = h(
    "table.matrix",
    { "aria-label": "Noise matrix: rows are true classes, columns are given labels" },
    h("thead", h("tr", h("td.corner", "true ↓ label →"), ...ids.map((id) => header("col", id)))),
    h("tbody", ...body),
  );
  table.style.setProperty("--classes", ids.length);
  table.style.setProperty("--letters", Math.max(...ids.map((id) => classes[id].length)));
  moveByArrows(table, ids.length);
  byId("matrix").append(table);
  byId("scale").hidden = hasValues();
  byId("scale").append("0%", ...swatches(), percent(highest));
}

/** Say whether the cells are large enough for numbers. */
const hasValues = () => data.matrix.classes.length <= VALUES_SHOWN;

/** Return how strong the colour of a cell is, by its part of the highest share. */
const heatOf = (part) => part ** 0.7; // small shares stay visible

const setHeat = (node, heat) => node.style.setProperty("--heat", `${Math.round(100 * heat)}%`);

function swatches() {
  const nodes = Array.from({ length: SWATCHES }, () => h("span.heat"));
  nodes.forEach((node, i) => setHeat(node, heatOf(i / (SWATCHES - 1))));
  return nodes;
}

function matrixCell(truth, given, p, highest) {
  const isRight = truth === given;
  const name = isRight
    ? `${classes[truth]} with the right label`
    : `${classes[truth]} labelled ${classes[given]}`;
  const hasText = hasValues() && p !== null && (isRight || p >= 0.0095);
  const text = hasText ? `${Math.round(100 * p)}` : "";
  const spoken = `${name}: ${hasText ? `${text}%` : percent(p)}`; // holds what is seen
  const title = `${name}: ${percent(p)}`;
  const button = h("button.heat", { type: "button", title, "aria-label": spoken }, text);
  const heat = isRight || p === null ? 0 : heatOf(p / highest);
  setHeat(button, heat);
  button.classList.toggle("hot", heat > 0.78); // there white reads better than black
  button.classList.toggle("diagonal", isRight);
  button.onclick = () => (isRight ? reviewClass(given) : reviewPair(given, truth));
  return h("td", button);
}

/** One stop for the Tab key; inside, the arrows move. */
function moveByArrows(parent, columns = 1) {
  const buttons = [...parent.querySelectorAll("button")];
  let stop = columns > 1 ? 1 : 0; // not on the diagonal
  buttons.forEach((button, i) => (button.tabIndex = i === stop ? 0 : -1));
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  parent.addEventListener("keydown", (event) => {
    const place = buttons.indexOf(event.target);
    const next = place + steps[event.key];
    const isSameRow = Math.floor(next / columns) === Math.floor(place / columns);
    if (!buttons[next] || (/Left|Right/.test(event.key) && !isSameRow)) return;
    event.preventDefault();
    buttons[stop].tabIndex = -1;
    buttons[next].tabIndex = 0;
    buttons[next].focus();
    stop = next;
  });
}

/** Bars by error probability. A first bar that would dwarf the others is cut and says its count. */
function drawHistogram() {
  const counts = data.histogram;
  const [width, height, top, bottom] = [520, 200, 22, 24];
  const others = Math.max(...counts.slice(1), 1);
  const isCut = counts[0] > CUT * others;
  const highest = isCut ? 1.25 * others : Math.max(...counts, 1);
  const step = width / counts.length;
  const base = height - bottom;
  const y = (count) => base - (base - top) * Math.min(1, count / highest);
  const chart = svg("svg", { viewBox: `-6 0 ${width + 12} ${height}`, role: "img" });
  chart.setAttribute("class", "histogram");
  chart.setAttribute(
    "aria-label",
    `Labels by error probability; ${number(data.flagged)} have at least ${data.threshold}.`,
  );
  counts.forEach((count, i) => {
    const low = i / counts.length;
    const barHeight = count ? Math.max(1.5, base - y(count)) : 0;
    const place = { x: i * step + 1, y: base - barHeight, width: step - 2, height: barHeight };
    const isFlagged = low >= data.threshold - 1e-9;
    const title = `${percent(low)} to ${percent(low + 1 / counts.length)}: `;
    const rect = svg("rect", { ...place, rx: 2, class: isFlagged ? "flagged" : "" });
    rect.append(svg("title", {}, title + plural(count, "label")));
    chart.append(rect);
  });
  if (isCut) {
    const zigzag = `M-4 ${top + 16} l${step / 2 + 3} -7 l${step / 2 + 3} 7`;
    chart.append(svg("path", { d: zigzag, class: "break" }));
    chart.append(svg("text", { x: 0, y: top - 8, class: "count" }, number(counts[0])));
  }
  const at = data.threshold * width;
  const vertical = { x1: at, x2: at, y1: top - 12, y2: base, class: "threshold" };
  const anchor = data.threshold > 0.8 ? "end" : "start";
  const beside = { x: at + (anchor === "end" ? -6 : 6), y: top - 3, "text-anchor": anchor };
  chart.append(svg("line", vertical));
  chart.append(svg("text", { ...beside, class: "count" }, `${number(data.flagged)} flagged`));
  chart.append(svg("line", { x1: 0, x2: width, y1: base, y2: base, class: "axis" }));
  for (const [p, side] of [
    [0, "start"],
    [25, "middle"],
    [50, "middle"],
    [75, "middle"],
    [100, "end"],
  ]) {
    const tick = { x: (p / 100) * width, y: height - 6, "text-anchor": side };
    chart.append(svg("text", tick, `${p}%`));
  }
  byId("histogram").append(chart);
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function drawConfused() {
  byId("confused-card").hidden = data.confused.length === 0;
  const highest = Math.max(...data.confused.map(([, , , count]) => count), 1e-9);
  const rows = data.confused.map(([truth, given, p, count]) =>
    h(
      "button",
      {
        type: "button",
        title: `Labelled ${classes[given]}, truly ${classes[truth]}`,
        onclick: () => reviewPair(given, truth),
      },
      change(given, truth),
      bar(count / highest),
      h("span.figure", `≈ ${number(count)}`),
      h("span.figure.wide", percent(p)),
    ),
  );
  byId("confused").replaceChildren(...rows.map((row) => h("li", row)));
  moveByArrows(byId("confused"));
}

function drawClasses() {
  byId("classes-card").hidden = data.perClass.length === 0;
  const byRate = [...data.perClass].sort((a, b) => (b[3] ?? 0) - (a[3] ?? 0));
  const highest = Math.max(...byRate.map(([, , , rate]) => rate ?? 0), 0.01);
  const counts = byRate.map(
    ([, samples, flagged]) => `${number(flagged)} of ${number(samples)} flagged`,
  );
  const rows = byRate.map(([id, , , rate], i) =>
    h(
      "button",
      { type: "button", title: `${classes[id]}: ${counts[i]}`, onclick: () => reviewClass(id) },
      shortName(classes[id]),
      bar((rate ?? 0) / highest),
      h("span.figure", percent(rate)),
      h("span.figure.wide", counts[i]),
    ),
  );
  const letters = counts.reduce((most, text) => Math.max(most, text.length), 0);
  byId("classes").style.setProperty("--letters", letters);
  byId("classes").replaceChildren(...rows.map((row) => h("li", row)));
  moveByArrows(byId("classes"));
}

function drawDuplicates() {
  byId("duplicates-card").hidden = data.twins.length === 0;
  const groups = data.twins.map((group) => {
    const kind = `${likeness(group)}, ${group.differ ? "different labels" : "same label"}`;
    const more = group.count > group.items.length ? ` (${number(group.count)} images)` : "";
    return drawTwins(kind + more, group.items);
  });
  byId("duplicates").replaceChildren(...groups);
}

function drawCurves() {
  byId("curves-card").hidden = !data.curves;
  // As an image, because its own styles would need an exception from the page's rules.
  const alt = "Loss and accuracy over the epochs of the training";
  if (data.curves) byId("curves").append(h("img", { src: data.curves, alt }));
}

function drawUnreadable() {
  byId("unreadable-card").hidden = data.unreadable === 0;
  const shown = data.unreadableShown;
  const first = data.unreadable > shown.length ? `, here the first ${shown.length}` : "";
  byId("unreadable-hint").textContent =
    `${plural(data.unreadable, "image")}${first}. Only what was read of them before takes part in the audit.`;
  const rows = shown.map(([path, reason]) => h("li", h("span.path", path), h("span.meta", reason)));
  byId("unreadable").replaceChildren(...rows);
}

function drawTruth() {
  const names = { auroc: "AUROC", ap: "Average precision", p_at_n: "Precision at N" };
  const { samples, errors, ...scores } = data.truth;
  const facts = Object.entries(scores).map(([key, value]) => [names[key] ?? key, decimals(value)]);
  if (errors !== undefined)
    facts.push(["True errors", `${number(errors)} in ${plural(samples, "sample")}`]);
  drawFacts("truth", facts);
}

const decimals = (value) => (value === null ? "–" : value.toFixed(3));

function drawAbout() {
  const { about, rest } = data;
  const facts = [["Run", data.run]];
  for (const [key, value] of Object.entries(about)) {
    facts.push([key[0].toUpperCase() + key.slice(1), value]);
  }
  facts.push(["Samples", number(data.samples)], ["Classes", number(classes.length)]);
  const more = rest.count ? `, without ${number(rest.count)} less suspicious ones` : "";
  facts.push(["On this page", plural(items.length, "sample") + more]);
  const { exact, alike, differ } = data.duplicates;
  if (exact + alike) {
    const look = alike === 1 ? "looks" : "look";
    const kinds = `${number(exact)} same file, ${number(alike)} ${look} the same`;
    const groups = plural(exact + alike, "group");
    facts.push(["Duplicates", `${groups}: ${kinds}; ${number(differ)} with different labels`]);
  }
  drawFacts("about", facts);
}

function drawFacts(id, facts) {
  byId(`${id}-card`).hidden = facts.length === 0;
  byId(id).replaceChildren(
    ...facts.flatMap(([term, value]) => [h("dt", term), h("dd.name", `${value}`)]),
  );
}
