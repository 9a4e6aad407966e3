// Requests to the board, and server-sent events over fetch, which unlike EventSource can send an API key.

import { tabStorage } from "./store.js";

const KEY = "flexspec-key";

/** The API key, kept in this tab only. */
export const getKey = () => tabStorage.getItem(KEY) ?? "";

export function setKey(key) {
  if (key) tabStorage.setItem(KEY, key);
  else tabStorage.removeItem(KEY);
}

/** An error of the service, or of the connection to it (status 0, code `lost`). */
export class ResponseError extends Error {
  constructor(status, { message, code }) {
    super(message);
    this.status = status;
    this.code = code ?? "other";
  }
}

const lost = () => new ResponseError(0, { message: "The connection to the board was lost.", code: "lost" });

/** Send a request with the API key of this tab. Throws ResponseError, and AbortError. */
export async function request(path, options = {}) {
  const key = getKey();
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : lost();
  }
  if (response.ok) return response;
  const unknown = { message: `the board responded with status ${response.status}` };
  const body = await response.json().catch(() => ({}));
  throw new ResponseError(response.status, body.error ?? unknown);
}

/** Yield the events of a response as {id, event, data}; data is text. Throws ResponseError, and AbortError. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : lost();
    });
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { id: "", event: "message", data: "" };
      for (const line of block.split("\n")) {
        const colon = line.indexOf(": ");
        if (colon > 0) event[line.slice(0, colon)] = line.slice(colon + 2);
      }
      if (event.data) yield event;
    }
  }
}

/**
 * Call `onEvent` with every event of the board. After a lost connection, resume after the last event received.
 * `onState` is called with the state of the connection: "live", "lost" with the seconds until the next attempt, or "key".
 * Returns only if an API key is required.
 */
export async function subscribe(onEvent, onState) {
  let lastId = "";
  let retrySeconds = 1;
  for (;;) {
    let reason = "the board closed the stream";
    try {
      const response = await request("events", lastId ? { headers: { "last-event-id": lastId } } : {});
      onState("live");
      for await (const { id, data } of readEvents(response)) {
        onEvent(JSON.parse(data));
        if (id) lastId = id;
        retrySeconds = 1;
      }
    } catch (error) {
      if (error.status === 401) return onState("key", 0, error.message);
      reason = error.message;
    }
    onState("lost", retrySeconds, reason);
    await new Promise((resolve) => setTimeout(resolve, 1000 * retrySeconds));
    retrySeconds = Math.min(2 * retrySeconds, 15);
  }
}
