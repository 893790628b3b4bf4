// The writing desk: what the parts of the page do.

import { ApiError, call } from "./api.js";
import * as store from "./store.js";
import { openReadingRoom } from "./understand.js";
import { reading, write } from "./writer.js";
import * as tree from "./work.js";
import { switchLanguage, t, translate } from "./words.js";

const $ = (id) => document.getElementById(id);
const make = (tag, more = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), more);
  element.append(...children);
  return element;
};

const PRESETS = {
  "小说续写": { length: 256, temperature: 0.9, top_k: 20, top_p: 0, text: "却说那日天色将晚，只见山门外走进一个老和尚来，手里拿着一根禅杖，对众人道：" },
  "技术文档": { length: 200, temperature: 0.7, top_k: 20, top_p: 0.9, text: "数据库索引是一种用来加快查询速度的数据结构。建立索引时要注意以下几点：" },
  "常识问答": { length: 80, temperature: 0.5, top_k: 10, top_p: 0, text: "问：为什么天空是蓝色的？\n答：" },
  "零样本分类": { length: 8, temperature: 0, top_k: 1, top_p: 0, text: "昨晚的比赛踢满了一百二十分钟，主队在点球大战中取胜。这段话说的是" },
};
const DEFAULTS = { length: 128, temperature: 0.9, top_k: 20, top_p: 0, seed: "" };
const FIELDS = Object.keys(DEFAULTS);
const WAYS = 3; // of "another"

const known = new Map(); // of each work opened here: its `changed` when this tab last read or saved it
let models = [], work = tree.newWork(), controller = null, answer = null, isSaved = true, saving = Promise.resolve(), timer = 0;
const text = $("text"), ink = $("ink");
const model = () => models.find((each) => each.id === $("model").value) ?? models[0];
function bound(name) { // a number outside what the field allows
  const field = $(name);
  if (name !== "seed") field.value = Math.min(Math.max(Number(field.value) || 0, Number(field.min)), Number(field.max));
}
const settings = () => Object.fromEntries(FIELDS.map((name) => [name, name === "seed" ? $(name).value : Number($(name).value)]));

// --- what is shown ------------------------------------------------------------------------------

function show(caret) {
  const parts = tree.parts(work);
  text.value = parts.map((part) => part.text).join("");
  ink.replaceChildren(...parts.map((part) => make("span", { className: part.by === "m" ? "by-model" : "by-user", textContent: part.text })));
  if (caret !== undefined) text.setSelectionRange(caret, caret);
  const start = $("write");
  start.dataset.t = parts.some((part) => part.by === "m") ? "接着写" : "开始写作";
  start.textContent = t(start.dataset.t);
  $("count").textContent = `${[...text.value].length} ${t("字")}`;
  const isBusy = Boolean(controller);
  document.body.classList.toggle("busy", isBusy);
  text.readOnly = isBusy;
  text.setAttribute("aria-busy", isBusy);
  $("stop").disabled = !isBusy;
  for (const id of ["write", "another"]) $(id).disabled = isBusy;
  $("undo").disabled = isBusy || !tree.canUndo(work);
  $("redo").disabled = isBusy || tree.next(work) === undefined;
  showTree();
}

function showTree() {
  if (!$("history").open) return;
  const onPath = new Set(tree.path(work).map((node) => node.id));
  const rows = [];
  const walk = (id, depth) => {
    const node = work.nodes[id];
    const said = node.text.trim().slice(0, 24) || (id ? `－${node.cut} ${t("字")}` : t("开头"));
    const button = make("button", { type: "button", textContent: `${"· ".repeat(Math.min(depth, 8))}${node.by === "m" ? "✎ " : ""}${said}`, className: onPath.has(id) ? "" : "off" });
    if (id === work.here) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => controller || (tree.go(work, id), changed(), show(tree.caretAfter(work))));
    rows.push(make("li", {}, button));
    const children = work.nodes.filter((each) => each.parent === id);
    for (const child of children) walk(child.id, depth + (children.length > 1));
  };
  walk(0, 0);
  $("tree").replaceChildren(...rows);
  $("tree").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
}

