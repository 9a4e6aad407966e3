// The dashboard: what the feed says, drawn. All text of models is put in as text, never as HTML.

import { Rounds, Tile } from "./charts.js";
import { ask, eventsOf, listen } from "./feed.js";

const MOST_ANSWERS = 8;
const MOST_DECISIONS = 6;
const PRIVACY = {
  tls: "✓ encrypted (TLS)",
  loopback: "✓ on this machine: nothing leaves it",
  clear: "⚠ NOT encrypted",
};

const $ = (id) => document.getElementById(id);
const show = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };
const made = (name, kind, text = "") => Object.assign(document.createElement(name), { className: kind, textContent: text });

function bytes(count) {
  if (count < 1000) return `${count} B`;
  return count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(2)} MB`;
}

const ms = (seconds) => `${(1e3 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;

// Gauges

const tiles = $("tiles");
const gauges = {
  rate: new Tile(tiles, { name: "rate", title: "Speed", unit: "tokens/s", digits: 1, most: 10 }),
  acceptance: new Tile(tiles, { name: "acceptance", title: "Acceptance", unit: "%", kind: "accepted", most: 100, fixed: true }),
  draft: new Tile(tiles, { name: "draft", title: "Draft length", unit: "tokens", kind: "accepted", digits: 1, most: 4 }),
  rtt: new Tile(tiles, { name: "rtt", title: "Round trip", unit: "ms", digits: 1, most: 1 }),
  bytes: new Tile(tiles, { name: "bytes", title: "Link, both ways", unit: "kB/s", digits: 2, most: 1 }),
  watts: new Tile(tiles, { name: "watts", title: "Power", unit: "W", kind: "own", digits: 1, most: 5 }),
  celsius: new Tile(tiles, { name: "celsius", title: "Temperature", unit: "°C", kind: "heat", digits: 1, most: 90, fixed: true }),
  battery: new Tile(tiles, { name: "battery", title: "Battery", unit: "%", kind: "own", most: 100, fixed: true }),
};
let past = [];

/** How much `field` has grown of late, within `seconds`; null where that cannot be told. */
function grown(field, seconds) {
  const now = past.at(-1);
  const before = past.find((gauge) => gauge.at >= now.at - seconds - 0.5);
  return now === before ? null : now[field] - before[field];
}

function perSecond(field) {
  const [before, now] = past.slice(-2);
  return now ? (now[field] - before[field]) / Math.max(0.1, now.at - before.at) : null;
}

function hearGauges(gauge) {
  past.push(gauge);
  while (past[0].at < gauge.at - 30) past.shift();
  const drafted = grown("drafted", 10);
  gauges.rate.add(gauge.at, perSecond("tokens"));
  gauges.acceptance.add(gauge.at, drafted ? (100 * grown("accepted", 10)) / drafted : null);
  gauges.draft.add(gauge.at, drafted ? drafted / grown("drafts", 10) : null);
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
    [gauge.running === 1 ? "1 answer" : `${gauge.running || "no"} answers`, ""],
    [gauge.waiting ? `${gauge.waiting} waiting` : "", ""],
    [gauge.on_battery ? "on battery" : "", ""],
    [gauge.metered ? "metered link" : "", ""],
    [gauge.throttled ? "throttled: too hot, or too little power" : "", "warning"],
  ];
  $("chips").replaceChildren(...chips.filter(([text]) => text).map(([text, kind]) => made("li", kind, text)));
  if ($("status").dataset.state === "waiting") tell("live");
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

function answerOf(number) {
  let answer = answers.get(number);
  if (!answer) {
    const article = made("article", "answer");
    article.dataset.answer = number;
    const title = article.appendChild(made("h3", ""));
    const text = article.appendChild(made("pre", ""));
    text.tabIndex = 0;
    text.setAttribute("aria-label", `Answer ${number}`);
    title.append(made("b", "", `Answer ${number}`));
    answer = { article, title, text, tokens: [], tail: [] };
    answers.set(number, answer);
    $("answers").prepend(article);
    $("nothing").hidden = true;
    for (const oldest of answers.keys()) {
      if (answers.size <= MOST_ANSWERS) break;
      answers.get(oldest).article.remove();
      answers.delete(oldest);
    }
  }
  return answer;
}

function hearBegun(begun) {
  const { article, title, text } = answerOf(begun.answer);
  article.dataset.writing = "";
  text.prepend(made("span", "prompt", begun.prompt));
  title.append(
    made("span", "", `${begun.prompt_tokens} prompt tokens`),
    made("span", "", begun.temperature ? `T = ${begun.temperature}` : "greedy"),
    ...(begun.speculation ? [] : [made("span", "", "speculation off")]),
  );
}

function hearTokens({ answer: number, accepted = [], own = [], withdrawn = [], unverified = [] }) {
  const answer = answerOf(number);
  const { text } = answer;
  const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 30;
  const confirmed = answer.tail.length - withdrawn.length;
  for (const span of answer.tail) span.remove();
  const verified = [...accepted.map((t) => made("span", "accepted", t)), ...own.map((t) => made("span", "own", t))];
  answer.tail = unverified.map((t) => made("span", "unverified", t));
  const struck = withdrawn.map((t) => made("span", "withdrawn", t));
  for (const span of struck) span.setAttribute("aria-hidden", "true");
  text.append(...verified.slice(0, confirmed), ...struck, ...verified.slice(Math.max(0, confirmed)), ...answer.tail);
  answer.tokens.push(...verified);
  count("accepted", accepted.length);
  count("own", own.length);
  count("withdrawn", withdrawn.length);
  if (atEnd) text.scrollTop = text.scrollHeight;
}

function hearRound(round) {
  const corrected = round.corrected == null ? null : answerOf(round.answer).tokens[round.corrected];
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
  show("last-round", `last round: ${bytes(round.sent)} sent, ${bytes(round.received)} received, everything included`);
}

function hearEnded(ended) {
  const { article, title } = answerOf(ended.answer);
  delete article.dataset.writing;
  const drafted = ended.drafted ? `, ${ended.accepted} of ${ended.drafted} drafted accepted` : "";
  title.append(made("span", "", `${ended.tokens} tokens in ${ended.seconds.toFixed(1)} s${drafted}; ${ended.message || ended.outcome}`));
}

// Plans

const rounds = new Rounds($("rounds"));
let decision = "";

function hearPlanned(plan) {
  show("plan-draft", String(plan.draft));
  show("plan-own", String(plan.own));
  show("plan-reason", plan.reason || "no reason given");
  const siblings = plan.draft && plan.siblings ? `${plan.siblings} alternatives beside a doubtful token` : "";
  const ahead = plan.draft && plan.ahead ? "drafts on while the round is on its way" : "";
  const reads = !plan.draft && plan.ahead ? "the draft reads meanwhile" : "";
  const watches = plan.watch ? "the draft guesses along, to see what it would be worth" : "";
  show("plan-more", [siblings, ahead, reads, watches].filter(Boolean).join("; "));
  const said = `${plan.draft} + ${plan.own}`;
  if (said === decision) return;
  decision = said;
  const item = made("li", "");
  item.append(made("b", "", said), made("span", "", plan.reason));
  $("decisions").prepend(item);
  while ($("decisions").children.length > MOST_DECISIONS) $("decisions").lastChild.remove();
}

// The feed

let feed = "";

function hearBoard(board) {
  showVerifier(board);
  show("version", `FlexSpec ${board.version}`);
  $("max-tokens").max = board.max_new_tokens;
  $("max-tokens").value = Math.min($("max-tokens").valueAsNumber || 128, board.max_new_tokens);
  tell(board.ready ? "live" : "waiting", 0, "loading the draft");
  if (feed === board.feed) return;
  feed = board.feed;
  answers.clear();
  past = [];
  for (const answer of document.querySelectorAll(".answer")) answer.remove();
  for (const part of [...Object.values(gauges), rounds]) part.clear();
  for (const kind of Object.keys(counts)) count(kind, -counts[kind]);
}

const HEARD = {
  board: hearBoard, begun: hearBegun, planned: hearPlanned, tokens: hearTokens, round: hearRound, ended: hearEnded, gauges: hearGauges,
};
let drawing = false;

function hear(news) {
  // A newer board may tell what this page does not know.
  HEARD[news.type]?.(news);
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    for (const part of [...Object.values(gauges), rounds]) part.draw();
  });
}

