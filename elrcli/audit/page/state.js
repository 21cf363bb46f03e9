// Review: its state, and the actions that change it. An action calls `draw` at its end.

const VIEWS = ["summary", "review", "grid"];
const STEPS = 200; // undo depth that survives a reload

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

