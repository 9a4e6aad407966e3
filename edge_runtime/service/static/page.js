// Connects the page to the board, and shows the state of the connection.

import * as chat from "./chat.js";
import { $, WORDS, show } from "./dom.js";
import { getKey, setKey, subscribe } from "./feed.js";
import * as live from "./live.js";
import { storage } from "./store.js";

let feed = "";

function applyBoard(board) {
  show("version", `FlexSpec ${board.version}`);
  showConnection(board.ready ? "live" : "loading");
  if (feed === board.feed) return;
  feed = board.feed;
  live.resetEvents();
  chat.resetEvents();
}

function applyEvent(event) {
  if (event.type === "board") applyBoard(event);
  if (event.type === "gauges" && $("status").dataset.state === "loading") showConnection("live");
  live.applyEvent(event);
  chat.applyEvent(event);
}

function showConnection(state, seconds = 0, reason = "") {
  const details = state === "lost" ? ` (${reason.replace(/\.$/, "")}); next attempt in ${seconds} s` : "";
  if (state === "live" && $("status").dataset.state !== "live") chat.loadModels();
  $("status").dataset.state = state;
  show("status", WORDS.states[state] + details);
  $("key-form").hidden = state !== "key";
  if (state !== "key") return;
  show("key-problem", getKey() ? `The key was refused. ${WORDS.remedies.invalid_api_key}` : WORDS.remedies.invalid_api_key);
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  if (connected) showConnection("live");
  connect();
});

/** Show the chat or the live view where there is no room for both. */
function showView(name) {
  document.body.dataset.view = name;
  for (const tab of document.querySelectorAll(".tabs button")) tab.setAttribute("aria-pressed", String(tab.dataset.view === name));
}

for (const tab of document.querySelectorAll(".tabs button")) tab.addEventListener("click", () => showView(tab.dataset.view));

const COLORS = "flexspec-colors";
const colors = $("colors");

function showColors() {
  $("log").toggleAttribute("data-plain", !colors.checked);
  storage.setItem(COLORS, colors.checked ? "on" : "off");
}

colors.checked = storage.getItem(COLORS) !== "off";
colors.addEventListener("change", showColors);
showColors();

let connected = false;

async function connect() {
  if (connected) return;
  connected = true;
  await subscribe(applyEvent, showConnection);
  connected = false;
}

chat.startPage(() => showConnection("key"));
connect();
