// Review: the pick dialog, keys and buttons, and the start of the page.

const LISTED = 60; // classes in the pick dialog at once

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
