// Small SVG charts, redrawn on every change.

const SVG = "http://www.w3.org/2000/svg";
// Time span of the curves; shorter, down to MIN_SECONDS, while there is less history.
const SECONDS = 300;
const MIN_SECONDS = 30;
const WIDTH = 300;
const HEIGHT = 56;
const ROUNDS = 48;

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** A gauge: its current value and its curve over the last minutes. Hidden until there is a value. */
export class GaugeTile {
  /** The scale ends at `scale`, or above it if values are larger and the scale is not `fixed`. */
  constructor(home, { key, name, unit, kind = "", digits = 0, scale = 1, fixed = false }) {
    Object.assign(this, { name, unit, digits, scale, fixed, points: [] });
    this.figure = document.createElement("figure");
    this.figure.className = `tile card ${kind}`;
    this.figure.dataset.gauge = key;
    this.figure.hidden = true;
    const caption = document.createElement("figcaption");
    this.note = document.createElement("span");
    caption.append(name, this.note);
    this.output = document.createElement("output");
    this.svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.area = shape("path", { class: "area" });
    this.curve = shape("path", { class: "curve" });
    this.svg.append(this.area, this.curve);
    this.figure.append(caption, this.output, this.svg);
    home.append(this.figure);
  }

  /** Add the value at Unix time `at`; null if there is none. */
  add(at, value, note = "") {
    this.points.push([at, value ?? null]);
    while (this.points[0][0] < at - SECONDS) this.points.shift();
    if (value != null) this.figure.hidden = false;
    this.note.textContent = note;
  }

  clear() {
    this.points = [];
  }

  draw() {
    if (this.figure.hidden || !this.points.length) return;
    const [now, value] = this.points.at(-1);
    const span = Math.max(MIN_SECONDS, now - this.points[0][0]);
    const known = this.points.filter(([, y]) => y !== null).map(([, y]) => y);
    const top = this.fixed ? this.scale : Math.max(this.scale, ...known) * 1.1;
    const unit = document.createElement("small");
    unit.textContent = this.unit;
    this.output.replaceChildren(value === null ? "–" : value.toFixed(this.digits), unit);
    let area = "";
    let curve = "";
    let start = null;
    let x = 0;
    for (const [at, y] of [...this.points, [now, null]]) {
      if (y === null) {
        if (start !== null) area += `L${x} ${HEIGHT}L${start} ${HEIGHT}Z`;
        start = null;
        continue;
      }
      x = (WIDTH * (1 - (now - at) / span)).toFixed(1);
      const point = `${x} ${(HEIGHT - 2 - (HEIGHT - 6) * Math.min(1, y / top)).toFixed(1)}`;
      area += start === null ? `M${x} ${HEIGHT}L${point}` : `L${point}`;
      curve += (start === null ? "M" : "L") + point;
      start ??= x;
    }
    this.area.setAttribute("d", area);
    this.curve.setAttribute("d", curve);
    const maximum = known.length ? `, recent maximum ${Math.max(...known).toFixed(this.digits)} ${this.unit}` : "";
    const current = value === null ? "no current value" : `${value.toFixed(this.digits)} ${this.unit}`;
    this.svg.setAttribute("aria-label", `${this.name}: ${current}${maximum}`);
  }
}

/** Recent rounds as bars of tokens: accepted ones and the target's own filled, rejected ones as an outline on top. */
export class RoundsChart {
  constructor(home) {
    this.rounds = [];
    this.svg = shape("svg", { viewBox: `0 0 ${ROUNDS * 6} 64`, preserveAspectRatio: "none", role: "img" });
    home.append(this.svg);
  }

  add(round) {
    this.rounds.push(round);
    if (this.rounds.length > ROUNDS) this.rounds.shift();
  }

  clear() {
    this.rounds = [];
  }

  draw() {
    // A round without a draft may have hundreds of tokens; its bar ends at the top.
    const scale = Math.max(6, ...this.rounds.map(({ drafted, own }) => (drafted ? drafted + own : 0)));
    const bars = this.rounds.flatMap(({ drafted, accepted, own }, index) => {
      const x = 6 * (ROUNDS - this.rounds.length + index);
      const bar = (from, to, kind) => {
        const [low, high] = [from, to].map((tokens) => (62 * Math.min(scale, tokens)) / scale);
        return shape("rect", { x: x + 0.5, y: 63 - high, width: 4.5, height: high - low, class: kind });
      };
      return [bar(accepted + own, drafted + own, "drafted"), bar(0, accepted, "accepted"), bar(accepted, accepted + own, "cloud")];
    });
    this.svg.replaceChildren(...bars);
    const drafted = this.rounds.reduce((sum, round) => sum + round.drafted, 0);
    const accepted = this.rounds.reduce((sum, round) => sum + round.accepted, 0);
    this.svg.setAttribute("aria-label", `Last ${this.rounds.length} rounds: ${accepted} of ${drafted} draft tokens accepted`);
  }
}
