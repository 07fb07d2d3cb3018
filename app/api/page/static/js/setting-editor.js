/** `<setting-editor label="A">`: one way to compress. A parameter left empty is the server's. */

import { h } from "./dom.js";

/** @typedef {import("./types.js").Policies} Policies */

const HINTS = {
  k: "share of the prunable tokens that stage I drops, 0 to 1",
  l: "first layer that stage II prunes",
  p: "share of the visual tokens that stage II hides, 0 to 1",
  window: "units (frames, or pairs of them) per window of stage I",
  threshold: "cosine at and above which a selection is kept, -1 to 1",
  variant: "paper or released",
  seed: "of what is chosen at random",
  objective_s: "seconds to the first token that auto is to meet",
  at_least: "share of the visual tokens that auto keeps at least, 0 to 1",
  retained_ratio: "share of all visual tokens that stay, 0 to 1",
};

export class SettingEditor extends HTMLElement {
  /** @type {Policies | null} */
  #policies = null;
  #select = h("select", { onchange: () => this.#showParameters() });
  #parameters = h("div", { class: "parameters" });

  connectedCallback() {
    this.append(
      h("label", { class: "field" }, `Compression ${this.getAttribute("label")}`, this.#select),
      this.#parameters,
    );
  }

  /** @param {Policies} policies @param {string} policy which one is chosen at first */
  offer(policies, policy) {
    this.#policies = policies;
    this.#select.replaceChildren(
      ...Object.keys(policies.policies).map((name) =>
        h("option", { value: name, selected: name === policy }, name),
      ),
    );
    this.#showParameters();
  }

  /** As a request has it. @returns {{policy: string} & Object<string, unknown>} */
  get value() {
    const given = [...this.#parameters.querySelectorAll("input")]
      .filter((input) => input.value.trim())
      .map((input) => [input.name, input.name === "variant" ? input.value : Number(input.value)]);
    return { policy: this.#select.value, ...Object.fromEntries(given) };
  }

  /** For people. */
  get description() {
    const { policy, ...parameters } = this.value;
    const list = Object.entries(parameters).map(([name, value]) => `${name} = ${value}`);
    return [policy, ...list].join(", ");
  }

  #showParameters() {
    const defaults = this.#policies.default;
    const isDefault = defaults.policy === this.#select.value;
    this.#parameters.replaceChildren(
      ...this.#policies.policies[this.#select.value].map((name) =>
        h("label", { class: "field", title: HINTS[name] ?? null }, name, h("input", {
          name,
          type: name === "variant" ? "text" : "number",
          step: "any",
          placeholder: isDefault ? String(defaults[name] ?? "default") : "default",
        })),
      ),
    );
  }
}

customElements.define("setting-editor", SettingEditor);
