/** `<answer-diff>`: two answers as one text; what only one of them has is marked. */

import { h } from "./dom.js";
import { wordDiff } from "./word-diff.js";

const TAGS = { same: "span", removed: "del", added: "ins" };

export class AnswerDiff extends HTMLElement {
  /** @param {string} a @param {string} b */
  show(a, b) {
    const pieces = wordDiff(a, b);
    if (pieces === null) {
      this.replaceChildren(h("p", { class: "note" }, "The answers are too long to compare."));
      return;
    }
    if (pieces.every(({ kind }) => kind === "same")) {
      this.replaceChildren(h("p", {}, "Both answers are the same, word for word."));
      return;
    }
    this.replaceChildren(
      h("p", { class: "note" }, "Struck through: only in A. Underlined: only in B."),
      h("p", { class: "answer" }, ...pieces.flatMap(({ kind, text }) => [h(TAGS[kind], {}, text), " "])),
    );
  }
}

customElements.define("answer-diff", AnswerDiff);
