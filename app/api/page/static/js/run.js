/**
 * One job, followed from its post to its receipt over as many connections as that takes.
 *
 * Every durable event carries an id. When a connection ends before the receipt, the next one sends
 * the last id that arrived and gets what comes after it. `Arrivals` keeps the books: which token
 * was due, and whether any was missing or came twice.
 */

import { ApiError, ask, cancel, follow } from "./api.js";

/** @typedef {import("./types.js").Receipt} Receipt */
/** @typedef {import("./types.js").TokenEvent} TokenEvent */
/** @typedef {"connecting" | "open" | "lost" | "ended"} Connection */

const MAX_RECONNECTIONS = 6; // one after the other, without an event between them
const RECONNECT_AFTER_MS = 500;

/** Which tokens have arrived. */
export class Arrivals {
  /** @type {TokenEvent[]} */
  events = [];
  text = "";
  numTokens = 0;
  numMissing = 0;
  numRepeated = 0;
  #nextIndex = 0;

  /** @param {TokenEvent} event */
  add(event) {
    this.numMissing += Math.max(0, event.index - this.#nextIndex);
    this.numRepeated += Math.max(0, this.#nextIndex - event.index);
    this.#nextIndex = event.index + Math.max(1, event.token_ids.length);
    this.numTokens += event.token_ids.length;
    this.text += event.text;
    this.events.push(event);
  }

  /** Whether every token came once, in order, and together they are the receipt's text.
   * @param {Receipt} receipt
   */
  areWhole(receipt) {
    return !this.numMissing && !this.numRepeated && this.text === receipt.text;
  }
}

/** Dispatches `change` whenever anything below is another; `token` with the event as detail. */
export class Run extends EventTarget {
  /** @type {string | null} */
  jobId = null;
  /** @type {string | null} */
  videoId = null;
  /** @type {Connection} */
  connection = "connecting";
  /** @type {import("./types.js").StatusEvent | null} */
  status = null;
  /** @type {Receipt | null} */
  receipt = null;
  /** @type {{code: string, message: string} | null} */
  error = null;
  arrivals = new Arrivals();
  numReconnections = 0;
  /** @type {string | null} */
  #lastEventId = null;
  #numFailures = 0;
  #abort = new AbortController();

  /** @param {string} question @param {string} setting for people; empty: as the job says */
  constructor(question, setting) {
    super();
    this.question = question;
    this.setting = setting;
  }

  /** Posts the question. Resolves when there is a receipt or an error, or the connection is lost.
   * @param {object} fields of `POST /v1/video/chat`
   */
  async post(fields) {
    await this.#read(() => ask(fields, this.#abort.signal));
  }

  /** Reads a job that was posted elsewhere, from its start. @param {string} jobId */
  async open(jobId) {
    this.jobId = jobId;
    await this.#reconnect();
  }

  /** Reads on where the lost connection left the job. */
  async resume() {
    this.#numFailures = 0;
    this.numReconnections += 1;
    await this.#reconnect();
  }

  /** Cuts the connection, as a tunnel or a closed lid would. The job does not notice. */
  loseConnection() {
    this.#abort.abort();
  }

  async cancel() {
    if (this.jobId) await cancel(this.jobId);
  }

  get isOver() {
    return this.receipt !== null || this.error !== null;
  }

  async #reconnect() {
    this.#abort = new AbortController();
    this.connection = "connecting";
    this.#changed();
    await this.#read(() => follow(this.jobId, this.#lastEventId, this.#abort.signal));
  }

  /** @param {() => AsyncGenerator<import("./sse.js").ServerEvent>} connect */
  async #read(connect) {
    const { signal } = this.#abort;
    try {
      for await (const event of connect()) {
        if (signal.aborted) break; // what was under way when the connection was cut never arrived
        this.connection = "open";
        this.#numFailures = 0;
        this.#take(event);
      }
    } catch (error) {
      if (!signal.aborted && !this.#isPassing(error)) {
        this.#fail(error instanceof ApiError ? error : new ApiError(0, "page_error", `${error}`));
        return;
      }
    }
    await this.#goOn(signal);
  }

  /** What follows a connection's end. @param {AbortSignal} signal */
  async #goOn(signal) {
    if (this.isOver) {
      this.connection = "ended";
    } else if (signal.aborted || this.#numFailures >= MAX_RECONNECTIONS) {
      this.connection = "lost";
    } else {
      this.#numFailures += 1;
      this.numReconnections += 1;
      await new Promise((wake) => setTimeout(wake, RECONNECT_AFTER_MS * this.#numFailures));
      if (!signal.aborted) {
        await this.#reconnect();
        return;
      }
      this.connection = "lost";
    }
    this.#changed();
  }

  /** @param {import("./sse.js").ServerEvent} event */
  #take({ type, id, data }) {
    if (id !== null) this.#lastEventId = id;
    if (type === "job") {
      [this.jobId, this.videoId] = [data.job_id, data.video_id];
      this.setting ||= data.compression.policy;
    }
    if (type === "status") this.status = data;
    else if (type === "token") this.arrivals.add(data);
    else if (type === "done") this.receipt = data;
    else if (type === "error") this.error = data;
    if (type === "token") this.dispatchEvent(new CustomEvent("token", { detail: data }));
    this.#changed();
  }

  /** Whether a failed connection may work the next time. @param {unknown} error */
  #isPassing(error) {
    const isRefusal = error instanceof ApiError && error.status !== 0 && error.status !== 503;
    return this.jobId !== null && !isRefusal;
  }

  /** @param {ApiError} error */
  #fail(error) {
    this.error = { code: error.code, message: error.message };
    this.connection = "ended";
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
