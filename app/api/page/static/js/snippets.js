/** The same question for a terminal and for programs. They read the key from the environment. */

/** @typedef {Object<string, unknown> & {video_id: string, question: string}} Fields */

/** @param {string} origin of the service @param {Fields} fields of `POST /v1/video/chat` */
export function asCurl(origin, fields) {
  const body = JSON.stringify(fields, null, 2).replaceAll("'", "'\\''");
  return [
    `curl -N ${origin}/v1/video/chat \\`,
    `  -H "Authorization: Bearer $DYCOKE_API_KEY" \\`,
    `  -H 'Content-Type: application/json' \\`,
    `  -d '${body}'`,
  ].join("\n");
}

/** @param {string} origin @param {Fields} fields */
export function asPython(origin, fields) {
  return `import os

import httpx

answer = httpx.post(
    "${origin}/v1/video/chat",
    headers={"Authorization": f"Bearer {os.environ.get('DYCOKE_API_KEY', 'none')}"},
    json=${python({ ...fields, stream: false }, 1)},
    timeout=600,
)
answer.raise_for_status()
print(answer.json()["text"], answer.json()["compression"])
`;
}

/** @param {string} origin @param {Fields} fields @param {string} model */
export function asOpenAI(origin, fields, model) {
  const content = [
    { type: "video_url", video_url: { url: fields.video_id, num_frames: fields.num_frames } },
    { type: "text", text: fields.question },
  ];
  const extra = { compression: fields.compression, kept_mask: fields.kept_mask };
  return `import os

from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=os.environ.get("DYCOKE_API_KEY", "none"))
answer = client.chat.completions.create(
    model=${python(model)},
    messages=${python([{ role: "user", content }], 1)},
    max_completion_tokens=${python(fields.max_tokens)},
    temperature=${python(fields.temperature)},
    extra_body=${python(extra, 1)},
)
print(answer.choices[0].message.content, answer.model_extra["dycoke"]["compression"])
`;
}

/** A value as Python writes it. @param {unknown} value @param {number} [depth] */
function python(value, depth = 0) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null || value === undefined) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const items = isList
    ? value.map((item) => python(item, depth + 1))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item, depth + 1)}`);
  const [open, close] = isList ? "[]" : "{}";
  if (items.join(", ").length < 60 && !items.some((item) => item.includes("\n"))) {
    return `${open}${items.join(", ")}${close}`;
  }
  const indent = "    ".repeat(depth + 1);
  return `${open}\n${items.map((item) => `${indent}${item},\n`).join("")}${"    ".repeat(depth)}${close}`;
}