function say(message, isBad = false) {
  const notice = $("notice");
  notice.hidden = !message;
  notice.classList.toggle("bad", isBad);
  notice.textContent = message;
}

function complain(error) {
  if (!(error instanceof ApiError)) return say(error.message, true);
  if (error.status === 401 || error.status === 403) {
    say(t("密钥不对，或缺少密钥。请填写。"), true);
    askKey();
  } else if (error.code === "model_not_found") loadModels().then(() => say(t("服务器上的模型换了，请再试一次。"), true));
  else if (error.status === 429 || error.status === 503) say(t("服务器正忙，{0} 秒后再试。写出的都留着。", error.retryAfter ?? 5), true);
  else if (!error.status) say(t("连不上服务器，或中途断开。写出的都留着，恢复后按“接着写”。"), true);
  else if (error.status === 413) say(t("太长了：") + error.message, true);
  else if (error.status < 500) say(t("服务器没有接受：") + error.message, true);
  else say(t("服务器出错（{0}）：", error.status) + error.message, true);
}

// --- keeping ------------------------------------------------------------------------------------

function changed() {
  work.changed = Date.now();
  isSaved = false;
  clearTimeout(timer);
  timer = setTimeout(save, 400);
  scheduleReading();
}

function save() {
  clearTimeout(timer);
  const copy = structuredClone(work);
  saving = saving.then(async () => {
    while (!(await store.save(copy, known.get(copy.id)))) {
      const id = tree.newId();
      if (work.id === copy.id) work.id = id;
      copy.id = id;
      say(t("这个作品在另一个标签页里也改过。这里的另存为一个作品，两个都在“作品”里。"), true);
    }
    known.set(copy.id, copy.changed);
  }).then(
    () => { isSaved = isSaved || copy.changed === work.changed; store.keep("work", copy.id); },
    (error) => say(t("没有能保存：") + error.message, true));
  return saving;
}

function open(opened) {
  work = opened;
  known.set(work.id, work.changed);
  store.keep("work", work.id);
  $("title").value = work.title;
  $("note").value = work.note;
  for (const name of FIELDS) {
    $(name).value = work.settings[name] ?? DEFAULTS[name];
    bound(name);
  }
  answer = null;
  $("candidates").hidden = $("alternatives").hidden = true;
  showAnswer();
  show(tree.textOf(work).length);
  scheduleReading();
}

// --- writing ------------------------------------------------------------------------------------

// Text that streams into the tree, in one node that grows.
function grow(node, piece, tokens) {
  node.text += piece;
  node.tokens.push(...tokens);
  const caret = node.at + node.text.length;
  const shown = ink.querySelector("[data-growing]");
  if (shown) {
    shown.append(piece);
    text.value = text.value.slice(0, caret - piece.length) + piece + text.value.slice(caret - piece.length);
    $("count").textContent = `${[...text.value].length} ${t("字")}`;
  }
  changed();
}

function markGrowing(node) {
  show();
  let at = 0;
  for (const span of ink.children) {
    if (at === node.at && span.className === "by-model" && !node.text) break;
    at += span.textContent.length;
  }
  const span = make("span", { className: "by-model" });
  span.dataset.growing = "";
  // The ink is split where the new text stands.
  let left = node.at;
  for (const part of [...ink.children]) {
    const size = part.textContent.length;
    if (left > 0 && left < size) {
      const rest = part.cloneNode();
      rest.textContent = part.textContent.slice(left);
      part.textContent = part.textContent.slice(0, left);
      part.after(span, rest);
      return;
    }
    if (left <= 0) return void part.before(span);
    left -= size;
  }
  ink.append(span);
}

