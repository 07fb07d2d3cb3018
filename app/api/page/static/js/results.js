/** What is shown once answers are there: receipts, differences, stages, frames, kept tokens. */

import { choice } from "./dom.js";
import { FrameImages } from "./frame-images.js";
import "./answer-diff.js";
import "./copy-as.js";
import "./kept-view.js";
import "./receipt-table.js";
import "./stage-waterfall.js";

/** @typedef {import("./run.js").Run} Run */
/** @typedef {import("./frame-player.js").FramePlayer} FramePlayer */
/** @typedef {{label: string, run: Run, fields: object | null}} Shown */

export class Results {
  /** @type {FrameImages | null} */
  #images = null;

  /** @param {HTMLElement} root @param {FramePlayer} player */
  constructor(root, player) {
    this.root = root;
    this.player = player;
    this.clear();
  }

  clear() {
    this.root.hidden = true;
    this.#images?.close();
    this.#images = null;
  }

  /** @param {Shown[]} shown one or two, with receipts */
  show(shown) {
    this.clear();
    this.root.hidden = false;
    const columns = shown.map(({ label, run }) => ({ label, receipt: run.receipt }));
    this.#part("receipt-table").show(columns);
    const hasTwo = shown.length === 2;
    this.#section("answer-diff").hidden = !hasTwo;
    if (hasTwo) this.#part("answer-diff").show(...columns.map(({ receipt }) => receipt.text));
    this.root.querySelector("[data-part=which]").replaceChildren(
      ...(hasTwo ? [this.#whichOf(shown)] : []),
    );
    this.#showOne(shown[0]);
  }

  /** @param {Shown[]} shown */
  #whichOf(shown) {
    const options = shown.map(({ label, run }, i) => [String(i), `${label}: ${run.setting}`]);
    return choice("Details of", "which", options, (index) => this.#showOne(shown[index]));
  }

  /** @param {Shown} shown */
  #showOne({ run, fields }) {
    this.#part("stage-waterfall").show(run.receipt.timings_s);
    this.#part("copy-as").show(fields, run.receipt.model);
    const { frames } = run.receipt;
    this.#section("kept-view").hidden = frames === null;
    if (frames === null) return;
    this.#images?.close();
    this.#images = new FrameImages(run.videoId, run.jobId);
    this.player.show(run.videoId);
    this.player.showFrames(frames.timestamps_s, this.#images);
    this.#part("kept-view").show(run, this.#images);
  }

  /** @param {string} name @returns {any} */
  #part(name) {
    return this.root.querySelector(name);
  }

  /** @param {string} name */
  #section(name) {
    return this.#part(name).closest("section");
  }
}
