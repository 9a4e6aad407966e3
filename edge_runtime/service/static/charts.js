// Small charts in SVG, drawn anew whenever something has changed.

const SVG = "http://www.w3.org/2000/svg";
// The curves cover so long, and less as long as there is less.
const SECONDS = 300;
const LEAST_SECONDS = 30;
const WIDTH = 300;
const HEIGHT = 56;
const ROUNDS = 48;

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** A gauge: its value now, and its curve over the last minutes. Hidden until there is a value. */
export class Tile {
  /** `most` is the least that the scale goes up to; `fixed` keeps it there. */
  constructor(home, { name, title, unit, kind = "", digits = 0, most = 1, fixed = false }) {
    Object.assign(this, { title, unit, digits, most, fixed, points: [] });
    this.figure = document.createElement("figure");
    this.figure.className = `tile card ${kind}`;
    this.figure.dataset.gauge = name;
    this.figure.hidden = true;
    const caption = document.createElement("figcaption");
    this.note = document.createElement("span");
    caption.append(title, this.note);
    this.output = document.createElement("output");
    this.svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.area = shape("path", { class: "area" });
    this.curve = shape("path", { class: "curve" });
    this.svg.append(this.area, this.curve);
    this.figure.append(caption, this.output, this.svg);
    home.append(this.figure);
  }

  /** The value at Unix time `at`; null where there is none. */
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
    const span = Math.max(LEAST_SECONDS, now - this.points[0][0]);
    const known = this.points.filter(([, y]) => y !== null).map(([, y]) => y);
    const top = this.fixed ? this.most : Math.max(this.most, ...known) * 1.1;
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
    const most = known.length ? `, at most ${Math.max(...known).toFixed(this.digits)} ${this.unit} of late` : "";
    const said = value === null ? "nothing now" : `${value.toFixed(this.digits)} ${this.unit}`;
    this.svg.setAttribute("aria-label", `${this.title}: ${said}${most}`);
  }
}

/** The last rounds as bars: what was drafted, filled as far as it was accepted; what the cloud wrote without a draft. */
export class Rounds {
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
    const most = Math.max(4, ...this.rounds.map((round) => round.drafted));
    const bars = this.rounds.flatMap((round, index) => {
      const x = 6 * (ROUNDS - this.rounds.length + index);
      const bar = (of, kind) => {
        const height = (60 * of) / most;
        return shape("rect", { x: x + 0.5, y: 63 - height, width: 4.5, height, class: kind });
      };
      if (!round.drafted) return [bar(Math.min(most, round.own) / 3, "cloud")];
      return [bar(round.drafted, "drafted"), bar(round.accepted, "accepted")];
    });
    this.svg.replaceChildren(...bars);
    const drafted = this.rounds.reduce((sum, round) => sum + round.drafted, 0);
    const accepted = this.rounds.reduce((sum, round) => sum + round.accepted, 0);
    this.svg.setAttribute("aria-label", `The last ${this.rounds.length} rounds: ${accepted} of ${drafted} drafted tokens accepted`);
  }
}
