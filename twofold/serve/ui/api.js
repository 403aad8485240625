/* The server as a page sees it: a few calls, the key, and errors in plain words. */

import { events } from "/ui/sse.js";

const KEY = "twofold.key";

/** What went wrong, in words for a reader; `status` is HTTP's (0: no answer at all), `retry` seconds or null. */
export class ApiError extends Error {
  constructor(message, { status = 0, retry = null, code = null } = {}) {
    super(message);
    this.status = status;
    this.retry = retry;
    this.code = code;
  }
}

/** Keep the key for this tab alone: sessionStorage ends with it. An empty key forgets. */
export function keepKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** Whether a key is kept already: a 401 then means a wrong one. */
export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

/** The models served: [{id, max_model_len?}]. */
export async function models() {
  return (await json("/v1/models")).data;
}

/** The engine's numbers of this moment, as `/stats` gives them. */
export function stats(signal) {
  return json("/stats", { signal });
}

/** What a model's server did lately, rows `from` and on: {model, models, began, every, state, from, rows}. */
export function history(from, model, signal) {
  return json(`/history?from=${from}${model ? `&model=${encodeURIComponent(model)}` : ""}`, { signal });
}

/** The last requests of this key: {data: [{id, state, status, prompt_tokens, output_tokens, timings, ...}]}. */
export function recent(limit, signal) {
  return json(`/requests?limit=${limit}`, { signal });
}

/** The runs of training that the server finds: {directory, runs: [{name, state, version, rows, ...}]}. */
export function runs(signal) {
  return json("/runs", { signal });
}

/** A run's rows from number `from` on: {version, from, rows, more}; all of them where `version` is not its own. */
export function rows(name, from, version, signal) {
  const path = name.split("/").map(encodeURIComponent).join("/");
  return json(`/runs/${path}?from=${from}${version ? `&version=${version}` : ""}`, { signal });
}

/** One row of a run with everything in it, such as a step's rollouts. */
export async function row(name, number, version, signal) {
  const path = name.split("/").map(encodeURIComponent).join("/");
  return (await json(`/runs/${path}?row=${number}&version=${version}`, { signal })).row;
}

/**
 * Chunks of a streamed chat completion, parsed. Ends at `[DONE]`.
 *
 * Throws ApiError on a refusal, on an error inside the stream, and when the stream breaks off before `[DONE]`;
 * throws AbortError when `signal` fires.
 */
export async function* chat(body, signal) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(words(500, chunk.error), { status: 500 });
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection broke while the answer was being written.");
  }
  throw new ApiError("The answer broke off: the server closed the connection early.");
}

async function json(path, options) {
  const response = await ask(path, options);
  return response.json();
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    // the origin is spelled out: relative to http://name:key@host/ a browser refuses to fetch
    response = await fetch(location.origin + path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const detail = await response.json().then((body) => body.error ?? {}, () => ({}));
  const retry = Number.parseFloat(response.headers.get("Retry-After")) || null;
  throw new ApiError(words(response.status, detail, retry), { status: response.status, retry, code: detail.code });
}

/* One sentence for each way to fail; the server's own sentence where it knows more. */
function words(status, detail, retry = null) {
  const wait = retry ? ` Try again in ${Math.ceil(retry)} s.` : " Try again in a moment.";
  if (detail.code === "context_length_exceeded") {
    return `This conversation no longer fits the model. Start a new chat or ask for fewer tokens. (${detail.message})`;
  }
  switch (status) {
    case 401:
      return hasKey() ? "The server does not know this key." : "This server asks for an API key.";
    case 403:
      return "The server does not allow this page.";
    case 404:
      return detail.message ?? "The server does not know this address.";
    case 408:
      return "The request took too long.";
    case 413:
      return "The message is larger than the server accepts. Make it shorter.";
    case 429:
      return `The server is busy.${wait}`;
    case 503:
      return `The server is starting or shutting down.${wait}`;
  }
  if (status >= 400 && status < 500 && detail.message) {
    const named = !detail.param || detail.message.includes(detail.param);
    return named ? detail.message : `${detail.message} (${detail.param})`;
  }
  return detail.message ? `The server met an error: ${detail.message}` : "The server met an error.";
}
