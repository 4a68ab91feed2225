// Shows POST /v1/generate/stream. The model's text is always inserted as text, never as markup.

const form = document.getElementById("form");
const start = document.getElementById("start");
const stop = document.getElementById("stop");
const status = document.getElementById("status");
const canvas = document.getElementById("canvas");
const final = document.getElementById("final");

const MASK = "░";
const SPECIAL = "·";

let running = null; // AbortController of the running call

form.addEventListener("submit", (event) => {
  event.preventDefault();
  denoise(fieldsOf(form));
});
stop.addEventListener("click", () => running?.abort());

/** The filled-in fields, numbers as numbers; the server has defaults for the rest. */
function fieldsOf(source) {
  const fields = {};
  for (const [name, value] of new FormData(source)) {
    if (value !== "") fields[name] = name === "prompt" ? value : Number(value);
  }
  return fields;
}

async function denoise(fields) {
  const call = new AbortController();
  running = call;
  start.disabled = true;
  stop.disabled = false;
  canvas.replaceChildren();
  final.textContent = "";
  say("waiting for the engine …");
  try {
    const key = document.getElementById("key").value;
    const response = await fetch("v1/generate/stream", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...(key && { "X-API-Key": key }) },
      body: JSON.stringify(fields),
      signal: call.signal,
    });
    if (!response.ok) throw new Error(await reasonOf(response));
    await show(response.body);
  } catch (error) {
    if (call.signal.aborted) say("stopped");
    else say(error.message, true);
  } finally {
    start.disabled = false;
    stop.disabled = true;
  }
}

async function reasonOf(response) {
  const text = await response.text();
  try {
    const { detail } = JSON.parse(text);
    if (typeof detail === "string") return detail;
    return detail.map((problem) => `${problem.loc.slice(1).join(".")}: ${problem.msg}`).join("; ");
  } catch {
    return text || `the server answered ${response.status}`;
  }
}

async function show(body) {
  let tokens = [];
  for await (const { name, data } of eventsOf(body)) {
    if (name === "error") throw new Error(data.error);
    if (name === "done") {
      final.textContent = data.text;
      clearMarks(tokens);
      const { completion_tokens: written, steps: run } = data.usage;
      say(`done (${data.finish_reason}): ${written} tokens in ${run} steps, seed ${data.seed}`);
      return;
    }
    if (tokens.length === 0) tokens = layOut(data.canvas.length);
    draw(tokens, data);
    final.textContent = data.final_text;
    say(`step ${data.step}, block ${data.block.index + 1}`);
  }
  throw new Error("the stream ended without an answer");
}

/** The server-sent events of a response. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (unread + value).split("\n\n");
    unread = blocks.pop();
    for (const block of blocks) {
      const fields = {};
      for (const line of block.split("\n")) {
        const colon = line.indexOf(": ");
        if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
      }
      if (fields.data !== undefined) yield { name: fields.event, data: JSON.parse(fields.data) };
    }
  }
}

function layOut(length) {
  const tokens = Array.from({ length }, () => document.createElement("span"));
  canvas.replaceChildren(...tokens);
  return tokens;
}

function draw(tokens, { canvas: texts, committed, block }) {
  tokens.forEach((token, position) => {
    const text = texts[position];
    token.textContent = text === null ? MASK : text || SPECIAL;
    token.className = "token";
    token.classList.toggle("masked", text === null);
    token.classList.toggle("special", text === "");
    token.classList.toggle("active", position >= block.start && position < block.end);
  });
  for (const { position, confidence } of committed) {
    tokens[position].classList.add("new");
    tokens[position].style.setProperty("--p", confidence);
    tokens[position].title = `committed with confidence ${confidence.toFixed(3)}`;
  }
}

function clearMarks(tokens) {
  for (const token of tokens) token.classList.remove("new", "active");
}

function say(text, wrong = false) {
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
}
