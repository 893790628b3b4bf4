// The server's routes, relative to the page, so that a path in front of them (--root-path) works too.

import { kept } from "./store.js";

// Of the errors that come while a text streams, when the status was sent long before.
const STATUS = { shutting_down: 503, request_timeout: 504 };

export class ApiError extends Error {
  constructor(status, message, { retryAfter, code } = {}) {
    super(message);
    this.status = status; // 0: no answer at all
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

async function request(route, body, signal) {
  const headers = {};
  const key = kept("key", "sessionStorage");
  if (/[^\x20-\x7e]/.test(key)) throw new ApiError(401, ""); // no header can hold it
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(new URL(route, document.baseURI), {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, String(error.message));
  }
  if (answer.ok) return answer;
  let error = { message: answer.statusText };
  try { ({ error } = await answer.json()); } catch { /* not ours, a proxy's */ }
  throw new ApiError(answer.status, error.message, { retryAfter: Number(answer.headers.get("Retry-After")) || null, code: error.code });
}

export async function call(route, body, signal) {
  return (await request(route, body, signal)).json();
}

// The events of a stream. It ends with [DONE]; a stream that ends otherwise was cut.
export async function* stream(route, body, signal) {
  const answer = await request(route, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", isDone = false;
  try {
    for (;;) {
      let piece;
      try { piece = await reader.read(); } catch (error) {
        if (signal?.aborted) throw error;
        throw new ApiError(0, String(error.message));
      }
      if (piece.done) break;
      const lines = (rest + piece.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") { isDone = true; continue; }
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(STATUS[event.error.code] ?? 500, event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!isDone) throw new ApiError(0, "cut");
}
