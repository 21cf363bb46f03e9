// Review: state, actions, drawing, events. An action changes `state` and calls `draw`.
//
// Names and paths come from the user's data. They reach the page through text nodes and
// properties only, never as markup.

const VIEWS = ["summary", "review", "grid"];
const STEPS = 200; // undo depth that survives a reload
const MAX_ZOOM = 10; // a tiny picture is easier to recognise while it is not too large
const PIXELATED = 3; // enlarged more than this, pixels are drawn as squares
const CUT_NAME = /^(.{3,})(\P{M}.{6,})$/su; // a name's beginning, and its end that is always shown
const RIGHT_TO_LEFT = // letters that run so, and marks that make others do so
  /[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufefc]/;
const LISTED = 60; // classes in the pick dialog at once

// --- state ---

const NO_FILTERS = { scope: "all", label: "", pair: "", split: "", decision: "", text: "" };
const FIRST_SCOPE = items.some((item) => item.flagged) ? "flagged" : "all";

const state = {
  view: "summary",
  workView: "review", // where a filter from the summary leads
  filters: { ...NO_FILTERS, scope: FIRST_SCOPE },
  queue: [], // indices of the items that pass the filters
  current: -1, // index of the item in front
  isFinished: false, // the last decision left nothing open in the queue
  selection: new Set(), // indices selected in the grid
  anchor: -1, // where a range in the grid starts
  range: [], // indices that the last range has selected
  decisions: new Map(), // path -> {label, decision, newLabel}
  history: [], // steps to undo: {focus: path, before: [[path, entry or null], ...]}
  isStored: true, // false where the browser keeps nothing for a local file
  isExported: true,
};

/** Go to the first item that is open, else to the first. */
const goToOpen = () => goTo(Math.max(0, nextOpen(state.queue, -1, state.decisions)));
const currentItem = () => items[state.current];
const entryOf = (item) => state.decisions.get(item.path);

function restore() {
  try {
    const stored = JSON.parse(localStorage.getItem(data.key)) ?? {};
    state.decisions = new Map(stored.decisions ?? []);
    state.history = stored.history ?? [];
  } catch {
    state.isStored = false;
  }
}

function store() {
  state.isExported = false;
  state.isStored = save(state.history.slice(-STEPS)) || save([]); // steps may need much room
}

/** Say whether the browser could save the decisions, with these steps to undo. */
function save(history) {
  try {
    localStorage.setItem(data.key, JSON.stringify({ decisions: [...state.decisions], history }));
    return true;
  } catch {
    return false;
  }
}

/** Bring the queue, the selection and the current item in line with the filters. */
function refilter() {
  const visible = items.filter((item) => matches(item, state.filters, entryOf(item)));
  state.queue = visible.map((item) => item.index);
  const shown = new Set(state.queue);
  state.selection = new Set([...state.selection].filter((index) => shown.has(index)));
  if (!shown.has(state.current)) goToOpen();
}

function goTo(place) {
  state.current = state.queue[place] ?? -1;
  state.isFinished = false;
}

// --- actions: look around ---

function setView(view) {
  state.view = view;
  if (view !== "summary") state.workView = view;
  if (hashView() !== view) location.hash = `/${view}`; // a reload stays, "back" goes back
  draw();
  const summary = byId("summary"); // with the focus it scrolls by keys
  if (view === "summary" && !summary.contains(document.activeElement))
    summary.focus({ preventScroll: true });
  focusWork();
}

/** Return the view that the address names. No element has such an id, so nothing is scrolled to. */
function hashView() {
  const view = location.hash.slice(2);
  return VIEWS.includes(view) ? view : "summary";
}

function move(by) {
  const place = state.queue.indexOf(state.current) + (state.isFinished ? 0 : by);
  if (place < 0) return say("This is the first one.");
  if (place >= state.queue.length) return say("This is the last one.");
  goTo(place);
  draw();
  focusWork();
}

function setFilters(filters) {
  state.filters = { ...state.filters, ...filters };
  refilter();
  state.isFinished = false;
  draw();
}

function clearFilters() {
  setFilters({ ...NO_FILTERS, scope: state.filters.scope });
  focusWork();
}

