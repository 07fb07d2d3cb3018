/** Elements out of plain values. Text becomes text nodes: nothing here can make markup. */

/**
 * @param {string} tag
 * @param {Object<string, unknown>} [properties] attributes; functions are listeners (`onclick`);
 *   `true` is an empty attribute, `false`, `null` and `undefined` none.
 * @param {...(Node | string | number | null)} children
 * @returns {HTMLElement}
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child !== null).map(asNode));
  return element;
}

/** A group of radio buttons that looks like one control.
 *
 * @param {string} legend
 * @param {string} name unique on the page
 * @param {[value: string, label: string][]} options the first one is chosen
 * @param {(value: string) => void} onchoose
 */
export function choice(legend, name, options, onchoose) {
  const buttons = options.map(([value, label], index) =>
    h(
      "label",
      {},
      h("input", {
        type: "radio", name, value, checked: index === 0, onchange: () => onchoose(value),
      }),
      h("span", {}, label),
    ),
  );
  return h("fieldset", { class: "choice" }, h("legend", {}, legend), ...buttons);
}

/** @param {Node | string | number} child */
function asNode(child) {
  return child instanceof Node ? child : document.createTextNode(String(child));
}
