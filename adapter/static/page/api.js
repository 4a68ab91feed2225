// Calls to the server that brought the page, and what their errors say about which field.

const EVENT_END = "\n\n";

/** The key for every call; it lives as long as the tab, and in no link. */
export const key = {
  get: () => sessionStorage.getItem("dllm.key") ?? "",
  set: (value) => sessionStorage.setItem("dllm.key", value),
};

/** A refused or failed call. */
export class CallError extends Error {
  /** @param problems the `field` at fault, or "", and the `message`, for each problem. */
  constructor(status, problems) {
    super(problems.map(({ field, message }) => (field ? `${field}: ${message}` : message)).join("; "));
    this.status = status;
    this.problems = problems;
  }
}

/** Calls the server and returns the response. Throws `CallError`. */
export async function call(method, path, { body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key.get() !== "") headers["X-API-Key"] = key.get();
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new CallError(0, [{ field: "", message: "the server cannot be reached" }]);
  }
  if (response.ok) return response;
  throw new CallError(response.status, problemsOf(response.status, await response.text()));
}

/** The problems that the body of an error names, each with its field or "". */
export function problemsOf(status, text) {
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // A proxy's page: its status says more.
  }
  if (Array.isArray(body?.detail)) {
    return body.detail.map(({ loc, msg }) => {
      const [field = "", ...inside] = loc.slice(1);
      return { field: String(field), message: [...inside.map((i) => `item ${i}`), msg].join(": ") };
    });
  }
  const message = body?.detail ?? body?.error?.message;
  return [typeof message === "string" ? problemOf(message) : { field: "", message: `the server answered ${status}` }];
}

/** An error of the engine begins with the name of the field. */
export function problemOf(message) {
  const named = /^([a-z][a-z_0-9]*): (.+)$/s.exec(message);
  return named ? { field: named[1], message: named[2] } : { field: "", message };
}

/** The server-sent events of a response, as `name` and `data`. */
export async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (unread + value).split(EVENT_END);
      unread = blocks.pop();
      for (const block of blocks) {
        const event = eventOf(block);
        if (event !== null) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** One event; null for a comment, which keeps the connection alive. */
export function eventOf(block) {
  const fields = {};
  for (const line of block.split("\n")) {
    const colon = line.indexOf(": ");
    if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
  }
  return fields.data === undefined ? null : { name: fields.event, data: JSON.parse(fields.data) };
}
