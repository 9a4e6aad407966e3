// The chat: sends the conversation to the board and shows the answer as it arrives, colored by origin.

import { $, WORDS, count, fill, make, show } from "./dom.js";
import { ResponseError, getKey, readEvents, request, setKey } from "./feed.js";
import { makeView } from "./message.js";
import { Origins } from "./origins.js";
import { listChats, makeChat, randomNumber, readSettings, removeChat, saveChat, saveSettings } from "./store.js";

const TITLE_CHARACTERS = 60;
const SAVE_MS = 2000;
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens"];

let chat = null;
// Views of the messages shown.
const views = new Map();
// The answer that is being written: {owner, message, abort}.
let running = null;
// The message that the next one replaces.
let edited = null;
let models = [];
let gauges = {};
let onKeyNeeded = () => {};

// Messages

const log = $("log");
const scroller = $("scroll");
const changed = new Set();

/** Draw a message in the next frame. */
function refresh(message) {
  if (!changed.size) requestAnimationFrame(draw);
  changed.add(message);
}

function draw() {
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  for (const message of changed) views.get(message)?.update(message === running?.message ? describeWaiting(message) : "");
  changed.clear();
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

function describeWaiting({ content, kinds, begun }) {
  const { waiting } = WORDS;
  if (gauges.fault) return kinds?.endsWith("u") ? waiting.alone : waiting.verifier;
  if (content) return waiting.more;
  return gauges.waiting && !begun ? fill(waiting.slot, { answers: count(gauges.running, "answer") }) : waiting.text;
}

function showChat(opened) {
  chat = opened;
  chat.settings = { ...DEFAULTS, ...chat.settings };
  views.clear();
  for (const message of chat.messages) views.set(message, makeView(message));
  log.replaceChildren(...[...views.values()].map((view) => view.element));
  for (const message of chat.messages) changed.add(message);
  draw();
  scroller.scrollTop = scroller.scrollHeight;
  edit(null);
  showControls();
}

function addMessage(message) {
  if (views.has(message) || !chat.messages.includes(message)) return;
  views.set(message, makeView(message));
  log.append(views.get(message).element);
  refresh(message);
  scroller.scrollTop = scroller.scrollHeight;
}

function truncate(owner, length) {
  for (const message of owner.messages.splice(length)) {
    views.get(message)?.element.remove();
    views.delete(message);
  }
}

function showControls() {
  $("empty").hidden = chat.messages.length > 0;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  const { model, system, schema, temperature, speculation, on_link_loss: lost } = chat.settings;
  const known = models.find(({ id, version }) => [id, version].includes(model)) ?? (model ? null : models[0]);
  const version = (!model && gauges.version) || known?.version || model;
  show("model", version || "the verifier’s default");
  $("model").title = version;
  const chips = [
    [system, "system prompt"], [schema, "JSON schema"], [temperature !== null, `temperature ${temperature}`],
    [!speculation, "this board does not draft"], [lost === "draft", "goes on without a verifier"],
  ].filter(([is]) => is).map(([, text]) => make("li", {}, text));
  $("active").replaceChildren(...chips);
}

// Requests

/** The messages to send: all that were answered, and the last. */
function conversation({ messages, settings }) {
  const sent = settings.system ? [{ role: "system", content: settings.system }] : [];
  messages.forEach(({ role, content }, index) => {
    const answer = messages[index + 1];
    if (role === "user" && (!answer || answer.content)) sent.push({ role, content });
    if (role === "assistant" && content) sent.push({ role, content });
  });
  return sent;
}

function makeBody(owner, seed) {
  const { settings } = owner;
  const body = { messages: conversation(owner), seed, stream: true, stream_options: { include_usage: true } };
  if (settings.model) body.model = settings.model;
  if (settings.on_link_loss) body.on_link_loss = settings.on_link_loss;
  if (!settings.speculation) body.speculation = false;
  for (const name of NUMBERS) if (settings[name] !== null) body[name] = settings[name];
  if (settings.schema) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema: JSON.parse(settings.schema) } };
  }
  return body;
}

/** The text without its last `size` characters, counted as the service does: a surrogate pair is one. */
function withoutEnd(text, size) {
  let end = text.length;
  for (let left = size; left && end; left -= 1) end -= /[\udc00-\udfff]/.test(text[end - 1]) ? 2 : 1;
  return text.slice(0, end);
}

function applyChunk(message, chunk) {
  const { choices: [choice], timings, usage, withdrawn = 0 } = chunk;
  message.version = chunk.system_fingerprint || message.version;
  if (timings) Object.assign(message, { timings, unverified: timings.unverified_n });
  if (usage) message.usage = usage;
  if (!choice) return;
  message.content = withoutEnd(message.content, withdrawn) + (choice.delta.content ?? "");
  message.reasoning = (message.reasoning ?? "") + (choice.delta.reasoning_content ?? "");
  if (choice.finish_reason) message.finish = choice.finish_reason;
  color(message);
}

