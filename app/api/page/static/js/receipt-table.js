/** `<receipt-table>`: what answers took, beside one another, or beside full tokens. */

import { h } from "./dom.js";
import { bytes, count, duration, flops, times } from "./units.js";

/** @typedef {import("./types.js").Receipt} Receipt */
/** @typedef {{label: string, receipt: Receipt}} Column */

/**
 * Each: name, value, how it is written, and what full tokens would take where the receipt says so.
 *
 * @type {[string, (r: Receipt) => number | null, (n: number) => string, ((r: Receipt) => number)?][]}
 */
const ROWS = [
  ["Time to first token", (r) => r.timings_s.ttft, duration],
  ["Time in all", (r) => r.timings_s.total, duration],
  ["Time per token", (r) => r.timings_s.per_output_token, duration],
  ["Tokens of the answer", (r) => r.usage.completion_tokens, count],
  ["Tokens of the prompt", (r) => r.usage.prompt_tokens, count],
  [
    "Visual tokens in the prompt",
    (r) => r.compression.visual_tokens_prefill, count, (r) => r.compression.visual_tokens_in,
  ],
  [
    "Visual tokens that a pruned layer attends to",
    (r) => r.compression.visual_tokens_decode, count, (r) => r.compression.visual_tokens_in,
  ],
  [
    "FLOPs",
    (r) => r.compression.flops.exact.actual, flops, (r) => r.compression.flops.exact.full,
  ],
  [
    "Keys and values in use",
    (r) => r.memory.kv_bytes, bytes, (r) => r.memory.kv_bytes_full_tokens,
  ],
];

export class ReceiptTable extends HTMLElement {
  /** @param {Column[]} columns one or two */
  show(columns) {
    const [first, second] = columns;
    const heads = second
      ? ["", first.label, second.label, `${second.label} against ${first.label}`]
      : ["", first.label, "With full tokens", "Against full"];
    const rows = second
      ? ROWS.map((row) => compared(row, first.receipt, second.receipt))
      : ROWS.map((row) => againstFull(row, first.receipt));
    this.replaceChildren(
      h(
        "div",
        { class: "scrolling", tabindex: 0, role: "region", "aria-label": "Receipt" },
        h(
          "table",
          { class: "receipt" },
          h("thead", {}, h("tr", {}, ...heads.map((name) => (name ? h("th", { scope: "col" }, name) : h("td"))))),
          h("tbody", {}, ...rows),
        ),
      ),
      h("p", { class: "note" }, ...columns.map(({ label, receipt }) => `${label}: ${receipt.model}, ${caches(receipt)}. `)),
      ...columns.flatMap(({ receipt }) => receipt.warnings).map((text) => h("p", { class: "note" }, text)),
    );
  }
}

/** @param {typeof ROWS[number]} row @param {Receipt} first @param {Receipt} second */
function compared([name, value, write], first, second) {
  const [a, b] = [value(first), value(second)];
  return tableRow(name, [written(a, write), written(b, write), a && b ? times(b, a) : "–"]);
}

/** @param {typeof ROWS[number]} row @param {Receipt} receipt */
function againstFull([name, value, write, full], receipt) {
  const number = value(receipt);
  const whole = full ? full(receipt) : null;
  return tableRow(name, [
    written(number, write), written(whole, write), whole && number ? times(number, whole) : "–",
  ]);
}

/** @param {number | null} value @param {(n: number) => string} write */
function written(value, write) {
  return value === null ? "–" : write(value);
}

/** @param {string} name @param {string[]} cells */
function tableRow(name, cells) {
  return h("tr", {}, h("th", { scope: "row" }, name), ...cells.map((cell) => h("td", {}, cell)));
}

/** What was there already, for it shortens the times. @param {Receipt} receipt */
function caches({ cache }) {
  if (!cache) return "no video";
  const found = Object.entries(cache).filter(([, use]) => use === "hit").map(([name]) => name);
  return found.length ? `found in caches: ${found.join(", ")}` : "nothing was in caches";
}

customElements.define("receipt-table", ReceiptTable);