async function run(act) {
  if (controller) return;
  if (!model()) await loadModels();
  if (!model()) return;
  controller = new AbortController();
  $("alternatives").hidden = true;
  say(t("正在写……"));
  try {
    const reasons = await act(controller.signal);
    say(reasons?.includes("stop") ? t("模型到此收尾。") : t("写完了。"));
  } catch (error) {
    if (controller.signal.aborted) say(t("已停止，写出的都留着。"));
    else complain(error);
  } finally {
    controller = null;
    changed();
    show(tree.caretAfter(work));
    save();
  }
}

const asked = (before, more) => ({ model: model(), notes: work.note, text: before, settings: settings(), onAnswer: gather, ...more });

function goOn(at = text.selectionStart, length) {
  const before = text.value.slice(0, at);
  if (!before.trim()) return say(t("先写一个开头。"), true);
  return run(async (signal) => {
    const node = tree.add(work, { at, cut: 0, text: "" }, "m", { tokens: [] });
    markGrowing(node);
    const chosen = length ? { ...settings(), length } : settings();
    const reasons = await write(asked(before, { signal, settings: chosen, onPiece: (_, piece, tokens) => grow(node, piece, tokens) }));
    return reasons;
  });
}

// Several continuations side by side. Where the last thing was one of the model's, these stand in its place.
function another() {
  const last = work.nodes[work.here];
  const isRetry = last.by === "m" && last.text && tree.textOf(work).slice(last.at).startsWith(last.text);
  const base = isRetry ? last.parent : work.here;
  const at = isRetry ? last.at : text.selectionStart;
  const cut = isRetry ? last.cut : 0;
  const before = tree.textOf(work, base).slice(0, at);
  if (!before.trim()) return say(t("先写一个开头。"), true);
  const ways = Array.from({ length: WAYS }, () => ({ text: "", tokens: [] }));
  const cards = ways.map((_, index) => card(`${t("续写")} ${index + 1}`));
  if (isRetry) {
    const kept = card(t("原来的"));
    kept.body.textContent = last.text;
    kept.button.addEventListener("click", () => { $("candidates").hidden = true; text.focus(); });
    cards.push(kept);
  }
  $("candidates").replaceChildren(...cards.map((each) => each.element));
  $("candidates").hidden = false;
  $("candidates").scrollIntoView({ block: "center" }); // below a long text
  cards.slice(0, WAYS).forEach((each, index) => each.button.addEventListener("click", () => {
    if (controller || !ways[index].text) return;
    work.here = base;
    tree.add(work, { at, cut, text: ways[index].text }, "m", { tokens: ways[index].tokens });
    changed();
    show(tree.caretAfter(work));
    $("candidates").hidden = true;
    text.focus();
  }));
  return run(async (signal) => {
    show();
    // Each way must differ: with a seed, each has a seed of its own on the server.
    return write(asked(before, { signal, count: WAYS, onPiece: (index, piece, tokens) => {
      ways[index].text += piece;
      ways[index].tokens.push(...tokens);
      cards[index].body.textContent = ways[index].text;
    } }));
  });
}

function card(name) {
  const body = make("p"), button = make("button", { type: "button", textContent: t("采用") });
  button.setAttribute("aria-label", `${t("采用")} ${name}`);
  return { element: make("article", { className: "candidate" }, make("strong", { textContent: name }), body, button), body, button };
}

// --- alternatives -------------------------------------------------------------------------------

