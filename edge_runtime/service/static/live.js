// The live view: what the board and the verifier are doing, drawn from the events of the board.

import { GaugeTile, RoundsChart } from "./charts.js";
import { $, WORDS, bytes, capitalize, count, describePlan, drawBar, fill, make, ms, show } from "./dom.js";

const MAX_ANSWERS = 8;
// Rounds whose times are added up.
const TIMED_ROUNDS = 48;

// Gauges

const COLORS = { acceptance: "accepted", draft: "accepted", watts: "own", celsius: "heat", battery: "own" };
const gauges = {};
for (const [name, words] of Object.entries(WORDS.gauges)) {
  const fixed = ["%", "°C"].includes(words.unit);
  gauges[name] = new GaugeTile($("tiles"), { ...words, key: name, kind: COLORS[name], fixed });
}
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

const energy = (joules) => (joules < 3600 ? `${joules.toFixed(0)} J` : `${(joules / 3600).toFixed(joules < 36000 ? 2 : 1)} Wh`);

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
  const modeled = gauge.energy === "profile" ? "modeled" : "";
  gauges.watts.add(gauge.at, gauge.watts, [modeled, gauge.joules == null ? "" : energy(gauge.joules)].filter(Boolean).join(", "));
  gauges.celsius.add(gauge.at, gauge.celsius, gauge.throttled ? "throttled" : "");
  gauges.battery.add(gauge.at, gauge.battery_percent, gauge.battery_joules == null ? "" : energy(gauge.battery_joules));
  show("sent", bytes(gauge.sent));
  show("received", bytes(gauge.received));
  show("per-token", gauge.tokens ? bytes(Math.round((gauge.sent + gauge.received) / gauge.tokens)) : "–");
  showVerifier(gauge);
  show("fault", capitalize(gauge.fault ?? ""));
  $("fault").hidden = !gauge.fault;
  const chips = [
    [fill(WORDS.answers.running, { answers: gauge.running ? count(gauge.running, "answer") : "no answer" }), ""],
    [gauge.waiting && fill(WORDS.answers.waiting, { requests: count(gauge.waiting, "request") }), ""],
    [gauge.unverified_answers && fill(WORDS.answers.unverified, { answers: count(gauge.unverified_answers, "answer") }), "warning"],
    [gauge.on_battery && WORDS.board.on_battery, ""],
    [gauge.metered && WORDS.board.metered, ""],
    [gauge.throttled && WORDS.board.throttled, "warning"],
  ];
  $("chips").replaceChildren(...chips.filter(([text]) => text).map(([textContent, className]) => make("li", { className, textContent })));
}

function showVerifier({ verifier, privacy }) {
  show("verifier", verifier);
  show("privacy", WORDS.privacy[privacy]);
  $("privacy").dataset.privacy = privacy;
}

// Answers

const answers = new Map();
const counts = { accepted: 0, corrected: 0, own: 0, unverified: 0, withdrawn: 0 };
for (const kind of Object.keys(counts)) {
  $("legend").append(make("li", {}, make("b", { id: `count-${kind}` }, "0"), " ", make("span", { className: kind }, WORDS.tokens[kind])));
}

function add(kind, change) {
  counts[kind] += change;
  show(`count-${kind}`, counts[kind].toLocaleString("en"));
}

function findOrAddAnswer(number) {
  let answer = answers.get(number);
  if (!answer) {
    const title = make("h3", {}, make("b", {}, `Answer ${number}`));
    const text = make("pre", { tabIndex: 0, "aria-label": `Answer ${number}` });
    const article = make("article", { className: "answer" }, title, text);
    answer = { article, title, text, tokens: [], tail: [] };
    answers.set(number, answer);
    $("answers").prepend(article);
    for (const oldest of answers.keys()) {
      if (answers.size <= MAX_ANSWERS) break;
      answers.get(oldest).article.remove();
      answers.delete(oldest);
    }
    show("answers-title", `Answers of all clients (the last ${answers.size})`);
  }
  return answer;
}

function applyAnswerStarted(started) {
  const { article, title, text } = findOrAddAnswer(started.answer);
  article.dataset.writing = "";
  text.prepend(make("span", { className: "prompt" }, started.prompt));
  title.append(
    make("span", {}, count(started.prompt_tokens, "prompt token")),
    make("span", {}, started.temperature ? `T = ${started.temperature}` : "greedy"),
    ...(started.speculation ? [] : [make("span", {}, "speculation off")]),
  );
}

