"use strict";

// The data of the page and what can be computed from it: no element is made or changed here.
// The scripts are inlined as one: logic, summary, state, drawing, events.

const byId = (id) => document.getElementById(id);

const data = JSON.parse(byId("data").textContent);
byId("data").remove(); // up to 25 MB that nobody needs twice
const { classes } = data;
const classIds = new Map(classes.map((name, id) => [name, id]));
const items = data.items.map((item, index) => {
  const [picture, given, suggested] = data.gallery[index];
  return {
    ...item,
    index,
    picture: data.pictures[picture],
    examples: [
      [item.label, given.map((place) => data.pictures[place])],
      [item.suggested, suggested.map((place) => data.pictures[place])],
    ],
    twins: data.twins.filter((group) => group.items.includes(index)),
  };
});
const itemOf = new Map(items.map((item) => [item.path, item]));
const exampleOf = new Map(); // class id -> a picture that is surely of that class
for (const [label, [picture]] of items.flatMap((item) => item.examples))
  if (picture && !exampleOf.has(label)) exampleOf.set(label, picture);

const WORDS = { keep: "kept", relabel: "changed", remove: "removed", unsure: "unsure" };
const DECISIONS = Object.keys(WORDS);
const COLUMNS = ["path", "label", "decision", "new_label"];
const PRIOR = 10; // errors for which the prediction is trusted before the review has a say
const AHEAD = 20; // suspects that the advice looks at
const ACCEPTED = 0.9; // error probability from which it may propose to accept them unseen

// --- wording ---

const number = (value) => Math.round(value).toLocaleString("en-US");

function plural(count, noun) {
  return `${number(count)} ${noun}${Math.round(count) === 1 ? "" : "s"}`;
}

function percent(share) {
  if (share === null) return "–";
  const value = 100 * share;
  if (value >= 99.5 && value < 100) return ">99%";
  if (value > 0 && value < 0.05) return "<0.1%";
  return `${value > 0 && value < 9.95 ? value.toFixed(1) : Math.round(value)}%`;
}

/** Say what the pictures of a group of duplicates have in common. */
const likeness = (group) => {
  if (group.exact) return "Same file";
  return group.partlyExact ? "Looks the same, some are the same file" : "Looks the same";
};

function describe(entry) {
  if (!entry) return "open";
  return entry.decision === "relabel" ? `→ ${entry.newLabel}` : WORDS[entry.decision];
}

// --- the review in numbers ---

const isDoubted = (item) => item.suggested !== item.label;
const isError = (entry) => entry.decision === "relabel" || entry.decision === "remove";

/** Return text as it is searched: folders of a Mac may spell "é" as two characters. */
const folded = (text) => text.normalize("NFC").toLowerCase();

/** Say whether an item passes the filters; `entry` is its decision, if it has one. */
function matches(item, filters, entry) {
  const needle = folded(filters.text.trim());
  const names = [item.path, classes[item.label], classes[item.suggested]];
  return (
    (filters.scope !== "flagged" || item.flagged) &&
    (filters.scope !== "twins" || item.twins.length > 0) &&
    (filters.label === "" || filters.label === `${item.label}`) &&
    (filters.pair === "" || filters.pair === pairOf(item)) &&
    (filters.split === "" || filters.split === item.split) &&
    (filters.decision === "" || filters.decision === (entry?.decision ?? "open")) &&
    (needle === "" || names.some((name) => folded(name).includes(needle)))
  );
}

const pairOf = (item) => `${item.label}>${item.suggested}`;

/**
 * Count what the review found and estimate what is left.
 *
 * `correction` = found errors / expected errors among the judged items, pulled towards 1 by PRIOR.
 * `left` = sum of the corrected probabilities of everything that is not judged: open and unsure
 * items, and `rest`, the samples that are not on the page.
 */
function reviewStats(decisions, rest) {
  const stats = { kept: 0, errors: 0, expected: 0 };
  const open = [];
  for (const item of items) {
    const entry = decisions.get(item.path);
    if (!entry || entry.decision === "unsure") open.push(item.p);
    else {
      stats.expected += item.p;
      stats[isError(entry) ? "errors" : "kept"] += 1;
    }
  }
  stats.judged = stats.errors + stats.kept;
  stats.precision = stats.judged ? stats.errors / stats.judged : null;
  stats.correction = (stats.errors + PRIOR) / (stats.expected + PRIOR);
  const onPage = expectedErrors(open, stats.correction);
  stats.left = onPage + Math.min(rest.count, rest.expected * stats.correction);
  return stats;
}

function expectedErrors(probabilities, correction) {
  return probabilities.reduce((sum, p) => sum + Math.min(1, p * correction), 0);
}

/** Say whether to go on, from the probabilities of the next open items. */
function advise(stats, upcoming) {
  if (upcoming.length === 0) return "Nothing is open here.";
  const hits = expectedErrors(upcoming, stats.correction);
  const share = hits / upcoming.length;
  const next = upcoming.length === 1 ? "the next one" : `the next ${upcoming.length}`;
  const errors = hits < 0.5 ? "less than one error" : `about ${plural(hits, "error")}`;
  const expected = `${errors} in ${next}.`;
  if (share < 0.1) return `${stats.judged ? "You can stop" : "Few suspects"}: ${expected}`;
  if (share < 0.5) return `Still worth a look: ${expected}`;
  const isClear = stats.judged >= 30 && stats.precision >= 0.97 && upcoming.length === AHEAD;
  if (isClear && data.canAccept && upcoming.every((p) => p >= ACCEPTED))
    return `Nearly all are errors: elr apply --accept-above ${ACCEPTED} could take the next.`;
  return `Go on: ${expected}`;
}

