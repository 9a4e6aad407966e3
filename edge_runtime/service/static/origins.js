// Where the words of one answer come from: collects its tokens from the events of the board.

/**
 * `text` is the verified text, with a letter for the origin of each character in `kinds`: (a)ccepted, (c)orrected,
 * (o)wn. `tail` is what the draft model wrote after it and no verifier has checked.
 */
export class Origins {
  constructor() {
    this.text = this.kinds = this.tail = "";
    this.counts = { accepted: 0, corrected: 0, own: 0, unverified: 0 };
    this.withdrawn = 0;
    // Where each token begins.
    this.starts = [];
    this.offset = 0;
  }

  /** Apply an event `tokens`. */
  add({ accepted = [], own = [], withdrawn = [], unverified = [] }) {
    for (const [letter, tokens] of [["a", accepted], ["o", own]]) {
      for (const token of tokens) {
        this.starts.push(this.text.length);
        this.text += token;
        this.kinds += letter.repeat(token.length);
      }
    }
    this.tail = unverified.join("");
    this.counts.accepted += accepted.length;
    this.counts.own += own.length;
    this.counts.unverified = unverified.length;
    this.withdrawn += withdrawn.length;
  }

  /** Apply an event `round`: its token `corrected` replaced one that this board drafted. */
  finishRound({ corrected }) {
    const start = this.starts[corrected];
    if (start === undefined) return;
    const end = this.starts[corrected + 1] ?? this.text.length;
    this.kinds = this.kinds.slice(0, start) + "c".repeat(end - start) + this.kinds.slice(end);
    this.counts.own -= 1;
    this.counts.corrected += 1;
  }

  /** The origin of each character of `content`, the part of the text that is the answer; empty if it is not found. */
  kindsOf(content) {
    const all = this.text + this.tail;
    const fits = (offset) => offset >= 0 && all.startsWith(content.slice(0, Math.max(0, all.length - offset)), offset);
    if (!fits(this.offset)) this.offset = all.indexOf(content.slice(0, 40));
    if (!fits(this.offset)) return "";
    return (this.kinds + "u".repeat(this.tail.length)).slice(this.offset, this.offset + content.length);
  }
}