const isFiltered = () =>
  Object.entries(state.filters).some(([key, value]) => key !== "scope" && value !== "");

const reviewClass = (label) => openFiltered({ label: `${label}` }, `labelled ${classes[label]}`);
const reviewPair = (label, truth) =>
  openFiltered(
    { pair: `${label}>${truth}` },
    `labelled ${classes[label]} that look like ${classes[truth]}`,
  );

/** Show the items of a class or a pair; those below the threshold too, if none is flagged. */
function openFiltered(filters, name) {
  for (const scope of ["flagged", "all"]) {
    const wanted = { ...NO_FILTERS, scope, ...filters };
    if (!items.some((item) => matches(item, wanted, entryOf(item)))) continue;
    setFilters(wanted);
    goToOpen();
    return setView(state.workView);
  }
  say(`None of the ${plural(items.length, "sample")} on this page is ${name}.`);
}

function openItem(index) {
  if (!state.queue.includes(index)) setFilters(NO_FILTERS);
  goTo(state.queue.indexOf(index));
  setView("review");
}

/** Show a message in place of the advice for a while; screen readers say it. */
function say(...parts) {
  const message = byId("message");
  message.replaceChildren(...parts);
  message.title = message.textContent;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => message.replaceChildren(), 2500 + 40 * message.title.length);
}

// --- actions: decide ---

/** Return the items that a decision is about: the selection in the grid, else the one in front. */
function targets() {
  if (state.view === "grid" && state.selection.size)
    return items.filter((item) => state.selection.has(item.index));
  const isShown = state.current >= 0 && !(state.view === "review" && state.isFinished);
  return isShown ? [currentItem()] : [];
}

/** Return the targets of a press; none where their card is out of sight: then it is shown first. */
function seenTargets() {
  const card = state.view === "grid" && !state.selection.size && cards.get(state.current);
  if (!card) return targets();
  const { left, top, width, height } = card.getBoundingClientRect();
  const seen = document.elementFromPoint(left + width / 2, top + height / 2);
  if (card.contains(seen)) return targets();
  card.scrollIntoView({ block: "nearest" });
  say("This one is next. Press again to decide.");
  return [];
}

/** Decide about `chosen`; `choose(item)` returns [decision, new class id], or null to skip. */
function decide(choose, chosen = seenTargets()) {
  if (chosen.length === 0) return;
  const before = [];
  let last = null;
  for (const item of chosen) {
    const choice = choose(item);
    if (!choice) continue;
    const [decision, newLabel] = choice[1] === item.label ? ["keep"] : choice;
    last = { label: classes[item.label], decision, newLabel: classes[newLabel] ?? "" };
    before.push([item.path, entryOf(item) ?? null]);
    state.decisions.set(item.path, last);
  }
  if (!last) return say("No other class is suggested: K keeps the label, P picks a class.");
  state.history.push({ focus: chosen[0].path, before });
  store();
  const again = before.filter(([, entry]) => entry).length;
  advance(chosen.at(-1), again === before.length);
  if (before.length > 1) {
    const known = again ? `, ${number(again)} of them again` : "";
    return say(`${number(before.length)} samples decided${known}. Z undoes.`);
  }
  const verdict = last.newLabel ? ["→ ", shortName(last.newLabel)] : [describe(last)];
  say(shortName(last.label), " ", ...verdict, ". Z undoes.");
}

const keep = () => decide(() => ["keep"]);
const accept = () => decide((item) => (isDoubted(item) ? ["relabel", item.suggested] : null));
const relabel = (label) => decide(() => ["relabel", label]);
const remove = () => decide(() => ["remove"]);
const unsure = () => decide(() => ["unsure"]);

/** Move on from a decided item to the next open one; if none is, on a second look to the next. */
function advance(item, isSecond) {
  const from = state.queue.indexOf(item.index);
  let place = nextOpen(state.queue, from, state.decisions);
  if (place < 0 && isSecond && from + 1 < state.queue.length) place = from + 1;
  if (place >= 0) state.current = state.queue[place];
  state.selection.clear();
  refilter();
  state.isFinished = place < 0;
  draw();
  focusWork();
}