/** Let the board answer the last message. `replaced`: the answer that this one replaces; kept if there is no other. */
async function answer(owner, replaced = null) {
  const seed = owner.settings.seed ?? randomNumber();
  const body = makeBody(owner, seed);
  const message = { role: "assistant", content: "", seed, json: Boolean(body.response_format) };
  const abort = new AbortController();
  owner.messages.push(message);
  running = { owner, message, abort };
  track(message, owner);
  addMessage(message);
  showControls();
  let saved = Date.now();
  try {
    const headers = { "content-type": "application/json" };
    const response = await request("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal: abort.signal });
    for await (const { event, data } of readEvents(response)) {
      if (event === "error") throw new ResponseError(200, JSON.parse(data).error);
      if (data !== "[DONE]") applyChunk(message, JSON.parse(data));
      refresh(message);
      if (Date.now() - saved > SAVE_MS) {
        saveChat(owner);
        saved = Date.now();
      }
    }
    if (!message.finish) throw new ResponseError(0, { message: "The board ended the answer early.", code: "lost" });
  } catch (error) {
    message.finish ??= "cancelled";
    if (error.name !== "AbortError") message.error = { message: error.message, code: error.code ?? "other", status: error.status };
    if (error.status === 401) onKeyNeeded();
  }
  running = null;
  if (replaced && message.error && !message.content) {
    truncate(owner, owner.messages.length - 1);
    owner.messages.push(Object.assign(replaced, { error: message.error }));
    addMessage(replaced);
  }
  announce(message);
  refresh(message);
  saveChat(owner);
  showControls();
}

/** Say the end of an answer to screen readers; the text itself would be read again with every token. */
function announce({ error, timings, finish }) {
  if (!error) show("announcement", `Answer ${WORDS.outcomes[finish] ?? finish}${timings ? `, ${count(timings.predicted_n, "token")}` : ""}`);
}

function regenerate() {
  const last = chat.messages.at(-1);
  if (running || !last) return;
  if (last.role === "assistant") truncate(chat, chat.messages.length - 1);
  delete last.error;
  answer(chat, last.role === "assistant" && last.content ? last : null);
}

// Origins: events of the board, matched by the seed of the request

// Text and events of an answer come on two ways, and either may end first.
const trackers = new WeakMap();
// Trackers of answers that have not begun, by seed, and of the others, by the board's number.
const expected = new Map();
let begun = new Map();

function track(message, owner) {
  const tracker = { message, owner, origins: new Origins() };
  trackers.set(message, tracker);
  expected.set(message.seed, tracker);
}

function color(message) {
  const { origins } = trackers.get(message);
  message.kinds = origins.kindsOf(message.content);
  message.counts = origins.counts;
  message.withdrawn = origins.withdrawn;
}

/** Apply an event of the board, of whichever client's answer. */
export function applyEvent(event) {
  if (event.type === "gauges") {
    gauges = event;
    if (running) refresh(running.message);
    if (chat) showControls();
  }
  if (event.type === "begun" && expected.has(event.seed)) {
    begun.set(event.answer, expected.get(event.seed));
    expected.delete(event.seed);
  }
  const tracker = begun.get(event.answer);
  if (!tracker) return;
  const { message, owner, origins } = tracker;
  message.begun = true;
  if (event.type === "tokens") origins.add(event);
  if (event.type === "round") origins.finishRound(event);
  color(message);
  refresh(message);
  if (event.type !== "ended") return;
  message.version ||= event.version;
  begun.delete(event.answer);
  if (owner.messages.includes(message)) saveChat(owner);
}

/** The board numbers its answers from 1 again. */
export function resetEvents() {
  begun = new Map();
}

// Composer

const input = $("message");

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function edit(message) {
  edited = message;
  $("editing").hidden = !message;
  if (!message) return;
  input.value = message.content;
  input.focus();
  fitInput();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = input.value.trim();
  if (running || !content) return input.focus();
  if (edited) truncate(chat, chat.messages.indexOf(edited));
  chat.title ??= content.slice(0, TITLE_CHARACTERS);
  input.value = "";
  edit(null);
  fitInput();
  const message = { role: "user", content };
  chat.messages.push(message);
  addMessage(message);
  return answer(chat);
});
input.addEventListener("input", fitInput);
input.addEventListener("keydown", (event) => {
  // On a touch screen, the key is for new lines, and the button sends.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || (matchMedia("(pointer: coarse)").matches && !event.ctrlKey)) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (edited) edit(null);
  else running?.abort.abort();
});
$("stop").addEventListener("click", () => {
  running?.abort.abort();
  input.focus();
});
$("cancel-edit").addEventListener("click", () => edit(null));
for (const suggestion of document.querySelectorAll("#empty button")) {
  suggestion.addEventListener("click", () => {
    input.value = suggestion.textContent;
    $("composer").requestSubmit();
  });
}

