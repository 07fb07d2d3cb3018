/** An answer cut into sentences as it grows, so that a screen reader is not given single words. */

export class Sentences {
  #rest = "";

  /** Returns the sentences that this piece of text completes. @param {string} text */
  add(text) {
    this.#rest += text;
    const whole = this.#rest.match(/[^]*?(?:[.!?]+(?=\s)|[。！？\n])\s*/g) ?? [];
    this.#rest = this.#rest.slice(whole.join("").length);
    return whole.map((sentence) => sentence.trim()).filter(Boolean);
  }

  /** What is left at the answer's end. */
  flush() {
    const last = this.#rest.trim();
    this.#rest = "";
    return last ? [last] : [];
  }
}