function applyTokens({ answer: number, accepted = [], own = [], withdrawn = [], unverified = [] }) {
  const answer = findOrAddAnswer(number);
  const { text } = answer;
  const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 30;
  const confirmed = answer.tail.length - withdrawn.length;
  for (const span of answer.tail) span.remove();
  const spans = (className, texts) => texts.map((textContent) => make("span", { className, textContent }));
  const verified = [...spans("accepted", accepted), ...spans("own", own)];
  const removed = spans("withdrawn", withdrawn);
  for (const span of removed) span.ariaHidden = "true";
  add("unverified", unverified.length - answer.tail.length);
  answer.tail = spans("unverified", unverified);
  text.append(...verified.slice(0, confirmed), ...removed, ...verified.slice(Math.max(0, confirmed)), ...answer.tail);
  answer.tokens.push(...verified);
  add("accepted", accepted.length);
  add("own", own.length);
  add("withdrawn", withdrawn.length);
  if (atEnd) text.scrollTop = text.scrollHeight;
}

function applyAnswerFinished(finished) {
  const { article, title } = findOrAddAnswer(finished.answer);
  delete article.dataset.writing;
  const drafted = finished.drafted ? `, ${fill(WORDS.round, { accepted: finished.accepted, draft: count(finished.drafted, "draft token") })}` : "";
  const unverified = finished.unverified ? `; the last ${finished.unverified} ${WORDS.tokens.unverified}` : "";
  const outcome = finished.message || (WORDS.outcomes[finished.outcome] ?? finished.outcome);
  title.append(make("span", {}, `${count(finished.tokens, "token")} in ${finished.seconds.toFixed(1)} s${drafted}; ${outcome}${unverified}`));
  if (finished.version) title.append(make("code", {}, finished.version));
}

// Plans and rounds

const rounds = new RoundsChart($("rounds"));
let timed = [];

function applyRound(round) {
  const corrected = round.corrected == null ? null : findOrAddAnswer(round.answer).tokens[round.corrected];
  if (corrected?.className === "own") {
    corrected.className = "corrected";
    add("corrected", 1);
    add("own", -1);
  }
  rounds.add(round);
  timed.push(round);
  timed = timed.slice(-TIMED_ROUNDS);
  show("last-round", `Last round: ${bytes(round.sent)} sent, ${bytes(round.received)} received, all protocol overhead included`);
}

function drawTimes() {
  const parts = Object.keys(WORDS.times).map((part) => [part, timed.reduce((sum, round) => sum + round[`${part}_seconds`], 0)]);
  const total = parts.reduce((sum, [, seconds]) => sum + seconds, 0);
  $("times-title").hidden = !total;
  if (!total) return;
  drawBar($("times"), parts);
  show("times-title", `Time of the last ${count(timed.length, "round")}`);
  $("times-legend").replaceChildren(...parts.map(([part, seconds]) => make("li", {},
    make("span", { className: `swatch ${part}` }), `${WORDS.times[part]} `,
    make("b", {}, ms(seconds / timed.length)), ` a round, ${Math.round((100 * seconds) / total)} %`)));
}

function applyPlan(plan) {
  show("plan", describePlan(plan));
  show("plan-reason", plan.reason ? `Reason: ${WORDS.reasons[plan.reason] ?? plan.reason}` : "");
  const extras = [
    plan.draft && plan.siblings && `${count(plan.siblings, "alternative")} for each uncertain token`,
    plan.draft && plan.ahead && "drafts ahead while the round is under way",
    !plan.draft && plan.ahead && "the draft model reads the prompt meanwhile",
    plan.watch && "drafts along without sending, to measure how often it is right",
  ];
  show("plan-more", extras.filter(Boolean).join("; "));
}

// Events

function drawOrigins() {
  const parts = Object.entries(counts).filter(([kind]) => kind !== "withdrawn");
  drawBar($("origins"), parts);
  const total = parts.reduce((sum, [, number]) => sum + number, 0);
  $("origins").setAttribute("aria-label", parts.map(([kind, number]) => `${Math.round((100 * number) / (total || 1))} % ${WORDS.tokens[kind]}`).join(", "));
}

const HANDLERS = {
  board: showVerifier, begun: applyAnswerStarted, planned: applyPlan, tokens: applyTokens, round: applyRound, ended: applyAnswerFinished, gauges: applyGauges,
};
let drawing = false;

/** Apply an event of the board. */
export function applyEvent(event) {
  // A newer service may send events that this page does not know.
  HANDLERS[event.type]?.(event);
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    for (const part of [...Object.values(gauges), rounds]) part.draw();
    drawOrigins();
    drawTimes();
  });
}

/** Forget everything: the service was restarted. */
export function resetEvents() {
  answers.clear();
  samples = [];
  timed = [];
  $("answers").replaceChildren();
  show("answers-title", "Answers of all clients");
  show("plan", describePlan(null));
  for (const id of ["plan-reason", "plan-more", "last-round"]) show(id, "");
  for (const part of [...Object.values(gauges), rounds]) part.clear();
  for (const kind of Object.keys(counts)) add(kind, -counts[kind]);
}
