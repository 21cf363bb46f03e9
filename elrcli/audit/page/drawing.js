// Review: what is seen of the state.
//
// Names and paths come from the user's data. They reach the page through text nodes and
// properties only, never as markup.

const MAX_ZOOM = 10; // a tiny picture is easier to recognise while it is not too large
const PIXELATED = 3; // enlarged more than this, pixels are drawn as squares
const CUT_NAME = /^(.{3,})(\P{M}.{6,})$/su; // a name's beginning, and its end that is always shown
const RIGHT_TO_LEFT = // letters that run so, and marks that make others do so
  /[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufefc]/;

// --- building blocks ---

/**
 * Make an element. `selector` is "tag.class.class"; of the parts, plain objects set properties
 * (or attributes, where the element has no such property) and the others become children.
 */
function h(selector, ...parts) {
  const [tag, ...classNames] = selector.split(".");
  const node = document.createElement(tag);
  node.className = classNames.join(" ");
  for (const part of parts) {
    if (typeof part === "string" || part instanceof Node) node.append(part);
    else
      for (const [name, value] of Object.entries(part ?? {})) {
        if (name in node) node[name] = value;
        else node.setAttribute(name, value);
      }
  }
  return node;
}

/**
 * A name on one line. Where it is too long, its middle is left out, because names may differ at
 * the end only. What is seen are pseudo-elements; the text is there once, for readers and copies.
 * Right to left the two parts would change places, so such a name loses its end.
 */
function shortName(name, kind = "span.name") {
  const [, head, tail] = name.match(CUT_NAME) ?? [];
  if (!tail) return h(kind, name);
  const whole = { dir: "auto", title: name };
  if (RIGHT_TO_LEFT.test(name)) return h(kind, whole, name);
  const parts = { "data-head": head, "data-tail": tail };
  return h(`${kind}.cut`, whole, parts, h("span.unseen", name));
}

/** A name on as many lines as it needs; they end after "_", "-", "/" or "." where they can. */
const longName = (name, kind = "span.name") =>
  h(kind, ...name.split(/(?<=[_./-])/).flatMap((part) => [part, h("wbr")]));

const className = (label, role) => shortName(classes[label], `b.name.${role}`);

/** "given → truth", on two lines where one is too short. */
const change = (given, truth) =>
  h(
    "span.change",
    className(given, "given"),
    h("span.to", h("span", "→"), className(truth, "suggested")),
  );

/** A thumbnail that takes about `size` pixels on the screen. */
function thumbnail([uri, width, height], alt, size) {
  if (!uri) return h("span.missing", { title: alt }, "no image");
  const kind = size / Math.max(width, height) > PIXELATED ? "img.pixelated" : "img";
  return h(kind, { src: uri, alt, width, height, decoding: "async", draggable: false });
}

function bar(share, role = "plain") {
  const fill = h("span.fill");
  fill.style.width = `${100 * Math.min(1, share)}%`;
  return h(`span.track.${role}`, { "aria-hidden": "true" }, fill);
}

