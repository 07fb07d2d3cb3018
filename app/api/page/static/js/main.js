/** Puts the parts of the page together: a clip, a question, its runs, what came of them. */

import { ApiError, getJson } from "./api.js";
import { h } from "./dom.js";
import { storedKey } from "./key.js";
import { jobsInAddress, putInAddress } from "./permalink.js";
import { Results } from "./results.js";
import { Run } from "./run.js";
import { RunAnswer } from "./run-answer.js";
import "./ask-form.js";
import "./clip-picker.js";
import "./frame-player.js";
import "./key-form.js";

/** @typedef {import("./results.js").Shown} Shown */

const LABELS = ["A", "B"];

/** @param {string} selector @returns {any} */
const find = (selector) => document.querySelector(selector);
const [form, keyForm, player, answers] = ["ask-form", "key-form", "frame-player", "#answers"].map(find);
const results = new Results(find("#results"), player);
/** @type {string | null} */
let videoId = null;

find("clip-picker").addEventListener("video", ({ detail }) => takeVideo(detail.video_id));
form.addEventListener("ask", ({ detail }) => askAll(detail));
keyForm.addEventListener("key", () => location.reload());
addEventListener("hashchange", () => openJobs(jobsInAddress()));
start();

async function start() {
  try {
    const { needs_key: needsKey } = await getJson("/page/access.json");
    find("#to-docs").hidden = needsKey; // a link carries no key
    if (needsKey && !storedKey()) {
      keyForm.ask("This service asks for an API key.");
      return;
    }
    const models = await getJson("/v1/models");
    keyForm.hide();
    const ids = models.data.map(({ id }) => id);
    find("#model").textContent = ids.join(", ") || "no worker is up";
    form.offer(models.compression, ids);
    find("main").hidden = false;
    await openJobs(jobsInAddress());
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) keyForm.ask(error.message);
    else find("#model").textContent = error.message;
  }
}

/** @param {string} id */
function takeVideo(id) {
  videoId = id;
  player.show(id);
  form.isReady = true;
}

/** Asks under one setting after the other: beside one another they would slow each other down. */
async function askAll({ question, settings, options }) {
  form.isReady = false;
  clear();
  /** @type {Shown[]} */
  const shown = settings.map(({ compression, description }, index) => {
    const fields = { video_id: videoId, question, compression, ...options };
    return { label: LABELS[index], run: new Run(question, description), fields };
  });
  for (const one of shown) {
    showAnswer(one);
    one.run.addEventListener("change", () => showInAddress(shown));
    await ended(one.run, () => one.run.post({ ...one.fields, on_disconnect: "continue" }));
  }
  form.isReady = true;
  showResults(shown);
}

/** Shows jobs that were posted elsewhere, or before this page was loaded. @param {string[]} ids */
async function openJobs(ids) {
  if (!ids.length) return;
  clear();
  const opened = await Promise.all(ids.map((id, index) => openJob(id, LABELS[index])));
  showResults(opened.filter((one) => one !== null));
}

/** @param {string} id @param {string} label @returns {Promise<Shown | null>} */
async function openJob(id, label) {
  try {
    const job = await getJson(`/v1/jobs/${encodeURIComponent(id)}`);
    const run = new Run(job.question, "");
    const shown = { label, run, fields: null };
    if (job.video_id) takeVideo(job.video_id);
    showAnswer(shown);
    await ended(run, () => run.open(id));
    return shown;
  } catch (error) {
    answers.append(h("p", { class: "note" }, `Job ${id}: ${error.message}`));
    return null;
  }
}

function clear() {
  results.clear();
  answers.replaceChildren();
  find("#question-asked").textContent = "";
}

/** @param {Shown} shown */
function showAnswer({ label, run }) {
  find("#question-asked").textContent = run.question;
  answers.append(RunAnswer.of(run, label));
}

/** Waits until a run has a receipt or an error, however often its connection is lost.
 * @param {Run} run @param {() => Promise<void>} begin
 */
async function ended(run, begin) {
  const over = new Promise((resolve) => {
    run.addEventListener("change", () => run.isOver && resolve(undefined));
  });
  await begin();
  await over;
}

/** So that the page can be left and opened again while a job runs. @param {Shown[]} shown */
function showInAddress(shown) {
  const jobIds = shown.map(({ run }) => run.jobId).filter((id) => id !== null);
  if (jobIds.length && jobIds.join() !== jobsInAddress().join()) putInAddress(jobIds);
}

/** @param {Shown[]} shown */
function showResults(shown) {
  const whole = shown.filter(({ run }) => run.receipt);
  if (whole.length) results.show(whole);
}
