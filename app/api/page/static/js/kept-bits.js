/** A kept mask's bit sets: `units × tokens_per_unit` bits, unit by unit, highest bit first. */

/** @typedef {import("./types.js").KeptMask} KeptMask */

export const DROPPED = 0;
export const HIDDEN = 1; // kept by stage I, not attended to at this token
export const KEPT = 2;

/** @param {string} base64 @param {number} numBits @returns {Uint8Array} 0 or 1 for each bit */
export function bits(base64, numBits) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return Uint8Array.from({ length: numBits }, (_, i) => (bytes[i >> 3] >> (7 - (i & 7))) & 1);
}

/**
 * What became of every token.
 *
 * @param {KeptMask} mask
 * @param {"stage1" | "stage2"} stage
 * @returns {Uint8Array[]} for each unit, for each of its tokens: DROPPED, HIDDEN or KEPT
 */
export function fates(mask, stage) {
  const numBits = mask.units * mask.tokens_per_unit;
  const first = bits(mask.stage1, numBits);
  const second = stage === "stage2" && mask.stage2 !== null ? bits(mask.stage2, numBits) : first;
  const all = first.map((isKept, i) => (second[i] ? KEPT : isKept ? HIDDEN : DROPPED));
  return Array.from({ length: mask.units }, (_, unit) =>
    all.subarray(unit * mask.tokens_per_unit, (unit + 1) * mask.tokens_per_unit),
  );
}

/** @param {Uint8Array} fatesOfTokens @param {number} fate */
export function numOf(fatesOfTokens, fate) {
  return fatesOfTokens.reduce((sum, one) => sum + Number(one === fate), 0);
}
