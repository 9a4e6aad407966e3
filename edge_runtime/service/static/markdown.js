// Renders Markdown as DOM nodes: text of models is only ever inserted as text. Every character keeps its place in the
// source, so that it can be colored by its origin. Also hostile text takes linear time.

import { make } from "./dom.js";

const MAX_DEPTH = 6;
// Characters of a link's text, and of its address.
const MAX_LINK = 1000;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_RULE = /^ *\|?( *:?-+:? *\|)+( *:?-+:? *)?$/;
const URL_AT = /^https?:\/\/[^\s<>"'`|\\^]+[^\s<>"'`|\\^.,;:!?)\]*_~]/;
const SAFE_URL = /^(https?:\/\/|mailto:)/i;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const KINDS = { a: "accepted", c: "corrected", o: "own", u: "unverified" };

/** Text whose characters come from known places of the source. */
class Run {
  /** `pieces`: [text, place of its first character]. They are joined with line breaks. */
  constructor(pieces, kinds) {
    this.text = pieces.map(([text]) => text).join("\n");
    this.pieces = pieces;
    this.kinds = kinds;
    // The piece that was reached, and where its text begins in that of the run.
    this.piece = this.first = 0;
  }

  /** Append the characters from `start` to `end`, each in the color of its origin. Calls go forward in the text. */
  append(home, start, end) {
    for (; this.piece < this.pieces.length; this.piece += 1) {
      const [text, at] = this.pieces[this.piece];
      const last = this.first + text.length + 1;
      const from = Math.max(start, this.first);
      const to = Math.min(end, last);
      const shift = at - this.first;
      for (let i = from; i < to;) {
        const kind = this.kinds[i + shift];
        let j = i + 1;
        while (j < to && this.kinds[j + shift] === kind) j += 1;
        // A token's leading space looks like the end of the word before it.
        const word = KINDS[kind] ? i + this.text.slice(i, j).search(/\S|$/) : j;
        if (word > i) home.append(this.text.slice(i, word));
        if (j > word) home.append(make("span", { className: KINDS[kind] }, this.text.slice(word, j)));
        i = j;
      }
      if (last >= end) return;
      this.first = last;
    }
  }
}

/** Append the inline elements of `run` from `start` to `end`. */
function addInline(home, run, start = 0, end = run.text.length, depth = 0) {
  const { text } = run;
  // Delimiters that do not close after here: searched once, not once for every opening one.
  const missing = new Set();
  // Where the next text of a link ends.
  let middle = -1;
  let plain = start;
  const flush = (i) => { if (i > plain) run.append(home, plain, i); };
  const find = (mark, from) => {
    if (missing.has(mark)) return -1;
    for (let at = text.indexOf(mark, from); at >= 0 && at + mark.length <= end; at = text.indexOf(mark, at + 1)) {
      if (mark[0] === "`" ? text[at - 1] !== "`" && text[at + mark.length] !== "`" : /\S/.test(text[at - 1])) {
        if (mark.length === 1 && "*_".includes(mark) && text[at + 1] === mark) { at += 1; continue; }
        if (mark[0] !== "_" || !/\w/.test(text[at + mark.length] ?? " ")) return at;
      }
    }
    missing.add(mark);
    return -1;
  };
  for (let i = start; i < end;) {
    const char = text[i];
    let next = i + 1;
    if (char === "\\" && ESCAPABLE.test(text[i + 1] ?? "")) {
      flush(i);
      plain = i + 1;
      next = i + 2;
    } else if (char === "`") {
      while (text[next] === "`") next += 1;
      const mark = text.slice(i, next);
      const close = find(mark, next);
      if (close >= 0) {
        flush(i);
        const code = make("code");
        run.append(code, next, close);
        home.append(code);
        plain = next = close + mark.length;
      }
    } else if ("*_~".includes(char) && depth < MAX_DEPTH) {
      const mark = text[i + 1] === char ? char + char : char;
      const opens = mark !== "~" && /\S/.test(text[i + mark.length] ?? " ") && (char !== "_" || !/\w/.test(text[i - 1] ?? " "));
      const close = opens ? find(mark, i + mark.length + 1) : -1;
      next = i + mark.length;
      if (close >= 0) {
        flush(i);
        const element = make(char === "~" ? "s" : mark.length === 2 ? "strong" : "em");
        addInline(element, run, next, close, depth + 1);
        home.append(element);
        plain = next = close + mark.length;
      }
    } else if (char === "[" && depth < MAX_DEPTH) {
      if (middle < i) middle = text.indexOf("](", i);
      if (middle < 0 || middle >= end) middle = Infinity;
      const size = middle - i < MAX_LINK ? text.slice(middle, Math.min(end, middle + MAX_LINK)).indexOf(")") : -1;
      const close = middle + size;
      const address = size < 0 ? "" : text.slice(middle + 2, close).trim().split(/\s/)[0];
      if (SAFE_URL.test(address) && !text.slice(i + 1, middle).includes("[")) {
        flush(text[i - 1] === "!" && i > plain ? i - 1 : i);
        const link = makeLink(address);
        addInline(link, run, i + 1, middle, MAX_DEPTH);
        home.append(link);
        plain = next = close + 1;
      }
    } else if (char === "h" && text.startsWith("http", i) && depth < MAX_DEPTH) {
      const address = URL_AT.exec(text.slice(i, Math.min(end, i + MAX_LINK)))?.[0];
      if (address) {
        flush(i);
        const link = makeLink(address);
        run.append(link, i, i + address.length);
        home.append(link);
        plain = next = i + address.length;
      }
    } else if (char === "\n") {
      flush(i);
      home.append(make("br"));
      plain = next;
    }
    i = next;
  }
  flush(end);
}

const makeLink = (address) => make("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer" });