function alternatives(isAsked) {
  const box = $("alternatives"), caret = text.selectionStart;
  box.hidden = true;
  if (controller || (!isAsked && text.selectionStart !== text.selectionEnd)) return;
  let at = 0, found = null, part = null;
  for (part of tree.parts(work)) {
    if (caret < at + part.text.length) break;
    at += part.text.length;
    part = null;
  }
  if (part?.by === "m") found = tree.tokenAt(work.nodes[part.node], part.from + caret - at);
  if (!found?.top.length) return isAsked && say(t("这里没有备选词：不是模型写的，或没有记下概率。"));
  const node = work.nodes[part.node];
  const begin = at + found.at - part.from, end = at + part.text.length;
  if (begin < at) return; // its beginning was edited away
  box.replaceChildren(make("span", { textContent: t("选一个，从那里接着写：") }), ...found.top.map(([word, chance]) => {
    const shown = word.replace(/\n/g, "↵").replace(/ /g, "␣");
    const button = make("button", { type: "button" }, `${shown} `, make("small", { textContent: `${(100 * chance).toFixed(1)}%` }));
    button.addEventListener("click", () => {
      tree.add(work, { at: begin, cut: end - begin, text: word }, "m", { tokens: [{ at: 0, top: found.top }] });
      changed();
      show(begin + word.length);
      goOn(begin + word.length, Math.max(1, settings().length - node.tokens.findIndex((token) => token.at === found.at)));
    });
    return button;
  }));
  box.hidden = false;
  if (isAsked) box.querySelector("button").focus();
}

// --- the answer as JSON -------------------------------------------------------------------------

function gather({ request, event }) {
  if (request) answer = { request, response: null };
  if (event) {
    answer.response ??= { id: event.id, object: event.object, model: event.model, choices: [] };
    for (const choice of event.choices) {
      const whole = (answer.response.choices[choice.index] ??= { index: choice.index, text: "", finish_reason: null });
      whole.text += choice.text;
      whole.finish_reason = choice.finish_reason ?? whole.finish_reason;
    }
    if (event.usage) answer.response.usage = event.usage;
  }
  if (!$("view-json").hidden) showAnswer();
}

const showAnswer = () => { $("view-json").textContent = answer ? JSON.stringify(answer, null, 2) : "{}"; };

// --- what the encoder reads ---------------------------------------------------------------------

let readingTimer = 0;
function scheduleReading() {
  clearTimeout(readingTimer);
  if ($("reading").open && model()) readingTimer = setTimeout(showReading, controller ? 1500 : 500);
}

async function showReading() {
  const before = text.value.slice(0, text.selectionStart || text.value.length);
  try {
    const found = await reading(model(), work.note, before);
    $("reading-count").textContent = t("读到 {0} / {1} 个词元（设定 {2}）；前面 {3} 个字读不到。", found.tokens, found.limit, found.noteTokens, [...found.dropped].length);
    const dropped = found.dropped.length > 400 ? `…${found.dropped.slice(-400)}` : found.dropped;
    $("reading-text").replaceChildren(make("span", { className: "note", textContent: found.head }), make("del", { textContent: dropped }), found.read);
  } catch (error) {
    $("reading-count").textContent = error.message;
    $("reading-text").replaceChildren();
  }
}

// --- works --------------------------------------------------------------------------------------

const nameOf = (each) => each.title || tree.textOf(each).trim().slice(0, 16) || t("无题");

async function listWorks() {
  const all = (await store.all()).sort((a, b) => b.changed - a.changed);
  $("work-list").replaceChildren(...all.map((each) => {
    const name = nameOf(each);
    const opener = make("button", { type: "button", textContent: `${name} · ${new Date(each.changed).toLocaleString()}` });
    opener.addEventListener("click", () => { open(each); $("works").close(); });
    const remover = make("button", { type: "button", textContent: t("删除") });
    remover.setAttribute("aria-label", `${t("删除")} ${name}`);
    remover.addEventListener("click", async () => {
      if (!confirm(t("删除“{0}”？不能恢复。", name))) return;
      await store.remove(each.id);
      if (each.id === work.id) open(tree.newWork());
      listWorks();
    });
    return make("li", {}, opener, remover);
  }));
}

