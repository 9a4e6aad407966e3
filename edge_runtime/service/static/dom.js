// Helpers to build elements, and the words that the page shares with `edge-runtime top`.

export const WORDS = await (await fetch("words.json")).json();

export const $ = (id) => document.getElementById(id);

/** Create an element. Keys of `attributes` with a dash, `role`, `for` and `datetime` are attributes, all others are properties. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (/-|^(role|for|datetime)$/.test(key)) element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

/** Set the text of an element if it differs: screen readers announce every change. */
export function show(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

/** Insert values into words: {name} becomes values.name. */
export const fill = (words, values) => words.replace(/\{(\w+)\}/g, (_, name) => values[name]);

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** A sentence that begins with a capital; error messages begin without, to follow a colon. */
export const capitalize = (sentence) => sentence.slice(0, 1).toUpperCase() + sentence.slice(1);

export const ms = (seconds) => (seconds < 10 ? `${(1e3 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(1)} s`);

export function bytes(number) {
  if (number < 1000) return `${number} B`;
  return number < 1e6 ? `${(number / 1e3).toFixed(1)} kB` : `${(number / 1e6).toFixed(2)} MB`;
}

/** Say what a plan does. */
export function describePlan(plan) {
  const form = plan ? WORDS.plans[plan.draft ? "draft" : "stream"] : WORDS.plans.none;
  return fill(form, plan ? { draft: count(plan.draft, "token"), own: count(plan.own, "token") } : {});
}

/** Fill a bar with parts to scale: [kind, amount]. */
export function drawBar(bar, parts) {
  const total = parts.reduce((sum, [, amount]) => sum + amount, 0);
  bar.replaceChildren(...parts.filter(([, amount]) => amount > 0).map(([kind, amount]) => {
    const part = make("span", { className: kind });
    part.style.width = `${(100 * amount) / total}%`;
    return part;
  }));
}
