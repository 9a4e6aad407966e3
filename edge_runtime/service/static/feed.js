// Server-sent events over fetch, which unlike EventSource can send an API key.

/** An error response of the service. */
export class ResponseError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send a request with the API key of this tab. Throws ResponseError. */
export async function request(path, options = {}) {
  const key = sessionStorage.getItem("flexspec-key");
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  let message = `the board responded with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not an error body of the service: report the status only */ }
  throw new ResponseError(response.status, message);
}

/** Yield the events of a response as {id, event, data}; data is text. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
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
