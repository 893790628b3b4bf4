// From the text before the caret to what the model adds: what the encoder reads, and the streams. No DOM here.

import { call, stream } from "./api.js";
import { t } from "./words.js";

const LEAST_TEXT = 64; // tokens of the text that the notes must leave room for
const cache = new Map();

async function tokenize(model, prompt) {
  if (!prompt) return [];
  const key = `${model.id}\n${prompt}`;
  if (!cache.has(key)) {
    if (cache.size > 50) cache.clear();
    cache.set(key, (await call("tokenize", { model: model.id, prompt, add_special_tokens: false })).tokens);
  }
  return cache.get(key);
}

// What the encoder will read: the notes, then as much of the end of `text` as there is room for.
export async function reading(model, notes, text) {
  const head = notes.trim() ? `${notes.trim()}\n` : "";
  const [own, ids] = await Promise.all([tokenize(model, head), tokenize(model, text)]);
  const room = model.sourceTokens - own.length;
  if (room < LEAST_TEXT) throw new Error(t("设定占了 {0} 个词元，正文只剩 {1} 个。请缩短设定。", own.length, Math.max(room, 0)));
  let read = text;
  if (ids.length > room) {
    const { prompt } = await call("detokenize", { model: model.id, tokens: ids.slice(-room) });
    read = text.endsWith(prompt) ? prompt : text.slice(-prompt.length);
  }
  return {
    head, read, dropped: text.slice(0, text.length - read.length), prompt: head + read,
    noteTokens: own.length, tokens: own.length + Math.min(ids.length, room), limit: model.sourceTokens,
  };
}

// Continue `text` in `count` ways. `onPiece(index, piece, tokens)` gets what comes; the result is each way's finish
// reason. A request covers one window, so that the notes stand in front of each encoding.
export async function write({ model, notes, text, settings, count = 1, signal, onPiece, onAnswer }) {
  const written = Array(count).fill(""), used = Array(count).fill(0), reasons = Array(count).fill(null);
  const one = async (indices) => {
    const [first] = indices;
    const { prompt } = await reading(model, notes, text + written[first]);
    const body = {
      model: model.id, prompt, stream: true, logprobs: 5, n: indices.length, temperature: settings.temperature,
      top_k: settings.top_k, top_p: settings.top_p || 1, repetition_penalty: settings.temperature ? 1.1 : 1, stream_options: { include_usage: true },
      max_tokens: Math.min(settings.length - used[first], model.windowTokens),
    };
    if (settings.seed !== "" && settings.seed !== null && settings.seed !== undefined) body.seed = Number(settings.seed);
    onAnswer?.({ request: body, events: [] });
    for await (const event of stream("v1/completions", body, signal)) {
      onAnswer?.({ event });
      for (const choice of event.choices) {
        const index = indices[choice.index];
        const tokens = tokensOf(choice.logprobs, written[index].length);
        used[index] += choice.logprobs?.tokens?.length ?? 0;
        written[index] += choice.text;
        if (choice.text || tokens.length) onPiece(index, choice.text, tokens);
        if (choice.finish_reason) reasons[index] = choice.finish_reason;
      }
    }
  };
  await one([...Array(count).keys()]);
  // A window that is full and not the end goes on from a new encoding.
  await Promise.all(reasons.map(async (_, index) => {
    while (reasons[index] === "length" && used[index] && used[index] < settings.length) {
      const before = used[index];
      await one([index]);
      if (used[index] === before) break;
    }
  }));
  return reasons;
}

// [{at, top: [[text, probability]]}] of a piece that begins at `at` in the way's text.
function tokensOf(logprobs, at) {
  if (!logprobs?.tokens) return [];
  const found = [];
  let offset = at;
  logprobs.tokens.forEach((token, index) => {
    const top = Object.entries(logprobs.top_logprobs?.[index] ?? {})
      .filter(([text]) => text && !text.startsWith("bytes:"))
      .map(([text, value]) => [text, Math.exp(value)]).sort((a, b) => b[1] - a[1]);
    found.push({ at: offset, top });
    offset += token.startsWith("bytes:") ? 0 : token.length;
  });
  return found;
}