/** A code block with its language and a button that copies it. */
function makeCode(pieces, kinds, language) {
  const code = make("code");
  const run = new Run(pieces, kinds);
  run.append(code, 0, run.text.length);
  const copy = make("button", { type: "button", className: "quiet", "data-copy": "code", "aria-label": "Copy code" }, "Copy");
  return make("div", { className: "code", "data-language": language }, make("div", {}, make("span", {}, language || "code"), copy), make("pre", { tabIndex: 0 }, code));
}

/** Split lines, [text, place], into blocks: {from, to, build}, of lines from `from` to before `to`. */
function* splitBlocks(lines, kinds, depth) {
  const inline = (element, pieces) => {
    addInline(element, new Run(pieces, kinds));
    return element;
  };
  const nested = (element, inner) => {
    for (const { build } of splitBlocks(inner, kinds, depth + 1)) element.append(build());
    return element;
  };
  const startsBlock = (text) => FENCE.test(text) || HEADING.test(text) || RULE.test(text) || (depth < MAX_DEPTH && (text[0] === ">" || ITEM.test(text)));
  for (let i = 0; i < lines.length;) {
    const [text, at] = lines[i];
    const from = i;
    const fence = FENCE.exec(text);
    const heading = HEADING.exec(text);
    i += 1;
    if (!text.trim()) continue;
    if (fence) {
      const closes = (line) => line.trim().startsWith(fence[1]) && !line.trim().slice(fence[1].length).replaceAll(fence[1][0], "");
      while (i < lines.length && !closes(lines[i][0])) i += 1;
      const inner = lines.slice(from + 1, i);
      i = Math.min(i + 1, lines.length);
      yield { from, to: i, build: () => makeCode(inner, kinds, fence[2]) };
    } else if (heading) {
      // The page's own headings are of the levels 1 and 2.
      const level = Math.min(6, heading[1].length + 2);
      yield { from, to: i, build: () => inline(make(`h${level}`), [[heading[2], at + text.length - heading[2].length]]) };
    } else if (RULE.test(text)) {
      yield { from, to: i, build: () => make("hr") };
    } else if (text[0] === ">" && depth < MAX_DEPTH) {
      while (i < lines.length && lines[i][0][0] === ">") i += 1;
      const inner = lines.slice(from, i).map(([line, place]) => {
        const skip = line[1] === " " ? 2 : 1;
        return [line.slice(skip), place + skip];
      });
      yield { from, to: i, build: () => nested(make("blockquote"), inner) };
    } else if (ITEM.test(text) && depth < MAX_DEPTH) {
      const items = [];
      const [, { length: base }, mark] = ITEM.exec(text);
      const ordered = /\d/.test(mark);
      for (i = from; i < lines.length; i += 1) {
        const [line, place] = lines[i];
        const item = ITEM.exec(line);
        const indent = line.search(/\S|$/) - base;
        if (item && indent < 2) {
          if (/\d/.test(item[2]) !== ordered || RULE.test(line)) break;
          const skip = item[0].length;
          items.push([[line.slice(skip), place + skip]]);
        } else if (line.trim() && indent < 2 && (!lines[i - 1][0].trim() || startsBlock(line))) {
          break;
        } else {
          const skip = Math.min(line.search(/\S|$/), base + (ordered ? 3 : 2));
          items.at(-1).push([line.slice(skip), place + skip]);
        }
      }
      yield {
        from, to: i, build: () => {
          const list = ordered ? make("ol", { start: parseInt(text, 10) }) : make("ul");
          list.append(...items.map((inner) => nested(make("li"), inner)));
          return list;
        },
      };
    } else if (text.includes("|") && TABLE_RULE.test(lines[i]?.[0] ?? "")) {
      while (i < lines.length && lines[i][0].includes("|")) i += 1;
      const rows = [lines[from], ...lines.slice(from + 2, i)].map(splitCells);
      yield {
        from, to: i, build: () => {
          const [head, ...body] = rows.map((cells, index) => make("tr", {}, ...cells.map((cell) => inline(make(index ? "td" : "th"), [cell]))));
          return make("div", { className: "table" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
        },
      };
    } else {
      while (i < lines.length && lines[i][0].trim() && !startsBlock(lines[i][0])) i += 1;
      const pieces = lines.slice(from, i).map(([line, place]) => {
        const skip = line.search(/\S/);
        return [line.slice(skip).trimEnd(), place + skip];
      });
      yield { from, to: i, build: () => inline(make("p"), pieces) };
    }
  }
}

/** Split a row of a table into cells, [text, place]. */
function splitCells([line, at]) {
  const cells = [];
  let start = line.search(/[^ |]|$/);
  for (let i = start; i <= line.length; i += 1) {
    if ((i === line.length && line.slice(start).trim()) || (line[i] === "|" && line[i - 1] !== "\\")) {
      const cell = line.slice(start, i);
      cells.push([cell.trim(), at + start + Math.max(0, cell.search(/\S/))]);
      start = i + 1;
    }
  }
  return cells;
}

/** Markdown that grows: only blocks that changed are built again. */
export class MarkdownView {
  constructor(home) {
    this.home = home;
    this.keys = [];
  }

  /** Show `source`. `kinds` has a letter for the origin of each character; `language`: all of it is code. */
  update(source, kinds, language = "") {
    let at = 0;
    const lines = source.split("\n").map((text) => {
      const line = [text, at];
      at += text.length + 1;
      return line;
    });
    const blocks = language ? [{ from: 0, to: lines.length, build: () => makeCode(lines, kinds, language) }] : splitBlocks(lines, kinds, 0);
    let index = 0;
    for (const { from, to, build } of blocks) {
      const [start, end] = [lines[from][1], to < lines.length ? lines[to][1] : source.length];
      const key = `${start} ${source.slice(start, end)}\0${kinds.slice(start, end)}`;
      if (this.keys[index] !== key) {
        this.keys[index] = key;
        const old = this.home.children[index];
        if (old) old.replaceWith(build());
        else this.home.append(build());
      }
      index += 1;
    }
    this.keys.length = index;
    while (this.home.children.length > index) this.home.lastChild.remove();
  }
}
