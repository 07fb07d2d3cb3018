/** `<copy-as>`: a question as curl, Python and openai-python, and a link to its job. */

import { choice, h } from "./dom.js";
import { asCurl, asOpenAI, asPython } from "./snippets.js";

export class CopyAs extends HTMLElement {
  #code = h("code");
  #copied = h("span", { role: "status" });
  /** @type {Object<string, string>} */
  #texts = {};

  /**
   * @param {import("./snippets.js").Fields | null} fields null: the page does not know them
   * @param {string} model
   */
  show(fields, model) {
    const link = this.#button("Copy a link to this page with its answer", () => location.href);
    if (!fields) {
      this.replaceChildren(h("p", { class: "actions" }, link, this.#copied));
      return;
    }
    const { origin } = location;
    this.#texts = {
      curl: asCurl(origin, fields),
      python: asPython(origin, fields),
      openai: asOpenAI(origin, fields, model),
    };
    this.replaceChildren(
      choice(
        "Copy as",
        "copy-as",
        [["curl", "curl"], ["python", "Python"], ["openai", "openai-python"]],
        (name) => (this.#code.textContent = this.#texts[name]),
      ),
      h("pre", { tabindex: 0 }, this.#code),
      h(
        "p",
        { class: "actions" },
        this.#button("Copy", () => this.#code.textContent ?? ""),
        link,
        this.#copied,
      ),
    );
    this.#code.textContent = this.#texts.curl;
  }

  /** @param {string} label @param {() => string} text */
  #button(label, text) {
    return h("button", { type: "button", onclick: () => this.#copy(text()) }, label);
  }

  /** @param {string} text */
  async #copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      this.#copied.textContent = "Copied.";
    } catch {
      // Over plain http a page may not write to the clipboard.
      getSelection()?.selectAllChildren(this.#code);
      this.#copied.textContent = "This browser does not let the page copy: press Ctrl+C.";
    }
  }
}

customElements.define("copy-as", CopyAs);
