/** Which words two answers share: a longest common subsequence. */

const MAX_CELLS = 4_000_000;

/** @typedef {{kind: "same" | "removed" | "added", text: string}} Piece */

/**
 * @param {string} before
 * @param {string} after
 * @returns {Piece[] | null} null: the texts are too long to compare
 */
export function wordDiff(before, after) {
  const [a, b] = [words(before), words(after)];
  if (a.length * b.length > MAX_CELLS) return null;
  const lengths = commonLengths(a, b);
  /** @type {Piece[]} */
  const pieces = [];
  for (let i = 0, j = 0; i < a.length || j < b.length; ) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      put(pieces, "same", b[j]);
      i += 1;
      j += 1;
    } else if (j >= b.length || (i < a.length && lengths[i + 1][j] >= lengths[i][j + 1])) {
      put(pieces, "removed", a[i]);
      i += 1;
    } else {
      put(pieces, "added", b[j]);
      j += 1;
    }
  }
  return pieces;
}

/** @param {string} text */
function words(text) {
  return text.trim().split(/\s+/).filter(Boolean);
}

/** `[i][j]`: how many words `a` from i on and `b` from j on have in common.
 * @param {string[]} a @param {string[]} b
 */
function commonLengths(a, b) {
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      lengths[i][j] = a[i] === b[j]
        ? lengths[i + 1][j + 1] + 1
        : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  return lengths;
}

/** @param {Piece[]} pieces @param {Piece["kind"]} kind @param {string} word */
function put(pieces, kind, word) {
  const last = pieces.at(-1);
  if (last?.kind === kind) last.text += ` ${word}`;
  else pieces.push({ kind, text: word });
}