function takeTop(place) {
  const candidate = currentItem()?.top[place];
  if (candidate) relabel(candidate[0]);
}

function undo() {
  const step = state.history.pop();
  if (!step) return say("There is nothing to undo.");
  for (const [path, entry] of step.before) {
    if (entry) state.decisions.set(path, entry);
    else state.decisions.delete(path);
  }
  store();
  refilter();
  const place = state.queue.indexOf(itemOf.get(step.focus)?.index);
  if (place >= 0) goTo(place);
  draw();
  focusWork();
  const away = place < 0 && itemOf.has(step.focus) ? ", outside these filters" : "";
  say(`${plural(step.before.length, "decision")} undone${away}.`);
}

// --- actions: files and theme ---

function exportDecisions() {
  const rank = ([path]) => itemOf.get(path)?.index ?? items.length; // strangers last
  const entries = [...state.decisions].sort((a, b) => rank(a) - rank(b));
  const rows = entries.map(([path, entry]) => [path, entry.label, entry.decision, entry.newLabel]);
  const href = URL.createObjectURL(encodeText(csvText([COLUMNS, ...rows])));
  h("a", { href, download: "decisions.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
  state.isExported = true;
  say(`decisions.csv with ${plural(rows.length, "decision")}.`);
}

async function importDecisions(file) {
  let found;
  try {
    found = readDecisions(decodeText(new Uint8Array(await file.arrayBuffer())));
  } catch (error) {
    return say(`${file.name} cannot be read: ${error.message}.`);
  }
  const { entries, problems } = found;
  const isOther = (old, entry) => old && describe(old) !== describe(entry);
  const others = entries.filter(([path, entry]) => isOther(state.decisions.get(path), entry)).length;
  if (entries.length) {
    const before = entries.map(([path]) => [path, state.decisions.get(path) ?? null]);
    state.history.push({ focus: currentItem()?.path, before });
    for (const [path, entry] of entries) state.decisions.set(path, entry);
    store();
  }
  refilter();
  goToOpen();
  draw();
  const some = problems.slice(0, 3).join("; ");
  const left = problems.length ? ` ${plural(problems.length, "line")} left out: ${some}.` : "";
  const strange = entries.filter(([path]) => !itemOf.has(path)).length;
  const away = strange ? ` ${number(strange)} of them not on this page.` : "";
  const replaced = others ? ` ${number(others)} of them in place of another one: Z undoes.` : "";
  say(`${plural(entries.length, "decision")} imported.${replaced}${away}${left}`);
}

function switchTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme ?? system) === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("elr-theme", root.dataset.theme);
  } catch {
    // then the choice lasts until the page closes
  }
}

