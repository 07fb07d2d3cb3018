/** Requests to the service, with the key if there is one, and its refusals as `ApiError`s. */

import { storedKey } from "./key.js";
import { readEvents } from "./sse.js";

/** @typedef {import("./types.js").Video} Video */
/** @typedef {import("./types.js").KeptMask} KeptMask */

export class ApiError extends Error {
  /** @param {number} status 0: there was no answer @param {string} code @param {string} detail */
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

/**
 * @param {string} path
 * @param {RequestInit} [init]
 * @returns {Promise<Response>}
 */
export async function request(path, init = {}) {
  const headers = new Headers(init.headers);
  const key = storedKey();
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...init, headers, credentials: "omit" });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ApiError(0, "no_connection", "The service does not answer.");
  }
  if (!response.ok) throw refusal(response.status, await response.text());
  return response;
}

/** @param {string} path @param {AbortSignal} [signal] @returns {Promise<any>} */
export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

/**
 * Uploads a clip. `fetch` cannot tell how far it is, so this is an XMLHttpRequest.
 *
 * @param {Blob} file
 * @param {(share: number) => void} onprogress told 0 to 1
 * @returns {Promise<Video>}
 */
export function uploadVideo(file, onprogress) {
  return new Promise((resolve, reject) => {
    const upload = new XMLHttpRequest();
    upload.open("POST", "/v1/videos");
    const key = storedKey();
    if (key) upload.setRequestHeader("Authorization", `Bearer ${key}`);
    upload.upload.onprogress = (event) => onprogress(event.loaded / event.total);
    upload.onerror = () => reject(new ApiError(0, "no_connection", "The upload was interrupted."));
    upload.onload = () => {
      if (upload.status < 300) resolve(JSON.parse(upload.responseText));
      else reject(refusal(upload.status, upload.responseText));
    };
    const form = new FormData();
    form.append("video", file);
    upload.send(form);
  });
}

/**
 * Posts a question, and yields its job's events as they come.
 *
 * @param {object} fields of `POST /v1/video/chat`
 * @param {AbortSignal} signal
 */
export async function* ask(fields, signal) {
  const response = await request("/v1/video/chat", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(fields),
    signal,
  });
  yield* readEvents(response);
}

/**
 * Yields a job's events that come after one of them; all of them without an id.
 *
 * @param {string} jobId
 * @param {string | null} lastEventId
 * @param {AbortSignal} signal
 */
export async function* follow(jobId, lastEventId, signal) {
  const headers = lastEventId === null ? {} : { "Last-Event-ID": lastEventId };
  const response = await request(`/v1/jobs/${encodeURIComponent(jobId)}/events`, {
    headers, signal,
  });
  if (response.status !== 204) yield* readEvents(response);
}

/** @param {string} jobId */
export async function cancel(jobId) {
  await request(`/v1/jobs/${encodeURIComponent(jobId)}`, { method: "DELETE" });
}

/**
 * Which tokens a job had kept when it made one of its answer's tokens.
 *
 * @param {string} jobId @param {number} token @param {AbortSignal} signal
 * @returns {Promise<KeptMask>}
 */
export function keptAt(jobId, token, signal) {
  return getJson(`/v1/jobs/${encodeURIComponent(jobId)}/kept?token=${token}`, signal);
}

/**
 * Paths that need no header, of a video and of the frames that the model saw in a job.
 *
 * @param {string} videoId @param {string} [jobId]
 * @returns {Promise<{content: string, frames: string[]}>}
 */
export function mediaLinks(videoId, jobId) {
  const query = jobId === undefined ? "" : `?job_id=${encodeURIComponent(jobId)}`;
  return getJson(`/v1/videos/${encodeURIComponent(videoId)}/links${query}`);
}

/** @param {number} status @param {string} body */
function refusal(status, body) {
  try {
    const problem = JSON.parse(body);
    const { error = problem } = problem; // some paths answer in OpenAI's form
    return new ApiError(status, error.code, error.detail ?? error.message);
  } catch {
    return new ApiError(status, "unknown", `The service answered with status ${status}.`);
  }
}
