/** `<stage-waterfall>`: where an answer's time went, stage after stage. */

import { h } from "./dom.js";
import { duration } from "./units.js";

/** @typedef {import("./types.js").Timings} Timings */

/** @type {[keyof Timings, string][]} In the order in which a job goes through them. */
const STAGES = [
  ["upload", "Upload"],
  ["read_frames", "Read frames"],
  ["queue", "Queue"],
  ["vision", "Vision tower"],
  ["compress", "Compress"],
  ["prefill", "Prefill"],
  ["decode", "Decode"],
];

export class StageWaterfall extends HTMLElement {
  /** @param {Timings} timings */
  show(timings) {
    const known = STAGES.reduce((sum, [name]) => sum + timings[name], 0);
    const total = Math.max(timings.total, known) || 1;
    let start = 0;
    const rows = STAGES.map(([name, label]) => {
      const row = rowOf(name, label, start / total, timings[name] / total, timings[name]);
      start += timings[name];
      return row;
    });
    const rest = Math.max(0, timings.total - known);
    rows.push(rowOf("rest", "All the rest", start / total, rest / total, rest));
    this.replaceChildren(
      h(
        "table",
        { class: "waterfall" },
        h("caption", {}, `First token after ${duration(timings.ttft)}, all after `, h("strong", {}, duration(timings.total))),
        h(
          "thead",
          { class: "for-screen-readers" },
          h("tr", {}, ...["Stage", "Share of the time", "Time"].map((name) => h("th", { scope: "col" }, name))),
        ),
        h("tbody", {}, ...rows),
      ),
    );
  }
}

/** @param {string} name @param {string} label @param {number} start @param {number} share
 * @param {number} seconds
 */
function rowOf(name, label, start, share, seconds) {
  const bar = h("span", { class: `bar stage-${name}` });
  bar.style.setProperty("margin-inline-start", `${100 * start}%`);
  bar.style.setProperty("inline-size", `${100 * share}%`);
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, label),
    h("td", { class: "track" }, bar),
    h("td", { class: "number" }, duration(seconds)),
  );
}

customElements.define("stage-waterfall", StageWaterfall);
