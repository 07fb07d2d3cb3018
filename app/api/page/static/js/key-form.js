/** `<key-form>`: asks for an API key where the service wants one.
 *
 * Dispatches `key` when one is given, or forgotten. Whether it is good the service says.
 */

import { h } from "./dom.js";
import { forgetKey, storedKey, storeKey } from "./key.js";

export class KeyForm extends HTMLElement {
  #input = h("input", { type: "password", id: "key", autocomplete: "off", required: true });
  #note = h("p", { class: "status", role: "status" });
  #form = h(
    "form",
    { onsubmit: (event) => this.#give(event) },
    h("label", { for: "key", class: "field" }, "API key"),
    h("p", { class: "row" }, this.#input, h("button", { type: "submit", class: "primary" }, "Use it")),
    h("p", { class: "note" }, "It is kept for this tab, until you close it or let the page forget it."),
  );
  #forget = h("button", { type: "button", onclick: () => this.#forgetIt() }, "Forget the API key");

  connectedCallback() {
    this.append(this.#form, this.#note, this.#forget);
    this.hide();
  }

  /** @param {string} reason why it is asked for */
  ask(reason) {
    this.#form.hidden = false;
    this.#forget.hidden = true;
    this.#note.textContent = reason;
    this.#input.focus();
  }

  hide() {
    this.#form.hidden = true;
    this.#note.textContent = "";
    this.#forget.hidden = storedKey() === null;
  }

  /** @param {SubmitEvent} event */
  #give(event) {
    event.preventDefault();
    storeKey(this.#input.value.trim());
    this.#input.value = "";
    this.dispatchEvent(new Event("key"));
  }

  #forgetIt() {
    forgetKey();
    this.dispatchEvent(new Event("key"));
  }
}

customElements.define("key-form", KeyForm);
