// The dashboard: draws the events of the board. Text of models is inserted as text, never as HTML.

import { GaugeTile, RoundsChart } from "./charts.js";
import { readEvents, request, subscribe } from "./feed.js";

const MAX_ANSWERS = 8;
const MAX_DECISIONS = 6;
const PRIVACY = {
  tls: "✓ encrypted (TLS)",
  loopback: "✓ on this machine, no network traffic",
  clear: "⚠ NOT encrypted",
};

const $ = (id) => document.getElementById(id);
const show = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };
const createElement = (name, kind, text = "") => Object.assign(document.createElement(name), { className: kind, textContent: text });

function bytes(count) {
  if (count < 1000) return `${count} B`;
  return count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(2)} MB`;
}

const ms = (seconds) => `${(1e3 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;

// Gauges

const tiles = $("tiles");
const gauges = {
  rate: new GaugeTile(tiles, { name: "rate", title: "Speed", unit: "tokens/s", digits: 1, scaleMax: 10 }),
  acceptance: new GaugeTile(tiles, { name: "acceptance", title: "Acceptance", unit: "%", kind: "accepted", scaleMax: 100, fixed: true }),
  draft: new GaugeTile(tiles, { name: "draft", title: "Draft length", unit: "tokens", kind: "accepted", digits: 1, scaleMax: 4 }),
  rtt: new GaugeTile(tiles, { name: "rtt", title: "Round trip", unit: "ms", digits: 1, scaleMax: 1 }),
  bytes: new GaugeTile(tiles, { name: "bytes", title: "Link traffic", unit: "kB/s", digits: 2, scaleMax: 1 }),
  watts: new GaugeTile(tiles, { name: "watts", title: "Power", unit: "W", kind: "own", digits: 1, scaleMax: 5 }),
  celsius: new GaugeTile(tiles, { name: "celsius", title: "Temperature", unit: "°C", kind: "heat", digits: 1, scaleMax: 90, fixed: true }),
  battery: new GaugeTile(tiles, { name: "battery", title: "Battery", unit: "%", kind: "own", scaleMax: 100, fixed: true }),
};
// Gauge samples of the last 30 seconds.
let samples = [];

/** Increase of `field` over the last `seconds`; null if there is no earlier sample. */
function increase(field, seconds) {
  const now = samples.at(-1);
  const before = samples.find((gauge) => gauge.at >= now.at - seconds - 0.5);
  return now === before ? null : now[field] - before[field];
}

function perSecond(field) {
  const [before, now] = samples.slice(-2);
  return now ? (now[field] - before[field]) / Math.max(0.1, now.at - before.at) : null;
}

function applyGauges(gauge) {
  samples.push(gauge);
  while (samples[0].at < gauge.at - 30) samples.shift();
  const drafted = increase("drafted", 10);
  gauges.rate.add(gauge.at, perSecond("tokens"));
  gauges.acceptance.add(gauge.at, drafted ? (100 * increase("accepted", 10)) / drafted : null);
  gauges.draft.add(gauge.at, drafted ? drafted / increase("drafts", 10) : null);
  gauges.rtt.add(gauge.at, gauge.rtt_seconds == null ? null : 1e3 * gauge.rtt_seconds);
  const link = perSecond("sent");
  gauges.bytes.add(gauge.at, link === null ? null : (link + perSecond("received")) / 1e3);
  const modelled = gauge.energy === "profile" ? "modelled" : "";
  gauges.watts.add(gauge.at, gauge.watts, [modelled, gauge.joules == null ? "" : energy(gauge.joules)].filter(Boolean).join(", "));
  gauges.celsius.add(gauge.at, gauge.celsius, gauge.throttled ? "throttled" : "");
  gauges.battery.add(gauge.at, gauge.battery_percent, gauge.battery_joules == null ? "" : energy(gauge.battery_joules));
  show("sent", bytes(gauge.sent));
  show("received", bytes(gauge.received));
  show("per-token", gauge.tokens ? bytes(Math.round((gauge.sent + gauge.received) / gauge.tokens)) : "–");
  showVerifier(gauge);
  show("fault", gauge.fault ? `No verifier: ${gauge.fault}` : "");
  $("fault").hidden = !gauge.fault;
  const chips = [
    [gauge.running === 1 ? "1 running answer" : `${gauge.running || "no"} running answers`, ""],
    [gauge.waiting ? `${gauge.waiting} waiting` : "", ""],
    [gauge.on_battery ? "on battery" : "", ""],
    [gauge.metered ? "metered link" : "", ""],
    [gauge.throttled ? "throttled because of heat or low voltage" : "", "warning"],
  ];
  $("chips").replaceChildren(...chips.filter(([text]) => text).map(([text, kind]) => createElement("li", kind, text)));
  if ($("status").dataset.state === "waiting") showConnection("live");
}

const energy = (joules) => (joules < 3600 ? `${joules.toFixed(0)} J` : `${(joules / 3600).toFixed(joules < 36000 ? 2 : 1)} Wh`);

function showVerifier({ verifier, privacy }) {
  show("verifier", verifier);
  show("privacy", PRIVACY[privacy]);
  $("privacy").dataset.privacy = privacy;
}

// Answers

const answers = new Map();
const counts = { accepted: 0, corrected: 0, own: 0, withdrawn: 0 };

function count(kind, change) {
  counts[kind] += change;
  show(`count-${kind}`, String(counts[kind]));
}

function findOrAddAnswer(number) {
  let answer = answers.get(number);
  if (!answer) {
    const article = createElement("article", "answer");
    article.dataset.answer = number;
    const title = article.appendChild(createElement("h3", ""));
    const text = article.appendChild(createElement("pre", ""));
    text.tabIndex = 0;
    text.setAttribute("aria-label", `Answer ${number}`);
    title.append(createElement("b", "", `Answer ${number}`));
    answer = { article, title, text, tokens: [], tail: [] };
    answers.set(number, answer);
    $("answers").prepend(article);
    $("nothing").hidden = true;
    for (const oldest of answers.keys()) {
      if (answers.size <= MAX_ANSWERS) break;
      answers.get(oldest).article.remove();
      answers.delete(oldest);
    }
  }
  return answer;
}

function applyAnswerStarted(started) {
  const { article, title, text } = findOrAddAnswer(started.answer);
  article.dataset.writing = "";
  text.prepend(createElement("span", "prompt", started.prompt));
  title.append(
    createElement("span", "", `${started.prompt_tokens} prompt tokens`),
    createElement("span", "", started.temperature ? `T = ${started.temperature}` : "greedy"),
    ...(started.speculation ? [] : [createElement("span", "", "speculation off")]),
  );
}

function applyTokens({ answer: number, accepted = [], own = [], withdrawn = [], unverified = [] }) {
  const answer = findOrAddAnswer(number);
  const { text } = answer;
  const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 30;
  const confirmed = answer.tail.length - withdrawn.length;
  for (const span of answer.tail) span.remove();
  const verified = [...accepted.map((t) => createElement("span", "accepted", t)), ...own.map((t) => createElement("span", "own", t))];
  answer.tail = unverified.map((t) => createElement("span", "unverified", t));
  const removed = withdrawn.map((t) => createElement("span", "withdrawn", t));
  for (const span of removed) span.setAttribute("aria-hidden", "true");
  text.append(...verified.slice(0, confirmed), ...removed, ...verified.slice(Math.max(0, confirmed)), ...answer.tail);
  answer.tokens.push(...verified);
  count("accepted", accepted.length);
  count("own", own.length);
  count("withdrawn", withdrawn.length);
  if (atEnd) text.scrollTop = text.scrollHeight;
}

function applyRound(round) {
  const corrected = round.corrected == null ? null : findOrAddAnswer(round.answer).tokens[round.corrected];
  if (corrected?.className === "own") {
    corrected.className = "corrected";
    count("corrected", 1);
    count("own", -1);
  }
  rounds.add(round);
  const parts = { draft: round.draft_seconds, link: round.link_seconds, verifier: round.verifier_seconds };
  for (const [part, seconds] of Object.entries(parts)) {
    show(`ms-${part}`, ms(seconds));
    $("split").querySelector(`.${part}`).style.flexGrow = Math.max(1, 1e4 * seconds);
  }
  show("last-round", `Last round: ${bytes(round.sent)} sent, ${bytes(round.received)} received, all protocol overhead included`);
}

function applyAnswerFinished(finished) {
  const { article, title } = findOrAddAnswer(finished.answer);
  delete article.dataset.writing;
  const drafted = finished.drafted ? `, ${finished.accepted} of ${finished.drafted} draft tokens accepted` : "";
  title.append(createElement("span", "", `${finished.tokens} tokens in ${finished.seconds.toFixed(1)} s${drafted}; ${finished.message || finished.outcome}`));
}

// Plans

const rounds = new RoundsChart($("rounds"));
let lastDecision = "";

function applyPlan(plan) {
  show("plan-draft", String(plan.draft));
  show("plan-own", String(plan.own));
  show("plan-reason", plan.reason || "no reason given");
  const siblings = plan.draft && plan.siblings ? `${plan.siblings} siblings per uncertain token` : "";
  const ahead = plan.draft && plan.ahead ? "drafts ahead while the round is in flight" : "";
  const prefills = !plan.draft && plan.ahead ? "the draft model prefills in the meantime" : "";
  const shadow = plan.watch ? "shadow drafting, to measure the acceptance rate" : "";
  show("plan-more", [siblings, ahead, prefills, shadow].filter(Boolean).join("; "));
  const label = `${plan.draft} + ${plan.own}`;
  if (label === lastDecision) return;
  lastDecision = label;
  const item = createElement("li", "");
  item.append(createElement("b", "", label), createElement("span", "", plan.reason));
  $("decisions").prepend(item);
  while ($("decisions").children.length > MAX_DECISIONS) $("decisions").lastChild.remove();
}

// Events

let feed = "";

function applyBoard(board) {
  showVerifier(board);
  show("version", `FlexSpec ${board.version}`);
  $("max-tokens").max = board.max_new_tokens;
  $("max-tokens").value = Math.min($("max-tokens").valueAsNumber || 128, board.max_new_tokens);
  showConnection(board.ready ? "live" : "waiting", 0, "loading the draft model");
  if (feed === board.feed) return;
  feed = board.feed;
  answers.clear();
  samples = [];
  for (const answer of document.querySelectorAll(".answer")) answer.remove();
  for (const part of [...Object.values(gauges), rounds]) part.clear();
  for (const kind of Object.keys(counts)) count(kind, -counts[kind]);
}

const HANDLERS = {
  board: applyBoard, begun: applyAnswerStarted, planned: applyPlan, tokens: applyTokens, round: applyRound, ended: applyAnswerFinished, gauges: applyGauges,
};
let drawing = false;

function applyEvent(event) {
  // A newer service may send events that this page does not know.
  HANDLERS[event.type]?.(event);
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    for (const part of [...Object.values(gauges), rounds]) part.draw();
  });
}

