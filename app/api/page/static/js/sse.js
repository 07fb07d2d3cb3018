/** Server-sent events out of a `fetch`, which unlike `EventSource` can send headers. */

/** @typedef {{type: string, id: string | null, data: any}} ServerEvent */

/**
 * @param {Response} response
 * @returns {AsyncGenerator<ServerEvent>}
 */
export async function* readEvents(response) {
  const parser = new EventParser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    yield* parser.push(value);
  }
}

/** Takes text in any pieces, gives whole events. Comments, such as heartbeats, are dropped. */
export class EventParser {
  #rest = "";

  /** @param {string} text @returns {Generator<ServerEvent>} */
  *push(text) {
    const blocks = (this.#rest + text).split("\n\n");
    this.#rest = blocks.pop() ?? "";
    for (const block of blocks) {
      const event = parse(block);
      if (event) yield event;
    }
  }
}

/** @param {string} block @returns {ServerEvent | null} */
function parse(block) {
  let type = "message";
  let id = null;
  const data = [];
  for (const line of block.split("\n")) {
    const [, name, value] = /^([^:]*):? ?(.*)$/.exec(line) ?? [];
    if (name === "event") type = value;
    else if (name === "id") id = value;
    else if (name === "data") data.push(value);
  }
  return data.length ? { type, id, data: JSON.parse(data.join("\n")) } : null;
}