function tell(state, seconds = 0, why = "") {
  const words = { live: "live", waiting: why, lost: `no connection to the board (${why}); next attempt in ${seconds} s`, key: "an API key is needed" };
  $("status").dataset.state = state;
  show("status", words[state]);
  $("key-form").hidden = state !== "key";
  if (state === "key") $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("flexspec-key", $("key").value);
  $("key").value = "";
  listen(hear, tell);
});

// Asking

let asking = null;

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (asking) return;
  asking = new AbortController();
  $("go").disabled = true;
  $("stop").disabled = false;
  show("asked", "waiting for a place");
  const order = {
    prompt: $("prompt").value,
    temperature: $("temperature").valueAsNumber,
    max_tokens: $("max-tokens").valueAsNumber,
    speculation: $("speculation").checked,
    stream: true,
  };
  try {
    const headers = { "content-type": "application/json" };
    const response = await ask("v1/completions", { method: "POST", headers, body: JSON.stringify(order), signal: asking.signal });
    let characters = 0;
    for await (const { event: kind, data } of eventsOf(response)) {
      if (kind === "error") throw new Error(JSON.parse(data).error.message);
      if (data === "[DONE]") continue;
      const { choices: [choice], timings } = JSON.parse(data);
      characters += choice.text.length;
      show("asked", timings
        ? `${timings.predicted_n} tokens, ${timings.predicted_per_second.toFixed(1)} per second, first text after ${timings.first_text_ms.toFixed(0)} ms, ${timings.rounds} rounds`
        : `writing: ${characters} characters`);
    }
  } catch (error) {
    show("asked", error.name === "AbortError" ? "stopped" : error.message);
  }
  asking = null;
  $("go").disabled = false;
  $("stop").disabled = true;
});
$("stop").addEventListener("click", () => asking?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});

listen(hear, tell);
