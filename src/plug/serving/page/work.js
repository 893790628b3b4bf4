// A work is a tree of edits. Each node replaces `cut` characters at `at` by `text`, written by the user ("u") or the
// model ("m"). The text shown is what the edits from the root to `work.here` make. Nothing is ever removed from the
// tree, so each branch can be visited again. No DOM here.

const TYPING_PAUSE = 4000; // ms: later typing begins a node of its own

export const newId = () => crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;

export function newWork() {
  return {
    id: newId(),
    title: "", note: "", settings: {}, changed: Date.now(), here: 0, last: {},
    nodes: [{ id: 0, parent: -1, at: 0, cut: 0, text: "", by: "u", time: Date.now() }],
  };
}

export const path = (work, id = work.here) => {
  const found = [];
  for (let node = work.nodes[id]; node; node = work.nodes[node.parent]) found.push(node);
  return found.reverse();
};

// The parts at a node that has children, of each work: such a node no longer changes.
const known = new WeakMap();

// [{by, text, node, from}]: who wrote which part; `from` is where the part begins in its node's text.
export function parts(work, id = work.here) {
  const node = work.nodes[id], kept = known.get(work), missing = [];
  let each = work.nodes[node.parent];
  for (; each && each.id !== kept?.id; each = work.nodes[each.parent]) missing.push(each);
  const before = missing.reduceRight(edited, each ? kept.found : []);
  if (node.parent >= 0) known.set(work, { id: node.parent, found: before });
  return edited(before, node);
}

const edited = (found, node) => [...slice(found, 0, node.at), { by: node.by, text: node.text, node: node.id, from: 0 },
  ...slice(found, node.at + node.cut, Infinity)].filter((part) => part.text);

function slice(all, from, to) {
  const kept = [];
  let at = 0;
  for (const part of all) {
    const begin = Math.max(from - at, 0), end = Math.min(to - at, part.text.length);
    if (begin < end) kept.push({ ...part, text: part.text.slice(begin, end), from: part.from + begin });
    at += part.text.length;
  }
  return kept;
}

export const textOf = (work, id = work.here) => parts(work, id).map((part) => part.text).join("");

// The smallest replacement that makes `after` of `before`, ending at the caret where that is ambiguous.
export function difference(before, after, caret = after.length) {
  const shorter = Math.min(before.length, after.length);
  let end = 0;
  const most = Math.min(shorter, after.length - Math.min(caret, after.length));
  while (end < most && before.at(-1 - end) === after.at(-1 - end)) end++;
  let at = 0;
  while (at < shorter - end && before[at] === after[at]) at++;
  while (end < shorter - at && before.at(-1 - end) === after.at(-1 - end)) end++;
  // A surrogate pair stays whole.
  if (at && isHigh(before, at - 1)) at--;
  if (end && isHigh(before, before.length - end - 1)) end--;
  return { at, cut: before.length - at - end, text: after.slice(at, after.length - end) };
}

const isHigh = (text, index) => (text.charCodeAt(index) & 0xfc00) === 0xd800;

export function add(work, edit, by, more = {}) {
  const node = { id: work.nodes.length, parent: work.here, ...edit, by, time: Date.now(), ...more };
  work.nodes.push(node);
  go(work, node.id);
  return node;
}

// Typing goes on in the node where it began, so that undo takes back a phrase and not a letter.
export function type(work, edit) {
  const node = work.nodes[work.here], now = Date.now();
  const inside = edit.at >= node.at && edit.at + edit.cut <= node.at + node.text.length;
  const isLeaf = !work.nodes.some((each) => each.parent === node.id);
  if (node.by !== "u" || !node.id || !isLeaf || !inside || now - node.time > TYPING_PAUSE) return add(work, edit, "u");
  const from = edit.at - node.at;
  node.text = node.text.slice(0, from) + edit.text + node.text.slice(from + edit.cut);
  node.time = work.changed = now;
  return node;
}

export function go(work, id) {
  for (const node of path(work, id)) if (node.parent >= 0) work.last[node.parent] = node.id;
  work.here = id;
  work.changed = Date.now();
}

export const canUndo = (work) => work.here > 0;
export const next = (work) => work.last[work.here] ?? work.nodes.findLast((node) => node.parent === work.here)?.id;
export const undo = (work) => canUndo(work) && go(work, work.nodes[work.here].parent);
export const redo = (work) => next(work) !== undefined && go(work, next(work));

// Where the token under character `index` of a model's node begins and ends, and what else might have stood there.
export function tokenAt(node, index) {
  const tokens = node.tokens ?? [];
  const found = tokens.findLastIndex((token) => token.at <= index);
  if (found < 0) return null;
  return { ...tokens[found], end: tokens[found + 1]?.at ?? node.text.length };
}

export const caretAfter = (work) => {
  const node = work.nodes[work.here];
  return node.at + node.text.length;
};

// A work from a file; an error where it is not one. Settings and probabilities that make no sense are left out.
export function fromJSON(text) {
  const work = JSON.parse(text);
  const isText = (value) => typeof value === "string";
  const isNode = (node, index) => node && node.id === index && Number.isInteger(node.parent) && node.parent < index &&
    (index === 0 || node.parent >= 0) && Number.isInteger(node.at) && node.at >= 0 && Number.isInteger(node.cut) && node.cut >= 0 &&
    isText(node.text) && (node.by === "u" || node.by === "m");
  if (!work || !Array.isArray(work.nodes) || !work.nodes.length || !work.nodes.every(isNode) || !Number.isInteger(work.here) || !work.nodes[work.here])
    throw new Error("format");
  const { id, last } = newWork();
  const isChance = (pair) => Array.isArray(pair) && isText(pair[0]) && Number.isFinite(pair[1]);
  const isToken = (token) => token && Number.isInteger(token.at) && Array.isArray(token.top) && token.top.every(isChance);
  const tokens = (node) => (Array.isArray(node.tokens) ? node.tokens.filter(isToken) : undefined);
  const isSetting = ([name, value]) => (name === "seed" ? /^\d*$/.test(value) : Number.isFinite(value));
  const settings = Object.fromEntries(Object.entries(work.settings ?? {}).filter(isSetting));
  return {
    id, settings, last, here: work.here, changed: Date.now(),
    title: isText(work.title) ? work.title : "", note: isText(work.note) ? work.note : "",
    nodes: work.nodes.map((node) => ({
      id: node.id, parent: node.parent, at: node.at, cut: node.cut, text: node.text, by: node.by, time: Number(node.time) || 0, tokens: tokens(node),
    })),
  };
}