/** Return the place in `queue` to go to from `place`: the next open item, else the first, else -1. */
function nextOpen(queue, place, decisions) {
  const isOpen = (index) => !decisions.has(items[index].path);
  const later = queue.findIndex((index, i) => i > place && isOpen(index));
  return later >= 0 ? later : queue.findIndex(isOpen);
}

/** Return the ids of the classes that fit the typed text, best first; `first` leads the list. */
function searchClasses(text, first) {
  const needle = folded(text.trim());
  const others = classes.map((_, id) => id).filter((id) => !first.includes(id));
  return [...first, ...others]
    .map((id) => [fit(folded(classes[id]), needle), id])
    .filter(([rank]) => rank < Infinity)
    .sort((a, b) => a[0] - b[0])
    .map(([, id]) => id);
}

/** Rank how a name fits: the same, its start, a word's start, a part, its letters in order. */
function fit(name, needle) {
  const at = name.indexOf(needle);
  if (at === 0) return name === needle ? 0 : 1;
  if (at > 0) return /[\p{L}\p{N}]/u.test(name[at - 1]) ? 3 : 2;
  let from = 0;
  for (const letter of needle) {
    from = name.indexOf(letter, from) + 1;
    if (from === 0) return Infinity;
  }
  return 4;
}

// --- decisions.csv ---

// Cells are quoted where CSV needs it and otherwise written as they are: also one that begins with
// =, +, - or @. A spreadsheet may take that for a formula, but a changed cell would no longer name
// the file, and `elr apply` must find it again.
function csvText(rows) {
  const quote = (cell) => `"${cell.replaceAll('"', '""')}"`;
  const written = (cell) => (/[",;\t\r\n]|^\s|\s$/.test(cell) ? quote(cell) : cell);
  return rows.map((row) => `${row.map(written).join(",")}\n`).join("");
}

/** Return [line number, cells] of every row that is not blank. */
function parseCsv(text) {
  const header = text.split("\n", 1)[0].replaceAll('"', "");
  const names = (mark) => header.split(mark).map((name) => name.trim());
  const delimiter = [",", ";", "\t"].find((mark) => names(mark).includes("path")) ?? ",";
  const rows = [];
  let [cells, cell, isQuoted, line, start] = [[], "", false, 1, 1];
  const endCell = () => {
    cells.push(cell);
    cell = "";
  };
  const endRow = () => {
    endCell();
    if (cells.some((value) => value.trim() !== "")) rows.push([start, cells]);
    [cells, start] = [[], line];
  };
  for (let i = 0; i < text.length; i++) {
    const c = text[i];
    if (c === "\n") line += 1;
    if (isQuoted && c === '"' && text[i + 1] === '"') cell += text[i++];
    else if (isQuoted && c === '"') isQuoted = false;
    else if (isQuoted) cell += c;
    else if (c === '"' && cell === "") isQuoted = true;
    else if (c === delimiter) endCell();
    else if (c === "\n") endRow();
    else if (c !== "\r" || text[i + 1] !== "\n") cell += c;
  }
  if (isQuoted) throw new Error(`line ${start}: a quote is not closed`);
  endRow();
  return rows;
}

/** Return {entries, problems}: the decisions of a file by path, and its lines that are none. */
function readDecisions(text) {
  const [header, ...rows] = parseCsv(text);
  const names = (header?.[1] ?? []).map((name) => name.trim());
  const columns = COLUMNS.map((name) => names.indexOf(name));
  if (columns.includes(-1)) throw new Error(`the first line must name ${COLUMNS.join(", ")}`);
  const entries = new Map();
  const problems = [];
  for (const [line, cells] of rows) {
    const [path, ...others] = columns.map((column) => cells[column] ?? "");
    const [label, decision, newLabel] = others.map((cell) => cell.trim());
    const item = itemOf.get(path); // none: from a page with more samples; kept and exported again
    const isRelabel = decision === "relabel";
    const isChange = isRelabel && newLabel !== label;
    const entry = { label, decision, newLabel: isChange ? newLabel : "" };
    if (isRelabel && !isChange) entry.decision = "keep";
    const problem = () => {
      if (!DECISIONS.includes(decision)) return "unknown decision";
      const named = isRelabel ? [label, newLabel] : [label];
      if (!named.every((name) => classIds.has(name))) return "unknown class";
      if (item && classes[item.label] !== label) return "another label";
      if (!isRelabel && newLabel && newLabel !== label) return `${decision} with a new label`;
      const first = entries.get(path);
      return first && describe(first) !== describe(entry) ? "decided twice" : "";
    };
    const found = problem();
    if (found) problems.push(`line ${line}: ${found}`);
    else entries.set(path, entry);
  }
  return { entries: [...entries], problems };
}

// A file name that is not UTF-8 carries its odd bytes as U+DC80..U+DCFF (Python's
// surrogateescape). Both directions keep the bytes, so that `elr apply` finds the file.

function encodeText(text) {
  const parts = text.split(/([\udc80-\udcff])/u); // with u: lone surrogates only
  const toByte = (part) => Uint8Array.of(part.charCodeAt(0) - 0xdc00);
  return new Blob(parts.map((part, i) => (i % 2 ? toByte(part) : part)));
}

function decodeText(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    const raw = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
    const toBytes = (text) => Uint8Array.from(text, (c) => c.charCodeAt(0));
    const utf8 =
      /[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}|[\x80-\xff]/g;
    return raw.replace(utf8, (found) =>
      found.length > 1
        ? new TextDecoder().decode(toBytes(found))
        : String.fromCharCode(0xdc00 + found.charCodeAt(0)),
    );
  }
}