function showConnection(state, seconds = 0, reason = "") {
  const words = { live: "live", waiting: reason, lost: `no connection to the board (${reason}); retrying in ${seconds} s`, key: "API key required" };
  $("status").dataset.state = state;
  show("status", words[state]);
  $("key-form").hidden = state !== "key";
  if (state === "key") $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("flexspec-key", $("key").value);
  $("key").value = "";
  subscribe(applyEvent, showConnection);
});

// Requests

let abortController = null;

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (abortController) return;
  abortController = new AbortController();
  $("go").disabled = true;
  $("stop").disabled = false;
  show("asked", "waiting for a free slot");
  // A chat goes through the model's chat template; other text is continued as it is.
  const chat = $("chat").checked;
  const prompt = $("prompt").value;
  const body = {
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    temperature: $("temperature").valueAsNumber,
    max_tokens: $("max-tokens").valueAsNumber,
    speculation: $("speculation").checked,
    stream: true,
  };
  try {
    const headers = { "content-type": "application/json" };
    const response = await request(chat ? "v1/chat/completions" : "v1/completions", { method: "POST", headers, body: JSON.stringify(body), signal: abortController.signal });
    let characters = 0;
    for await (const { event: kind, data } of readEvents(response)) {
      if (kind === "error") throw new Error(JSON.parse(data).error.message);
      if (data === "[DONE]") continue;
      const { choices: [choice], timings } = JSON.parse(data);
      characters += (choice.text ?? choice.delta.content ?? "").length;
      show("asked", timings
        ? `${timings.predicted_n} tokens, ${timings.predicted_per_second.toFixed(1)} tokens/s, first text after ${timings.first_text_ms.toFixed(0)} ms, ${timings.rounds} rounds`
        : `generating: ${characters} characters`);
    }
  } catch (error) {
    show("asked", error.name === "AbortError" ? "stopped" : error.message);
  }
  abortController = null;
  $("go").disabled = false;
  $("stop").disabled = true;
});
$("stop").addEventListener("click", () => abortController?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});

subscribe(applyEvent, showConnection);