/** Copy a text, also over plain HTTP, where browsers have no clipboard for pages. */
async function copy(text, source) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text, className: "offscreen" });
    source.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    source.focus();
  }
  show("announcement", "Copied");
  source.textContent = "Copied";
  setTimeout(() => { source.textContent = "Copy"; }, 1500);
}

log.addEventListener("click", (event) => {
  const pressed = event.target.closest("button");
  if (!pressed) return;
  if (pressed.dataset.copy) return copy(pressed.closest(".code").querySelector("pre").textContent, pressed);
  const message = [...views].find(([, { element }]) => element.contains(pressed))?.[0];
  const actions = { copy: () => copy(message.content, pressed), edit: () => edit(message), again: regenerate, new: startChat };
  return actions[pressed.dataset.action]?.();
});

// Chats

function startChat() {
  showChat(makeChat(readSettings()));
  input.focus();
}

function showChats() {
  const chats = listChats();
  $("chat-list").replaceChildren(...chats.map((item) => {
    const date = new Date(item.updated);
    const open = make("button", { type: "button", className: "plain" }, make("b", {}, item.title), make("time", { datetime: date.toISOString() }, date.toLocaleString()));
    if (item.id === chat.id) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => {
      $("chats").close();
      // The chat that is being written is newer here than in the storage.
      showChat(item.id === running?.owner.id ? running.owner : item);
    });
    const remove = make("button", { type: "button", className: "quiet", "aria-label": `Delete the chat ${item.title}` }, "Delete");
    remove.addEventListener("click", () => {
      if (item.id === running?.owner.id) running.abort.abort();
      removeChat(item);
      if (item.id === chat.id) startChat();
      showChats();
    });
    return make("li", {}, open, remove);
  }));
  $("no-chats").hidden = chats.length > 0;
}

$("open-chats").addEventListener("click", () => {
  showChats();
  $("chats").showModal();
});
$("new").addEventListener("click", startChat);
addEventListener("pagehide", () => running && saveChat(running.owner));

// Settings

const form = $("settings-form");
const DEFAULTS = { model: "", system: "", temperature: null, top_p: null, top_k: null, max_tokens: null, seed: null, schema: "", speculation: true, on_link_loss: "" };

function checkSchema() {
  let problem = "";
  try {
    if (form.schema.value.trim() && typeof JSON.parse(form.schema.value) !== "object") problem = "A JSON schema is an object";
  } catch (error) {
    problem = `This is no JSON: ${error.message}`;
  }
  form.schema.setCustomValidity(problem);
  show("schema-problem", problem);
  $("schema-problem").hidden = !problem;
}

function showSettings() {
  const options = models.map(({ id, version }) => make("option", { value: id }, version && version !== id ? `${id} (${version})` : id));
  const { model } = chat.settings;
  if (model && !models.some(({ id }) => id === model)) options.push(make("option", { value: model }, model));
  form.model.replaceChildren(make("option", { value: "" }, "the verifier’s default"), ...options);
  for (const [name, value] of Object.entries(chat.settings)) {
    const field = form.elements[name];
    if (!field) continue;
    if (field.type === "checkbox") field.checked = value;
    else field.value = value ?? "";
  }
  $("forget-key").hidden = !getKey();
  checkSchema();
  $("settings").showModal();
}

form.schema.addEventListener("input", checkSchema);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  for (const name of Object.keys(DEFAULTS)) {
    const field = form.elements[name];
    if (field.type === "number") chat.settings[name] = field.value === "" ? null : field.valueAsNumber;
    else chat.settings[name] = field.type === "checkbox" ? field.checked : field.value.trim();
  }
  saveSettings(chat.settings);
  saveChat(chat);
  $("settings").close();
  showControls();
});
$("reset-settings").addEventListener("click", () => {
  chat.settings = { ...DEFAULTS };
  $("settings").close();
  showSettings();
});
$("forget-key").addEventListener("click", () => {
  setKey("");
  $("forget-key").hidden = true;
});
$("open-settings").addEventListener("click", showSettings);

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
}

/** Ask the board for the models of its verifier; called when the connection is there. */
export async function loadModels() {
  try {
    models = (await (await request("v1/models")).json()).data;
    showControls();
  } catch { /* the chat works with the default, and says what is wrong when a message is sent */ }
}

/** Open the newest chat. `keyNeeded` is called if the board requires another API key. */
export function startPage(keyNeeded) {
  onKeyNeeded = keyNeeded;
  const [newest] = listChats();
  if (!newest) return startChat();
  for (const message of newest.messages) if (message.role === "assistant" && !message.error) message.finish ??= "cancelled";
  showChat(newest);
  return undefined;
}
