/** `<ask-form>`: a question, one or two settings, and how to sample.
 *
 * Dispatches `ask` with `{question, settings: [{compression, description}], options}`.
 */

import { h } from "./dom.js";
import "./setting-editor.js";

/** @typedef {import("./types.js").Policies} Policies */

export class AskForm extends HTMLElement {
  #question = h("textarea", { id: "question", rows: 2, required: true, maxlength: 32768 });
  #first = h("setting-editor", { label: "A" });
  #second = h("setting-editor", { label: "B", hidden: true });
  #isComparing = h("input", { type: "checkbox", id: "compare", onchange: () => this.#compare() });
  #isMarking = h("input", { type: "checkbox", checked: true });
  #numbers = {
    num_frames: h("input", { type: "number", min: 1, value: 32 }),
    max_tokens: h("input", { type: "number", min: 1, value: 256 }),
    temperature: h("input", { type: "number", min: 0, max: 2, step: "any", value: 0 }),
  };
  #model = h("select", { id: "asked-model" });
  #modelField = h("label", { class: "field", hidden: true }, "Model", this.#model);
  #submit = h("button", { type: "submit", class: "primary", disabled: true }, "Ask");

  connectedCallback() {
    this.#question.value = "What happens in the video?";
    this.append(
      h(
        "form",
        { onsubmit: (event) => this.#ask(event) },
        h("label", { for: "question", class: "field" }, "Question about the clip"),
        this.#question,
        this.#modelField,
        h(
          "div",
          { class: "settings" },
          this.#first,
          h("label", { class: "check" }, this.#isComparing, "Compare with a second setting"),
          this.#second,
        ),
        h(
          "details",
          {},
          h("summary", {}, "More settings"),
          h(
            "div",
            { class: "parameters" },
            ...Object.entries(this.#numbers).map(([name, input]) =>
              h("label", { class: "field" }, name.replace("_", " ").replace("num", "number of"), input),
            ),
          ),
          h("label", { class: "check" }, this.#isMarking, "Record which tokens the model kept"),
        ),
        h("p", { class: "actions" }, this.#submit),
      ),
    );
  }

  /** @param {Policies} policies @param {string[]} models */
  offer(policies, models) {
    this.#model.replaceChildren(...models.map((id) => h("option", { value: id }, id)));
    this.#modelField.hidden = models.length < 2;
    const chosen = String(policies.default.policy);
    this.#first.offer(policies, chosen);
    this.#second.offer(policies, chosen === "full" ? "dycoke" : "full");
  }

  /** Whether a question may be asked now. @param {boolean} isReady */
  set isReady(isReady) {
    this.#submit.toggleAttribute("disabled", !isReady);
  }

  #compare() {
    this.#second.hidden = !this.#isComparing.checked;
  }

  /** @param {SubmitEvent} event */
  #ask(event) {
    event.preventDefault();
    const editors = this.#isComparing.checked ? [this.#first, this.#second] : [this.#first];
    const settings = editors.map(({ value, description }) => ({ compression: value, description }));
    const options = Object.fromEntries(
      Object.entries(this.#numbers)
        .filter(([, input]) => input.value)
        .map(([name, input]) => [name, Number(input.value)]),
    );
    if (this.#isMarking.checked) options.kept_mask = true;
    if (this.#model.value) options.model = this.#model.value;
    const question = this.#question.value;
    this.dispatchEvent(new CustomEvent("ask", { detail: { question, settings, options } }));
  }
}

customElements.define("ask-form", AskForm);
