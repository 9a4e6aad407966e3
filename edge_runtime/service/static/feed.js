// Server-sent events over fetch: unlike EventSource, it can show an API key.

/** What the service says no with. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Sends a request with the key of this tab. Throws Refused. */
export async function ask(path, options = {}) {
  const key = sessionStorage.getItem("flexspec-key");
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  let message = `the board answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no error of ours: the status must do */ }
  throw new Refused(response.status, message);
}

/** The events in a response: {id, event, data}, data still being text. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const found = { id: "", event: "message", data: "" };
      for (const line of block.split("\n")) {
        const colon = line.indexOf(": ");
        if (colon > 0) found[line.slice(0, colon)] = line.slice(colon + 2);
      }
      if (found.data) yield found;
    }
  }
}

/**
 * Hands every event of the board to `hear`, for ever: after a break it goes on behind the last one it heard.
 * `tell` hears of the connection: "live", "lost" with seconds until the next attempt, or "key".
 * Returns when a key is needed.
 */
export async function listen(hear, tell) {
  let last = "";
  let pause = 1;
  for (;;) {
    let why = "the board has closed the stream";
    try {
      const response = await ask("events", last ? { headers: { "last-event-id": last } } : {});
      tell("live");
      for await (const { id, data } of eventsOf(response)) {
        hear(JSON.parse(data));
        if (id) last = id;
        pause = 1;
      }
    } catch (error) {
      if (error.status === 401) return tell("key", 0, error.message);
      why = error.message;
    }
    tell("lost", pause, why);
    await new Promise((resolve) => setTimeout(resolve, 1000 * pause));
    pause = Math.min(2 * pause, 15);
  }
}
