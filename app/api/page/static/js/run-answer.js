/** `<run-answer>`: one job as it goes: its stages, its answer, its connection. */

import { h } from "./dom.js";
import { Sentences } from "./sentences.js";
import { count, duration, percent } from "./units.js";

/** @typedef {import("./run.js").Run} Run */

const STAGES = [
  ["queued", "Queue"],
  ["reading_frames", "Frames"],
  ["encoding", "Encode"],
  ["prefilling", "Prefill"],
  ["answering", "Answer"],
];

export class RunAnswer extends HTMLElement {
  /** @type {Run} */
  #run;
  #sentences = new Sentences();
  #stages = STAGES.map(([name, label]) => h("li", { "data-stage": name }, label));
  #progress = h("progress", { max: 1, value: 0, "aria-label": "Progress of this stage" });
  #setting = h("span");
  #state = h("p", { class: "status" });
  #text = h("p", { class: "answer", "data-part": "answer" });
  #log = h("div", { role: "log", class: "for-screen-readers", "aria-label": "The answer" });
  #arrivals = h("p", { class: "note", "data-part": "arrivals" });
  #cancel = h("button", { type: "button", onclick: () => this.#cancelRun() }, "Cancel");
  #lose = h(
    "button",
    { type: "button", onclick: () => this.#run.loseConnection() },
    "Lose the connection",
  );
  #resume = h("button", { type: "button", onclick: () => this.#run.resume() }, "Resume");

  /** @param {Run} run @param {string} label */
  static of(run, label) {
    const element = /** @type {RunAnswer} */ (document.createElement("run-answer"));
    element.#run = run;
    element.append(
      h("h3", {}, h("span", { class: "tag" }, label), " ", element.#setting),
      h("ol", { class: "stages", "aria-label": "Stages" }, ...element.#stages),
      element.#progress,
      element.#state,
      element.#text,
      element.#log,
      element.#arrivals,
      h("p", { class: "actions" }, element.#cancel, element.#lose, element.#resume),
    );
    run.addEventListener("token", (event) => element.#say(event.detail.text));
    run.addEventListener("change", () => element.#show());
    element.#show();
    return element;
  }

  /** @param {string} text */
  #say(text) {
    this.#text.append(text);
    this.#announce(this.#sentences.add(text));
  }

  /** @param {string[]} sentences */
  #announce(sentences) {
    this.#log.append(...sentences.map((sentence) => h("p", {}, sentence)));
  }

  #show() {
    const run = this.#run;
    if (run.isOver) this.#announce(this.#sentences.flush());
    this.#setting.textContent = run.setting;
    this.dataset.connection = run.connection;
    this.dataset.outcome = run.receipt ? "done" : run.error ? "error" : "";
    const stage = this.#stage();
    const current = STAGES.findIndex(([name]) => name === stage);
    this.#stages.forEach((item, index) => {
      item.classList.toggle("is-done", run.receipt !== null || index < current);
      item.setAttribute("aria-current", !run.isOver && index === current ? "step" : "false");
    });
    this.#progress.hidden = run.isOver || stage === "answering" || stage === "queued";
    this.#progress.setAttribute("value", String(run.status?.progress ?? 0));
    this.#state.textContent = this.#summary(stage);
    this.#state.classList.toggle("is-error", run.error !== null);
    this.#arrivals.textContent = this.#books();
    this.#cancel.hidden = run.isOver || run.jobId === null;
    this.#lose.hidden = run.connection !== "open";
    this.#resume.hidden = run.connection !== "lost";
  }

  #stage() {
    return this.#run.arrivals.events.length ? "answering" : this.#run.status?.stage ?? "queued";
  }

  /** @param {string} stage */
  #summary(stage) {
    const { receipt, error, connection, status } = this.#run;
    if (receipt) return summaryOf(receipt);
    if (error) return `${error.message} (${error.code})`;
    if (connection === "lost") return "The connection is lost. The job continues without it.";
    if (stage === "queued") return placeInQueue(status?.position ?? null);
    if (stage === "answering") return "Answering …";
    const names = { reading_frames: "Reading frames", encoding: "Encoding", prefilling: "Prefilling" };
    return `${names[stage]}: ${percent(status?.progress ?? 0)}`;
  }

  /** What has arrived, and whether it is all. */
  #books() {
    const { arrivals, receipt, numReconnections, connection } = this.#run;
    if (!arrivals.numTokens && !receipt) return "";
    const tokens = `${count(arrivals.numTokens)} ${arrivals.numTokens === 1 ? "token" : "tokens"}`;
    if (connection === "lost") return `${tokens} had arrived by then.`;
    if (!receipt) return tokens;
    const connections = numReconnections ? ` over ${numReconnections + 1} connections` : "";
    return arrivals.areWhole(receipt)
      ? `${tokens} arrived${connections}, each once and in order.`
      : `${tokens} arrived${connections}: ${arrivals.numMissing} missing, ${arrivals.numRepeated} repeated.`;
  }

  async #cancelRun() {
    try {
      await this.#run.cancel();
      if (this.#run.connection === "lost") await this.#run.resume();
    } catch (error) {
      this.#state.textContent = error.message;
    }
  }
}

/** @param {number | null} position */
function placeInQueue(position) {
  if (position === null) return "Waiting …";
  if (position === 0) return "In the queue: next";
  return `In the queue: ${count(position)} before this one`;
}

/** @param {import("./types.js").Receipt} receipt */
function summaryOf({ timings_s, usage, compression }) {
  const share = compression.retained_ratio;
  return [
    `First token after ${duration(timings_s.ttft)}`,
    `${count(usage.completion_tokens)} tokens in ${duration(timings_s.total)}`,
    ...(share ? [`${percent(share.prefill)} of the visual tokens kept`] : []),
  ].join(" · ");
}

customElements.define("run-answer", RunAnswer);
