/** Numbers for people. */

const PREFIXES = ["", "k", "M", "G", "T", "P", "E"];

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 0.0095) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return `${seconds.toFixed(2)} s`;
}

/** Of a place in a video. @param {number} seconds */
export function timestamp(seconds) {
  const minutes = Math.floor(seconds / 60);
  const rest = (seconds - 60 * minutes).toFixed(2).padStart(5, "0");
  return `${minutes}:${rest}`;
}

/** @param {number} number */
export function bytes(number) {
  return scaled(number, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
}

/** @param {number} number */
export function flops(number) {
  return scaled(number, 1000, PREFIXES.map((prefix) => `${prefix}FLOP`));
}

/** @param {number} number */
export function count(number) {
  return number.toLocaleString("en");
}

/** @param {number} ratio */
export function percent(ratio) {
  return `${(100 * ratio).toFixed(ratio < 0.1 ? 1 : 0)} %`;
}

/** How many times as much as before. @param {number} value @param {number} before */
export function times(value, before) {
  return before ? `× ${(value / before).toFixed(2)}` : "–";
}

/** @param {number} number @param {number} base @param {string[]} names */
function scaled(number, base, names) {
  let power = 0;
  while (number >= base && power < names.length - 1) {
    number /= base;
    power += 1;
  }
  return `${power && number < 100 ? number.toFixed(1) : Math.round(number)} ${names[power]}`;
}