function restoreTheme() {
  try {
    const theme = localStorage.getItem("elr-theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // then the system's choice counts
  }
}

// --- drawing: building blocks ---

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

// --- drawing: the page ---

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

// --- drawing: one suspect ---

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

// --- drawing: the grid ---

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

// --- the pick dialog ---

const pick = { chosen: [], first: [], found: [], active: 0 };

function openPick() {
  const chosen = seenTargets();
  if (chosen.length === 0) return;
  const isOne = chosen.length === 1;
  byId("pick-title").textContent = isOne
    ? "Which class is it?"
    : `Which class are these ${number(chosen.length)}?`;
  const [{ top, label }] = chosen;
  pick.chosen = chosen; // another tab may change what is in front
  pick.first = isOne ? top.map(([id]) => id).filter((id) => id !== label) : [];
  byId("pick-text").value = "";
  searchPick();
  byId("pick").showModal();
  byId("pick-text").focus();
}

function searchPick() {
  pick.found = searchClasses(byId("pick-text").value, pick.first);
  const shown = pick.found.slice(0, LISTED);
  const options = shown.map((id, i) =>
    h(
      "li",
      { id: `pick-${i}`, role: "option", onclick: () => takePick(id) },
      thumbnail(exampleOf.get(id) ?? [""], "", 40),
      longName(classes[id]),
    ),
  );
  byId("pick-list").replaceChildren(...options);
  const more = shown.length < pick.found.length;
  const count = `${number(shown.length)} of ${number(pick.found.length)}`;
  byId("pick-count").textContent = more ? `${count}: type to narrow` : "";
  if (shown.length === 0) byId("pick-count").textContent = "No class has such a name.";
  markPick(0);
}

function markPick(active) {
  const options = [...byId("pick-list").children];
  pick.active = Math.max(0, Math.min(options.length - 1, active));
  options.forEach((option, i) => option.setAttribute("aria-selected", i === pick.active));
  options[pick.active]?.scrollIntoView({ block: "nearest" });
  byId("pick-text").setAttribute("aria-activedescendant", options[pick.active]?.id ?? "");
}

function takePick(label) {
  if (label === undefined) return;
  byId("pick").close();
  decide(() => ["relabel", label], pick.chosen);
}

// --- events ---

const ACTIONS = {
  keep,
  accept,
  remove,
  unsure,
  undo,
  pick: openPick,
  next: () => move(1),
  previous: () => move(-1),
  start: () => setView("review"),
  import: () => byId("import-file").click(),
  export: exportDecisions,
  theme: switchTheme,
  help: () => byId("help").showModal(),
  select: () => select(state.selection.size ? [] : state.queue),
  "clear-filters": clearFilters,
};

const toGrid = () => setView(state.view === "grid" ? "review" : "grid");
const openCurrent = () => state.current >= 0 && openItem(state.current);

function toFilters() {
  if (state.view === "summary") setView(state.workView);
  byId("filters").elements.text.focus();
  byId("filters").elements.text.select();
}

const KEYS = { s: () => setView("summary"), g: toGrid, f: toFilters, "/": toFilters };
Object.assign(KEYS, { "?": ACTIONS.help, z: undo });
const DECIDING = { k: keep, a: accept, enter: accept, p: openPick, r: remove, delete: remove };
Object.assign(DECIDING, { backspace: remove, u: unsure, j: ACTIONS.previous, l: ACTIONS.next });
const VIEW_KEYS = {
  summary: { enter: ACTIONS.start },
  review: { ...DECIDING, arrowleft: ACTIONS.previous, arrowright: ACTIONS.next },
  grid: { ...DECIDING, o: openCurrent, escape: clearSelection },
};
for (const digit of [1, 2, 3, 4, 5]) VIEW_KEYS.review[digit] = () => takeTop(digit - 1);
for (const key of ["arrowleft", "arrowright", "arrowup", "arrowdown", "home", "end"])
  VIEW_KEYS.grid[key] = (event) => moveInGrid(key, event.shiftKey);
VIEW_KEYS.grid[" "] = (event) => state.current >= 0 && selectCard(state.current, event.shiftKey);
const REPEATING = /^(arrow|[jl]$)/; // held down, other keys act once

/** Return the key as on a Latin keyboard: 'k' also where that key types another letter. */
function keyOf(event) {
  const [, letter, digit] = event.code.match(/^Key(.)$|^Digit([1-5])$/) ?? [];
  if (digit && !event.shiftKey) return digit; // on a French keyboard it types another sign
  const isPlain = event.key.length > 1 || event.key.charCodeAt(0) < 128;
  return (isPlain ? event.key : (letter ?? event.key)).toLowerCase();
}

function actionOf(event, key) {
  if (event.altKey) return undefined;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z" && !event.shiftKey) return undo;
    return key === "a" && state.view === "grid" ? selectAll : undefined;
  }
  const pressesButton = key === "enter" || key === " ";
  if (pressesButton && event.target.closest("button, a")) return undefined;
  return VIEW_KEYS[state.view][key] ?? KEYS[key];
}

function onKey(event) {
  const key = keyOf(event);
  if (event.isComposing) return; // the key belongs to the input method
  if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input, select, textarea")) {
    const leaves = key === "escape" || (key === "enter" && event.target.type === "search");
    if (!leaves) return;
    event.preventDefault();
    event.target.blur();
    return focusWork();
  }
  const action = actionOf(event, key);
  if (!action) return;
  event.preventDefault();
  if (!event.repeat || REPEATING.test(key)) action(event);
}

function onPickKey(event) {
  if (event.isComposing) return; // Enter chooses a character, not yet a class
  const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
  if (step) markPick(pick.active + step);
  else if (event.key === "Enter") takePick(pick.found[pick.active]);
  else return;
  event.preventDefault();
}

