/** `<kept-view>`: what the model saw. Kept tokens are bright, dropped ones dim, with the numbers
 * beside them; of stage I, and of stage II at any token of the answer. Of a unit of several frames
 * the first one is drawn, under the times of all.
 */

import { keptAt } from "./api.js";
import { choice, h } from "./dom.js";
import { DROPPED, fates, HIDDEN, KEPT, numOf } from "./kept-bits.js";
import { paintTokens } from "./token-painting.js";
import { count, percent, timestamp } from "./units.js";

/** @typedef {import("./run.js").Run} Run */
/** @typedef {import("./types.js").KeptMask} KeptMask */
/** @typedef {import("./frame-images.js").FrameImages} FrameImages */

export class KeptView extends HTMLElement {
  /** @type {Run} */
  #run;
  /** @type {FrameImages} */
  #images;
  /** @type {KeptMask} */
  #mask;
  #stage = "stage1";
  #abort = new AbortController();
  #legend = h("p", { class: "legend", role: "status" });
  #grid = h("div", { class: "kept-grid" });
  #slider = h("input", { type: "range", min: 0, id: "token", oninput: () => this.#atToken() });
  #output = h("output", { for: "token" });
  #tokenRow = h(
    "p",
    { class: "token-row", hidden: true },
    h("label", { for: "token" }, "At token"),
    this.#slider,
    this.#output,
  );

  /** @param {Run} run with a receipt @param {FrameImages} images */
  show(run, images) {
    this.#run = run;
    this.#images = images;
    this.#stage = "stage1";
    const { kept_mask: mask, usage } = run.receipt;
    if (!mask) {
      this.replaceChildren(h("p", { class: "note" }, NO_MASK));
      return;
    }
    this.#mask = mask;
    this.#slider.max = String(usage.completion_tokens - 1);
    this.#slider.value = this.#slider.max;
    this.replaceChildren(
      choice(
        "Show",
        "kept-stage",
        [
          ["stage1", "Stage I: what the language model was given"],
          ["stage2", "Stage II: what a token attended to"],
        ],
        (stage) => this.#choose(stage),
      ),
      this.#tokenRow,
      this.#legend,
      this.#grid,
    );
    this.#choose("stage1");
  }

  /** @param {string} stage */
  #choose(stage) {
    this.#stage = stage;
    this.#tokenRow.hidden = stage === "stage1";
    if (stage === "stage1") this.#paint(this.#mask);
    else this.#atToken();
  }

  async #atToken() {
    const token = Number(this.#slider.value);
    this.#output.textContent = `${token + 1} of ${Number(this.#slider.max) + 1}${this.#words(token)}`;
    this.#abort.abort();
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    try {
      const mask = await keptAt(this.#run.jobId, token, signal);
      if (!signal.aborted) this.#paint(mask);
    } catch (error) {
      if (!signal.aborted) this.#legend.textContent = error.message;
    }
  }

  /** The piece of the answer that a token is in. @param {number} token */
  #words(token) {
    const event = this.#run.arrivals.events.findLast(({ index }) => index <= token);
    return event?.text.trim() ? `: “${event.text.trim()}”` : "";
  }

  /** @param {KeptMask} mask */
  #paint(mask) {
    const units = fates(mask, this.#stage);
    const all = { [KEPT]: 0, [HIDDEN]: 0, [DROPPED]: 0 };
    for (const unit of units) for (const fate of Object.keys(all)) all[fate] += numOf(unit, +fate);
    const isMissing = this.#stage === "stage2" && mask.stage2 === null;
    this.#legend.replaceChildren(
      ...(isMissing ? ["Stage II hid nothing from this token. "] : []),
      ...this.#counts(all, units.length * mask.tokens_per_unit),
    );
    this.#grid.replaceChildren(...units.map((unit, index) => this.#figure(unit, index, mask)));
  }

  /** @param {Object<number, number>} all @param {number} total */
  #counts(all, total) {
    const kept = this.#stage === "stage1" ? "kept" : "attended to";
    const names = { [KEPT]: kept, [HIDDEN]: "hidden by stage II", [DROPPED]: "dropped by stage I" };
    return [KEPT, HIDDEN, DROPPED]
      .filter((fate) => all[fate] || fate !== HIDDEN)
      .flatMap((fate) => [
        h("span", { class: `swatch fate-${fate}` }),
        `${count(all[fate])} ${names[fate]} (${percent(all[fate] / total)})  `,
      ]);
  }

  /** @param {Uint8Array} unit @param {number} index @param {KeptMask} mask */
  #figure(unit, index, mask) {
    const all = this.#run.receipt.frames.timestamps_s;
    const framesPerUnit = Math.ceil(all.length / mask.units);
    const first = index * framesPerUnit;
    const times = all.slice(first, first + framesPerUnit).map(timestamp);
    const share = `${count(numOf(unit, KEPT))} of ${count(unit.length)}`;
    const frames = times.length > 1 ? "frames" : "frame";
    const canvas = h("canvas", {
      role: "img",
      "aria-label": `${share} tokens kept of the ${frames} at ${times.join(" and ")}`,
    });
    this.#images.at(first).then(
      (image) => paintTokens(canvas, image, unit, mask),
      (error) => (this.#legend.textContent = error.message),
    );
    return h(
      "figure",
      { "data-kept": numOf(unit, KEPT) },
      canvas,
      h("figcaption", {}, h("span", {}, times.join(" – ")), h("span", {}, share)),
    );
  }
}

const NO_MASK =
  "This job's receipt does not say which tokens were kept. Ask with “Record which tokens the " +
  "model kept” to see them.";

customElements.define("kept-view", KeptView);