const quoted = (text) => (/^[\w./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** Say what to do with decisions.csv. */
function howToApply() {
  if (!data.appliesToRun)
    return ["decisions.csv lists the changes for this data, which is not that of the run."];
  const command = `elr apply ${quoted(data.applyTo)} decisions.csv --out corrected.csv`;
  return ["Then write the corrected data: ", h("code.command", command)];
}

// --- the page ---

function draw() {
  const { view, queue, isFinished } = state;
  for (const button of document.querySelectorAll("[data-view]"))
    button.setAttribute("aria-current", button.dataset.view === view ? "page" : "false");
  document.documentElement.dataset.shown = view;
  byId("summary").hidden = view !== "summary";
  byId("work").hidden = view === "summary";
  const stats = reviewStats(state.decisions, data.rest);
  drawStatus(stats);
  if (view === "summary") return;
  const isOver = queue.length === 0 || (view === "review" && isFinished);
  byId("cards").hidden = isOver || view !== "grid";
  byId("finished").hidden = !isOver;
  byId("desk").hidden = isOver || view === "grid";
  drawFilters();
  if (isOver) drawFinished(stats);
  else if (view === "grid") drawGrid();
  else drawItem(currentItem());
  drawActions();
}

function drawStatus(stats) {
  const isFlagged = state.filters.scope === "flagged";
  const scope = items.filter((item) => item.flagged || !isFlagged);
  const entries = scope.map(entryOf).filter(Boolean);
  const count = (test) => entries.filter(test).length;
  const parts = {
    error: count(isError),
    kept: count((entry) => entry.decision === "keep"),
    unsure: count((entry) => entry.decision === "unsure"),
    open: scope.length - entries.length,
  };
  const progress = byId("progress");
  for (const [part, size] of Object.entries(parts))
    progress.querySelector(`.${part}`).style.flexGrow = size;
  progress.setAttribute("aria-valuemax", scope.length);
  progress.setAttribute("aria-valuenow", entries.length);
  const kind = isFlagged && !data.rest.flagged ? "flagged" : "on this page";
  write("reviewed", entries.length, ` of ${number(scope.length)} ${kind} reviewed`);
  write("left", stats.left, Math.round(stats.left) === 1 ? " error left" : " errors left", "≈ ");
  const found = ` were errors (${number(stats.errors)} of ${number(stats.judged)})`;
  byId("precision").hidden = stats.judged === 0;
  byId("precision").replaceChildren(h("b", percent(stats.precision)), found);
  const open = state.queue.map((index) => items[index]).filter((item) => !entryOf(item));
  const advice = state.isStored
    ? advise(
        stats,
        open.slice(0, AHEAD).map((item) => item.p),
      )
    : "This browser keeps no decisions: download them before you close the page.";
  byId("advice").textContent = advice;
  byId("advice").title = advice;
  byId("advice").classList.toggle("warning", !state.isStored);
  byId("count").textContent = state.decisions.size ? ` (${number(state.decisions.size)})` : "";
  byId("start-text").textContent = `${state.decisions.size ? "Continue" : "Start"} the review`;
}

function write(id, value, after, before = "") {
  byId(id).replaceChildren(before, h("b", number(value)), after);
}

function drawFilters() {
  for (const [key, value] of Object.entries(state.filters)) {
    const field = byId("filters").elements[key];
    if (field.value !== value) field.value = value; // a field in use keeps its caret
  }
  byId("clear-filters").hidden = !isFiltered();
  const place = state.queue.indexOf(state.current) + 1;
  const count = number(state.queue.length);
  const isPlaced = state.view === "review" && place > 0;
  byId("position").textContent = isPlaced ? `${number(place)} / ${count}` : count;
}

function drawActions() {
  const chosen = targets();
  const only = chosen.length === 1 ? chosen[0] : null;
  const button = (action) => byId("actions").querySelector(`[data-do=${action}]`);
  const rename = (action, text) =>
    button(action).querySelector(".what").replaceChildren(shortName(text));
  const isChange = only && isDoubted(only);
  rename("keep", only ? `Keep ${classes[only.label]}` : "Keep");
  rename("accept", isChange ? `Change to ${classes[only.suggested]}` : "Accept suggestion");
  const press = (action, test) => {
    button(action).disabled = chosen.length === 0;
    button(action).setAttribute("aria-pressed", chosen.length > 0 && chosen.every(test));
  };
  for (const action of ["keep", "remove", "unsure"])
    press(action, (item) => entryOf(item)?.decision === action);
  press("accept", (item) => entryOf(item)?.newLabel === classes[item.suggested]);
  if (!chosen.some(isDoubted)) button("accept").disabled = true;
  button("pick").disabled = chosen.length === 0;
  button("undo").disabled = state.history.length === 0;
  const selected = state.view === "grid" ? state.selection.size : 0;
  button("select").hidden = state.view !== "grid";
  rename("select", selected ? "Select none" : "Select all");
  byId("selected").textContent = selected ? `${number(selected)} selected` : "";
}

/** Focus what the keys act on, so that a screen reader says it; not while filters are in use. */
function focusWork() {
  if (state.view === "summary" || byId("filters").contains(document.activeElement)) return;
  if (state.view === "grid" && state.queue.length) {
    const card = cards.get(state.current);
    card?.focus({ preventScroll: true });
    card?.scrollIntoView({ block: "nearest" });
  } else byId(byId("desk").hidden ? "finished" : "stage").focus({ preventScroll: true });
}

// --- one suspect ---

function drawItem(item) {
  const entry = entryOf(item);
  const [uri, , , problem] = item.picture;
  const image = byId("picture");
  if (uri && image.src !== uri) image.src = uri;
  image.hidden = !uri;
  image.alt = `Labelled ${classes[item.label]}: ${item.path}`;
  fitPicture();
  byId("problem").hidden = Boolean(uri);
  byId("problem").textContent = uri ? "" : `This image cannot be shown: ${problem}.`;
  byId("verdict").hidden = !entry;
  byId("verdict").replaceChildren(shortName(describe(entry)));
  byId("verdict").dataset.decision = entry?.decision ?? "";
  drawQuestion(item);
  byId("facts").replaceChildren(
    h("b", `${percent(item.p)} likely wrong`),
    ` · rank ${number(item.rank)} · ${item.split} · `,
    pathOf(item),
  );
  drawSide("given", "Labelled", item.examples[0]);
  drawSide("suggested", "Looks like", item.examples[1]);
  byId("suggested").hidden = !isDoubted(item);
  byId("top").replaceChildren(...item.top.map((_, place) => drawCandidate(item, place)));
  byId("twins-section").hidden = item.twins.length === 0;
  const twins = item.twins.map((group) => {
    const others = group.items.filter((index) => index !== item.index);
    return drawTwins(likeness(group), others);
  });
  byId("twins").replaceChildren(...twins);
}

/** A path on one line. Where it is too long, its beginning is left out. */
function pathOf({ path }) {
  const file = path.lastIndexOf("/") + 1;
  const parts = [h("bdi", path.slice(0, file)), h("bdi", path.slice(file))];
  return h("span.path", { title: path }, h("bdi", { dir: "ltr" }, ...parts));
}

/** Ask about an item; screen readers say it, so not again for the same one. */
function drawQuestion(item) {
  const question = byId("question");
  if (question.dataset.item === `${item.index}`) return;
  question.dataset.item = item.index;
  byId("evidence").scrollTop = 0;
  byId("stage").scrollIntoView();
  const verdict = isDoubted(item)
    ? [", looks like ", longName(classes[item.suggested], "b.name.suggested")]
    : [", and it looks like it"];
  const given = longName(classes[item.label], "b.name.given");
  question.replaceChildren("Labelled ", given, ...verdict);
}

/** Enlarge the picture to its frame, but a tiny one only so far that it can still be recognised. */
function fitPicture() {
  const frame = byId("canvas");
  const [uri, width, height] = currentItem()?.picture ?? [""];
  if (!uri || frame.clientWidth === 0) return;
  const fits = Math.min(frame.clientWidth / width, frame.clientHeight / height);
  const scale = Math.min(fits, MAX_ZOOM);
  const image = byId("picture");
  image.style.width = `${Math.floor(width * scale)}px`;
  image.style.height = `${Math.floor(height * scale)}px`;
  image.classList.toggle("pixelated", scale > PIXELATED);
}

function drawSide(id, title, [label, pictures]) {
  const examples = pictures.map((picture) => {
    const image = thumbnail(picture, `Example of ${classes[label]}`, 110);
    image.title = picture[4]; // its path
    return image;
  });
  byId(id).replaceChildren(
    h("h3", h("span", title), className(label, id)),
    examples.length ? h("div.four", ...examples) : h("p.hint", "No sure example of this class."),
  );
}

function drawCandidate(item, place) {
  const [label, p] = item.top[place];
  const role = label === item.label ? "given" : label === item.suggested ? "suggested" : "plain";
  const button = h(
    "button",
    { type: "button", title: classes[label], onclick: () => relabel(label) },
    h("kbd", `${place + 1}`),
    longName(classes[label]),
    bar(p, role),
    h("span.figure", percent(p)),
  );
  return h("li", button);
}

const drawTwins = (title, indices) =>
  h("figure", h("figcaption.hint", title), h("div.twins", ...indices.map(drawTwin)));

function drawTwin(index) {
  const item = items[index];
  return h(
    "button.twin",
    { type: "button", title: `Labelled ${classes[item.label]}: ${item.path}` },
    { onclick: () => openItem(index) },
    thumbnail(item.picture, "", 90),
    shortName(classes[item.label]),
  );
}

function drawFinished(stats) {
  const below = items.filter((item) => !item.flagged && !entryOf(item));
  const expected = expectedErrors(
    below.map((item) => item.p),
    stats.correction,
  );
  const found = `${plural(stats.errors, "error")} found in ${plural(stats.judged, "judged sample")}. `;
  const title =
    items.length === 0
      ? "There is nothing to review."
      : state.queue.length === 0
        ? "No sample passes these filters."
        : "All of these are reviewed.";
  const buttons = [];
  const offer = (text, onclick, tag = "button") =>
    buttons.push(h(tag, { type: "button", onclick }, text));
  if (state.decisions.size) offer("Download decisions", exportDecisions, "button.primary");
  if (isFiltered()) offer("Clear filters", clearFilters);
  else if (state.filters.scope === "flagged" && below.length) {
    const more = `${number(below.length)} more, about ${plural(expected, "error")}`;
    offer(`Go on below the threshold: ${more}`, goBelow);
  }
  if (state.queue.length) offer("Look at them again", lookAgain);
  const notes = [];
  if (state.decisions.size) notes.push(h("p.hint", ...howToApply()));
  if (data.rest.flagged) {
    const verb = data.rest.flagged === 1 ? "is" : "are";
    const more = `${number(data.rest.flagged)} more ${verb} flagged, but not on this page.`;
    const option = h("code.command", `--report-images ${data.flagged}`);
    const remedy = data.isFull
      ? ["It is full: correct these, then audit again."]
      : ["The audit shows all of them with ", option];
    notes.push(h("p.hint", `${more} `, ...remedy));
  }
  byId("finished").replaceChildren(
    h(
      "div.center",
      h("h2", title),
      h(
        "p.lead",
        `${stats.judged ? found : ""}About ${plural(stats.left, "error")} left in all the data.`,
      ),
      h("div.row", ...buttons),
      ...notes,
    ),
  );
}

function goBelow() {
  setFilters({ scope: "all" });
  goToOpen();
  draw();
  focusWork();
}

function lookAgain() {
  goTo(0);
  draw();
  focusWork();
}

// --- the grid ---

const cards = new Map(); // index -> its card; kept, because decoding pictures is slow

function drawGrid() {
  const shown = state.queue.map((index) => {
    if (!cards.has(index)) cards.set(index, makeCard(items[index]));
    return cards.get(index);
  });
  const list = byId("cards");
  const isSame =
    shown.length === list.children.length && shown.every((c, i) => c === list.children[i]);
  if (!isSame) list.replaceChildren(...shown);
  for (const index of state.queue) updateCard(items[index]);
}

function makeCard(item) {
  return h(
    "li.item",
    { role: "option", title: item.path, ondblclick: () => openItem(item.index) },
    { onclick: (event) => selectCard(item.index, event.shiftKey) },
    h(
      "span.frame",
      thumbnail(item.picture, "", 150),
      h("span.tick", { "aria-hidden": "true" }, "✓"),
      h("span.badge"),
    ),
    isDoubted(item)
      ? change(item.label, item.suggested)
      : h("span.change", className(item.label, "given")),
    h("span.meta", percent(item.p)),
  );
}

function updateCard(item) {
  const entry = entryOf(item);
  const card = cards.get(item.index);
  const isCurrent = item.index === state.current;
  const isSelected = state.selection.has(item.index);
  const shown = `${isCurrent} ${isSelected} ${describe(entry)}`;
  if (card.dataset.state === shown) return; // most of them: there may be thousands
  card.dataset.state = shown;
  const badge = card.querySelector(".badge");
  card.tabIndex = isCurrent ? 0 : -1;
  card.setAttribute("aria-selected", isSelected);
  card.classList.toggle("current", isCurrent);
  card.classList.toggle("decided", Boolean(entry));
  badge.hidden = !entry;
  badge.replaceChildren(shortName(describe(entry)));
  badge.dataset.decision = entry?.decision ?? "";
}

function selectCard(index, isRange) {
  const from = state.queue.indexOf(state.anchor);
  const to = state.queue.indexOf(index);
  if (isRange && from >= 0) {
    for (const i of state.range) state.selection.delete(i); // it may be smaller now
    state.range = state.queue.slice(Math.min(from, to), Math.max(from, to) + 1);
    for (const i of state.range) state.selection.add(i);
  } else {
    if (!state.selection.delete(index)) state.selection.add(index);
    state.anchor = index;
    state.range = [];
  }
  state.current = index;
  draw();
  focusWork();
}

function select(indices) {
  state.selection = new Set(indices);
  state.range = [];
  draw();
}

const selectAll = () => select(state.queue);
const clearSelection = () => select([]);

function moveInGrid(key, isRange) {
  const place = state.queue.indexOf(state.current);
  const last = state.queue.length - 1;
  const shown = [...byId("cards").children];
  const second = shown.findIndex((card) => card.offsetTop > shown[0].offsetTop);
  const columns = second < 0 ? shown.length : second;
  const steps = { arrowleft: -1, arrowright: 1, arrowup: -columns, arrowdown: columns };
  const next = { home: 0, end: last }[key] ?? place + steps[key];
  if (place < 0 || next < 0 || next > last) return;
  if (!isRange) {
    goTo(next);
    draw();
    return focusWork();
  }
  if (!state.selection.has(state.anchor)) {
    state.anchor = state.current;
    state.selection.add(state.current);
  }
  selectCard(state.queue[next], true);
}