/** Say whether an event is beside an open dialog, not on its padding. */
function liesBeside(dialog, { clientX, clientY }) {
  const { left, right, top, bottom } = dialog.getBoundingClientRect();
  return clientX < left || clientX > right || clientY < top || clientY > bottom;
}

function listen() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do], [data-view]");
    if (button?.dataset.view) setView(button.dataset.view);
    else if (button) ACTIONS[button.dataset.do]();
    const isDialog = document.querySelector("dialog[open]");
    if (button && event.detail && !isDialog) focusWork(); // after the mouse, Enter is a decision
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", ({ target }) =>
    setFilters({ [target.name]: target.value }),
  );
  let isPointed = false; // a list in use by keyboard keeps the focus: Esc leaves it
  byId("filters").addEventListener("pointerdown", () => (isPointed = true));
  byId("filters").addEventListener("keydown", () => (isPointed = false));
  byId("filters").addEventListener("change", ({ target }) => {
    if (!isPointed || target.type === "search") return;
    target.blur();
    focusWork();
  });
  byId("import-file").addEventListener("change", ({ target }) => {
    if (target.files[0]) importDecisions(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  byId("pick-text").addEventListener("input", searchPick);
  byId("pick").addEventListener("keydown", onPickKey);
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("close", focusWork);
    let isBeside = false; // where the press began: a drag that selects text may end outside
    dialog.addEventListener("pointerdown", (event) => (isBeside = liesBeside(dialog, event)));
    dialog.addEventListener("click", () => isBeside && dialog.close());
  }
  new ResizeObserver(fitPicture).observe(byId("canvas"));
  window.addEventListener("hashchange", () => {
    if (hashView() !== state.view) setView(hashView());
  });
  window.addEventListener("storage", (event) => {
    if (event.key !== data.key) return;
    restore(); // decided in another tab
    refilter();
    if (state.view === "summary") goToOpen();
    draw();
  });
  window.addEventListener("beforeunload", (event) => {
    if (!state.isStored && !state.isExported) event.preventDefault();
  });
}

function fillFilters() {
  const fill = (field, options) => {
    const nodes = options.map(([value, text]) => h("option", { value }, text));
    byId("filters").elements[field].replaceChildren(...nodes);
  };
  const count = (key, counted = items) => {
    const counts = new Map();
    for (const item of counted) counts.set(key(item), (counts.get(key(item)) ?? 0) + 1);
    return [...counts];
  };
  const flagged = items.filter((item) => item.flagged).length;
  const twins = items.filter((item) => item.twins.length).length;
  const scopes = [["all", `all (${number(items.length)})`]];
  if (flagged) scopes.unshift(["flagged", `flagged (${number(flagged)})`]);
  if (twins) scopes.push(["twins", `duplicates (${number(twins)})`]);
  fill("scope", scopes);
  const labels = count((item) => item.label).sort((a, b) => a[0] - b[0]);
  fill("label", [
    ["", "any label"],
    ...labels.map(([label, n]) => [`${label}`, `${classes[label]} (${n})`]),
  ]);
  const pairs = count(pairOf, items.filter(isDoubted)).sort((a, b) => b[1] - a[1]);
  const names = (pair) =>
    pair
      .split(">")
      .map((label) => classes[label])
      .join(" → ");
  fill("pair", [["", "any pair"], ...pairs.map(([pair, n]) => [pair, `${names(pair)} (${n})`])]);
  const splits = count((item) => item.split);
  byId("split-filter").hidden = splits.length < 2;
  fill("split", [["", "any split"], ...splits.map(([split, n]) => [split, `${split} (${n})`])]);
  fill("decision", [["", "any decision"], ["open", "open"], ...Object.entries(WORDS)]);
}

function start() {
  restoreTheme();
  restore();
  fillFilters();
  refilter();
  state.isFinished = nextOpen(state.queue, -1, state.decisions) < 0;
  drawSummary();
  byId("how-to-apply").replaceChildren(...howToApply());
  byId("beside-title").textContent = data.hasNearest ? "Nearest sure examples" : "Sure examples";
  listen();
  setView(hashView());
}

start();