function exported(kind) {
  const title = work.title || t("无题");
  const content = { txt: () => tree.textOf(work), md: () => `# ${title}\n\n${tree.textOf(work)}\n`, json: () => JSON.stringify(work, null, 1) }[kind]();
  const link = make("a", { href: URL.createObjectURL(new Blob([content], { type: "text/plain;charset=utf-8" })), download: `${title}.${kind}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A file's text, also in the encodings of Windows; an error where it is none.
async function textOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const mark = { 0xfffe: "utf-16le", 0xfeff: "utf-16be" }[(bytes[0] << 8) | bytes[1]];
  for (const encoding of mark ? [mark] : ["utf-8", "gb18030"]) {
    try {
      const found = new TextDecoder(encoding, { fatal: true }).decode(bytes);
      if (!found.includes("\0")) return found;
    } catch { /* another one */ }
  }
  throw new Error("encoding");
}

async function imported(file) {
  $("works").close();
  let content, found = tree.newWork();
  try { content = await textOf(file); } catch { return say(t("这个文件不是文本：") + file.name, true); }
  const kind = file.name.split(".").pop().toLowerCase();
  if (kind === "json") {
    try { found = tree.fromJSON(content); } catch { return say(t("这个文件不是作品：") + file.name, true); }
  } else {
    const heading = kind === "md" && content.match(/^# (.*)\r?\n+/);
    found.title = heading ? heading[1].slice(0, 80) : file.name.replace(/\.[^.]*$/, "").slice(0, 80);
    tree.add(found, { at: 0, cut: 0, text: (heading ? content.slice(heading[0].length) : content).replace(/\r\n?/g, "\n") }, "u");
  }
  await save();
  open(found);
  say("");
  await save();
}

function askKey() {
  if ($("key-dialog").open) return;
  $("key").value = store.kept("key", "sessionStorage") ?? "";
  $("key-dialog").showModal();
}

async function loadModels() {
  try {
    const { data } = await call("v1/models");
    models = data.map((each) => ({
      id: each.id, can: each.capabilities ?? ["generate"], sourceTokens: each.max_source_tokens ?? 510, windowTokens: each.window_tokens ?? 384,
    }));
  } catch (error) { return complain(error); }
  const writers = models.filter((each) => each.can.includes("generate"));
  $("model").replaceChildren(...writers.map((each) => make("option", { value: each.id, textContent: each.id })));
  $("model-row").hidden = writers.length < 2;
  const readers = openReadingRoom($("room-read"), models, complain);
  $("tab-read").hidden = !readers;
  $("notice").hidden = true;
  scheduleReading();
}

// --- wiring -------------------------------------------------------------------------------------

function tabs(list, onSelect) {
  const all = [...list.querySelectorAll("[role=tab]")];
  const select = (tab) => {
    for (const each of all) {
      each.setAttribute("aria-selected", each === tab);
      each.tabIndex = each === tab ? 0 : -1;
      $(each.getAttribute("aria-controls")).hidden = each !== tab;
    }
    onSelect?.(tab);
  };
  for (const tab of all) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const shown = all.filter((each) => !each.hidden);
      const next = shown[(shown.indexOf(tab) + step + shown.length) % shown.length];
      next.focus();
      select(next);
    });
  }
}

tabs($("rooms"), () => say("")); // what was said belongs to the tab that is left
tabs($("views"), showAnswer);

text.addEventListener("input", () => {
  const edit = tree.difference(tree.textOf(work), text.value, text.selectionEnd);
  if (!edit.cut && !edit.text) return;
  tree.type(work, edit);
  changed();
  const caret = text.selectionEnd;
  show();
  text.setSelectionRange(caret, caret);
});
text.addEventListener("beforeinput", (event) => {
  if (event.inputType !== "historyUndo" && event.inputType !== "historyRedo") return;
  event.preventDefault();
  step(event.inputType === "historyUndo" ? tree.undo : tree.redo);
});
text.addEventListener("click", () => alternatives(false));
text.addEventListener("keyup", scheduleReading);

function step(act) {
  if (controller) return;
  act(work);
  $("alternatives").hidden = true;
  changed();
  show(tree.caretAfter(work));
}

document.addEventListener("keydown", (event) => {
  const isCommand = event.ctrlKey || event.metaKey;
  if (event.key === "Escape" && controller) controller.abort();
  else if ($("room-write").hidden || document.querySelector("dialog[open]")) {
    if (!isCommand || event.key !== "Enter") return;
    event.target.form?.requestSubmit();
  } else if (isCommand && event.key === "Enter") goOn();
  else if (event.altKey && event.code === "KeyA") alternatives(true);
  else if (isCommand && event.target === text && event.key.toLowerCase() === "z") step(event.shiftKey ? tree.redo : tree.undo);
  else if (isCommand && event.target === text && event.key.toLowerCase() === "y") step(tree.redo);
  else return;
  event.preventDefault();
});

$("write").addEventListener("click", () => goOn(text.selectionStart || text.value.length));
$("stop").addEventListener("click", () => controller?.abort());
$("another").addEventListener("click", another);
$("undo").addEventListener("click", () => step(tree.undo));
$("redo").addEventListener("click", () => step(tree.redo));
$("copy").addEventListener("click", () => navigator.clipboard?.writeText(text.value).then(() => say(t("已复制。")),
  () => say(t("复制没有成功，请选中后用 Ctrl+C。"), true)) ?? (text.select(), say(t("复制没有成功，请选中后用 Ctrl+C。"), true)));
$("title").addEventListener("input", () => { work.title = $("title").value; changed(); });
$("note").addEventListener("input", () => { work.note = $("note").value; changed(); });
for (const name of FIELDS) $(name).addEventListener("change", () => {
  bound(name);
  work.settings = settings();
  changed();
});
for (const [name, preset] of Object.entries(PRESETS)) {
  const button = make("button", { type: "button", textContent: t(name) });
  button.dataset.t = name;
  button.addEventListener("click", () => {
    if (controller) return;
    for (const field of FIELDS) if (field in preset) $(field).value = preset[field];
    work.settings = settings();
    tree.add(work, { at: 0, cut: text.value.length, text: preset.text }, "u");
    changed();
    show(preset.text.length);
    text.focus();
  });
  $("presets").append(button);
}
$("history").addEventListener("toggle", showTree);
$("reading").addEventListener("toggle", scheduleReading);

$("open-works").addEventListener("click", async () => { await save(); await listWorks(); $("works").showModal(); });
$("new-work").addEventListener("click", async () => { await save(); open(tree.newWork()); $("works").close(); text.focus(); });
$("import").addEventListener("click", () => $("import-file").click());
$("import-file").addEventListener("change", (event) => { const [file] = event.target.files; event.target.value = ""; if (file) imported(file); });
for (const button of document.querySelectorAll("[data-export]")) button.addEventListener("click", () => exported(button.dataset.export));
for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
$("open-key").addEventListener("click", askKey);
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue !== "ok") return;
  store.keep("key", $("key").value.trim(), "sessionStorage");
  loadModels();
});
$("theme").addEventListener("click", () => {
  const isDark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
  store.keep("theme", document.documentElement.dataset.theme);
});
$("language").addEventListener("click", () => {
  $("language").textContent = switchLanguage() ? "中文" : "English";
  $("language").lang = $("language").textContent === "中文" ? "zh-CN" : "en";
  show();
});
addEventListener("beforeunload", (event) => { if (!isSaved || controller) { save(); event.preventDefault(); } });

const theme = store.kept("theme");
if (theme) document.documentElement.dataset.theme = theme;
translate();
if (document.documentElement.lang === "en") Object.assign($("language"), { textContent: "中文", lang: "zh-CN" });
for (const name of FIELDS) $(name).value = DEFAULTS[name];
try {
  const all = await store.all();
  open(all.find((each) => each.id === store.kept("work")) ?? work);
} catch (error) {
  open(work);
  say(t("没有能保存：") + error.message, true);
}
isSaved = true;
await loadModels();
