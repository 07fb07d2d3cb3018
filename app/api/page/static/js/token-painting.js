/** A frame on a canvas, its tokens as bright as what became of them. */

import { HIDDEN, KEPT } from "./kept-bits.js";

const BRIGHTNESS = { [KEPT]: 1, [HIDDEN]: 0.45 };
const DROPPED_BRIGHTNESS = 0.14;
const MIN_SIZE = 96; // pixels: the bundled model's frames are small

/**
 * @param {HTMLCanvasElement} canvas
 * @param {HTMLImageElement} image
 * @param {Uint8Array} fates of the unit's tokens, row by row
 * @param {{rows: number, columns: number}} grid
 */
export function paintTokens(canvas, image, fates, { rows, columns }) {
  const scale = Math.max(1, Math.ceil(MIN_SIZE / image.naturalWidth));
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.fillStyle = "black";
  context.fillRect(0, 0, width, height);
  fates.forEach((fate, token) => {
    const [row, column] = [Math.floor(token / columns), token % columns];
    const [left, right] = [column, column + 1].map((x) => Math.round((x * width) / columns));
    const [top, bottom] = [row, row + 1].map((y) => Math.round((y * height) / rows));
    context.globalAlpha = BRIGHTNESS[fate] ?? DROPPED_BRIGHTNESS;
    context.drawImage(
      image,
      left / scale, top / scale, (right - left) / scale, (bottom - top) / scale,
      left, top, right - left, bottom - top,
    );
  });
}
