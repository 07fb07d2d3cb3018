/** `<clip-picker>`: a clip is chosen, dropped or taken from the service, and uploaded.
 *
 * Dispatches `video` with what the service says of it.
 */

import { request, uploadVideo } from "./api.js";
import { h } from "./dom.js";
import { bytes, timestamp } from "./units.js";

const SAMPLE = "/sample.mp4";

export class ClipPicker extends HTMLElement {
  #status = h("p", { class: "status", role: "status" });
  #progress = h("progress", { max: 1, "aria-label": "Upload", hidden: true });
  #input = h("input", {
    type: "file", accept: "video/*,.mkv,.ts", id: "clip-file", onchange: () => this.#chosen(),
  });
  #number = 0; // of uploads: only the last one counts

  connectedCallback() {
    this.append(
      h(
        "div",
        { class: "drop-zone" },
        h("label", { for: "clip-file", class: "button" }, "Choose a clip"),
        this.#input,
        h("button", { type: "button", onclick: () => this.#takeSample() }, "Use the sample clip"),
        h("span", {}, "or drop one here"),
      ),
      this.#progress,
      this.#status,
    );
    this.addEventListener("dragover", (event) => this.#over(event, true));
    this.addEventListener("dragleave", (event) => this.#over(event, false));
    this.addEventListener("drop", (event) => this.#dropped(event));
  }

  #chosen() {
    const [file] = /** @type {HTMLInputElement} */ (this.#input).files ?? [];
    if (file) this.upload(file, file.name);
  }

  /** @param {DragEvent} event @param {boolean} isOver */
  #over(event, isOver) {
    event.preventDefault();
    this.classList.toggle("is-over", isOver);
  }

  /** @param {DragEvent} event */
  #dropped(event) {
    this.#over(event, false);
    const [file] = event.dataTransfer?.files ?? [];
    if (file) this.upload(file, file.name);
  }

  async #takeSample() {
    try {
      await this.upload(await (await request(SAMPLE)).blob(), "the sample clip");
    } catch (error) {
      this.#say(error.message, true);
    }
  }

  /** @param {Blob} file @param {string} name */
  async upload(file, name) {
    const number = ++this.#number;
    this.#progress.hidden = false;
    this.#say(`Uploading ${name}, ${bytes(file.size)} …`);
    try {
      const video = await uploadVideo(file, (share) => {
        if (number === this.#number) this.#progress.setAttribute("value", String(share));
      });
      if (number !== this.#number) return;
      this.#say(describe(name, video));
      this.dispatchEvent(new CustomEvent("video", { detail: video }));
    } catch (error) {
      if (number === this.#number) this.#say(`${name}: ${error.message}`, true);
    } finally {
      if (number === this.#number) this.#progress.hidden = true;
    }
  }

  /** @param {string} text @param {boolean} [isError] */
  #say(text, isError = false) {
    this.#status.textContent = text;
    this.#status.classList.toggle("is-error", isError);
  }
}

/** @param {string} name @param {import("./types.js").Video} video */
function describe(name, { num_bytes, probe }) {
  const length = probe.duration_s === null ? "" : `, ${timestamp(probe.duration_s)}`;
  const size = `${probe.width} × ${probe.height}`;
  return `${name}: ${probe.codec}, ${size}${length}, ${bytes(num_bytes)}`;
}

customElements.define("clip-picker", ClipPicker);
