/** The frames that the model saw in a job, each fetched once for all who draw it. */

import { mediaLinks, request } from "./api.js";

export class FrameImages {
  /** @type {Promise<string[]>} */
  #links;
  /** @type {Map<number, Promise<HTMLImageElement>>} */
  #images = new Map();
  /** @type {string[]} */
  #urls = [];

  /** @param {string} videoId @param {string} jobId */
  constructor(videoId, jobId) {
    this.#links = mediaLinks(videoId, jobId).then((links) => links.frames);
    this.#links.catch(() => {}); // whoever asks for a frame is told
  }

  /** @param {number} index @returns {Promise<HTMLImageElement>} rejects with an ApiError */
  at(index) {
    let image = this.#images.get(index);
    if (!image) {
      this.#images.set(index, (image = this.#load(index)));
      image.catch(() => this.#images.delete(index)); // the next one to ask tries again
    }
    return image;
  }

  /** Frees the pixels. */
  close() {
    this.#urls.forEach((url) => URL.revokeObjectURL(url));
  }

  /** @param {number} index */
  async #load(index) {
    const links = await this.#links;
    const url = URL.createObjectURL(await (await request(links[index])).blob());
    this.#urls.push(url);
    const image = new Image();
    image.src = url;
    await image.decode();
    return image;
  }
}
