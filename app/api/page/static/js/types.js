/**
 * What the API sends, as far as the page reads it. Only types: nothing here runs.
 *
 * @typedef {{video_id: string, num_bytes: number, probe: Probe}} Video
 * @typedef {{container: string, codec: string, width: number, height: number,
 *   duration_s: number?, num_frames: number?, fps: number?}} Probe
 *
 * @typedef {{full: number, actual: number, ratio: number}} Flops
 * @typedef {{policy: string, parameters: Object<string, unknown>, visual_tokens_in: number,
 *   visual_tokens_prefill: number, visual_tokens_decode: number, kept_per_frame: number[],
 *   retained_ratio: {prefill: number, decode: number, decode_all_layers: number}?,
 *   decode_steps: number, refreshes: number, flops: {paper: Flops, exact: Flops}}} Compression
 * @typedef {{upload: number, read_frames: number, queue: number, vision: number, compress: number,
 *   prefill: number, ttft: number, decode: number, per_output_token: number?, total: number
 *   }} Timings  Seconds.
 * @typedef {{units: number, tokens_per_unit: number, rows: number, columns: number,
 *   stage1: string, stage2: string?}} KeptMask  Bit sets, base64; a unit is one frame or two.
 *
 * @typedef {{type: "done", job_id: string, model: string, video_id: string?,
 *   finish_reason: "stop" | "length", text: string,
 *   usage: {prompt_tokens: number, visual_tokens: number, completion_tokens: number},
 *   compression: Compression, frames: {indices: number[], timestamps_s: number[],
 *   reader: string, warnings: string[]}?, timings_s: Timings,
 *   memory: {kv_bytes: number, dp_cache_bytes: number, kv_bytes_full_tokens: number,
 *   peak_device_bytes: number}, cache: {frames: string, features: string, prefix: string}?,
 *   attempts: number, warnings: string[], kept_mask?: KeptMask?}} Receipt
 *
 * @typedef {{type: "job", job_id: string, video_id: string?, model: string,
 *   compression: Object<string, unknown>}} JobEvent
 * @typedef {{type: "status", stage: string, progress: number, position: number?}} StatusEvent
 * @typedef {{type: "token", index: number, text: string, token_ids: number[]}} TokenEvent
 * @typedef {{type: "error", code: string, message: string, retryable: boolean}} ErrorEvent
 *
 * @typedef {{default: Object<string, unknown>, policies: Object<string, string[]>}} Policies
 */

export {};
