/** `<frame-player>`: the clip, and below it the frames that the model saw, each a button. */

import { mediaLinks } from "./api.js";
import { h } from "./dom.js";
import { timestamp } from "./units.js";

/** @typedef {import("./frame-images.js").FrameImages} FrameImages */

const KEYS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

export class FramePlayer extends HTMLElement {
  #video = h("video", { controls: true, preload: "metadata", playsinline: true, muted: true });
  #note = h("p", { class: "note", role: "status" });
  #strip = h("div", { class: "strip", role: "group", onkeydown: (event) => this.#move(event) });
  #videoId = "";
  #linkedAt = 0;
  /** @type {number[]} */
  #times = [];

  connectedCallback() {
    this.hidden = true;
    this.#strip.hidden = true;
    this.#video.addEventListener("timeupdate", () => this.#mark());
    this.#video.addEventListener("error", () => this.#renewLink());
    this.append(this.#video, this.#strip, this.#note);
  }

  /** @param {string} videoId */
  async show(videoId) {
    if (videoId === this.#videoId) return;
    this.#videoId = videoId;
    this.#strip.hidden = true;
    this.hidden = false;
    await this.#link(0);
  }

  /** @param {number[]} times in seconds @param {FrameImages} images */
  showFrames(times, images) {
    this.#times = times;
    this.#strip.setAttribute("aria-label", `${times.length} frames that the model saw`);
    this.#strip.replaceChildren(...times.map((time, index) => this.#button(time, index)));
    this.#strip.hidden = false;
    this.#note.textContent = "";
    [...this.#strip.children].forEach(async (button, index) => {
      try {
        const { src } = await images.at(index);
        button.prepend(h("img", { src, alt: "" }));
      } catch (error) {
        this.#note.textContent = `The frames cannot be shown: ${error.message}`;
      }
    });
    this.#mark();
  }

  /** @param {number} time @param {number} index */
  #button(time, index) {
    return h(
      "button",
      {
        type: "button",
        tabindex: index === 0 ? 0 : -1,
        "aria-label": `Frame ${index + 1} of ${this.#times.length}, at ${timestamp(time)}`,
        onclick: () => this.#seek(index),
      },
      h("span", {}, timestamp(time)),
    );
  }

  /** @param {number} index */
  #seek(index) {
    this.#video.currentTime = this.#times[index];
    this.#focus(index);
    this.#mark();
  }

  /** @param {KeyboardEvent} event */
  #move(event) {
    const buttons = [...this.#strip.children];
    const from = buttons.indexOf(/** @type {Element} */ (document.activeElement));
    const last = buttons.length - 1;
    const to = { Home: 0, End: last }[event.key] ?? from + (KEYS[event.key] ?? NaN);
    if (!(to >= 0 && to <= last)) return;
    event.preventDefault();
    this.#seek(to);
  }

  /** @param {number} index */
  #focus(index) {
    const buttons = /** @type {HTMLElement[]} */ ([...this.#strip.children]);
    buttons.forEach((button, i) => (button.tabIndex = i === index ? 0 : -1));
    buttons[index].focus();
  }

  /** Marks the last frame that lies before the place where the clip is. */
  #mark() {
    const now = this.#video.currentTime + 0.001;
    const current = this.#times.findLastIndex((time) => time <= now);
    [...this.#strip.children].forEach((button, index) =>
      button.setAttribute("aria-current", String(index === current)),
    );
  }

  /** A link is good for ten minutes; a clip may be looked at for longer. */
  async #renewLink() {
    const isFresh = Date.now() - this.#linkedAt < 60_000;
    if (isFresh || !this.#videoId) {
      this.#note.textContent = "This browser cannot play the clip; the model's frames are shown.";
      return;
    }
    await this.#link(this.#video.currentTime);
  }

  /** @param {number} time where to go on, in seconds */
  async #link(time) {
    try {
      const { content } = await mediaLinks(this.#videoId);
      this.#linkedAt = Date.now();
      this.#video.src = content;
      this.#video.currentTime = time;
      this.#note.textContent = "";
    } catch (error) {
      this.#videoId = ""; // so that showing it again tries again
      this.#note.textContent = `The clip cannot be shown: ${error.message}`;
    }
  }
}

customElements.define("frame-player", FramePlayer);
