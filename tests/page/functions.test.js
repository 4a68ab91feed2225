// The page's functions without a DOM, run by node's own test runner (test_page_functions.py).

import assert from "node:assert/strict";
import { test } from "node:test";

import { eventOf, eventsOf, problemOf, problemsOf } from "./api.js";
import { hashOf, readHash } from "./link.js";
import { describe, magnitude } from "./model.js";
import { Recording, certainty } from "./recording.js";
import { bodyOf, fieldsOf, needsKey } from "./schema.js";

const nullable = (...variants) => ({ anyOf: [...variants, { type: "null" }] });
const DOCUMENT = {
  paths: { "/v1/generate/stream": { post: {} } },
  components: {
    schemas: {
      GenerateRequest: {
        properties: {
          prompt: nullable({ type: "string" }),
          messages: nullable({ type: "array", items: { $ref: "#/x" } }),
          gen_length: { type: "integer", minimum: 1, maximum: 512, default: 32, description: "how long" },
          seed: nullable({ type: "integer", minimum: -(2 ** 63), maximum: 2 ** 63 }),
          top_p: nullable({ type: "number", exclusiveMinimum: 0, maximum: 1 }),
          cache: { ...nullable({ type: "string" }), examples: ["none", "dual"] },
          raw: { type: "boolean", default: false },
          stop: nullable({ type: "string" }, { type: "array", items: { type: "string" } }),
          canvas_ids: nullable({ type: "array", items: { type: "integer" } }),
          schema: nullable({ type: "object" }),
          suffix: nullable({ type: "string", maxLength: 9 }),
        },
      },
    },
  },
};
const FIELDS = fieldsOf(DOCUMENT);

test("every published field but the forms of a prompt has a control of its kind", () => {
  assert.deepEqual(
    FIELDS.map(({ name, kind }) => [name, kind]),
    [
      ["gen_length", "integer"],
      ["seed", "integer"],
      ["top_p", "number"],
      ["cache", "choice"],
      ["raw", "boolean"],
      ["stop", "strings"],
      ["canvas_ids", "integers"],
      ["schema", "json"],
      ["suffix", "string"],
    ],
  );
});

test("a field tells its default, its choices and its limits, without those of the data type", () => {
  const [length, seed, share, cache] = FIELDS;
  assert.deepEqual([length.fallback, length.range, length.doc], ["32", "1 to 512", "how long"]);
  assert.equal(seed.range, "");
  assert.equal(share.range, "above 0, at most 1");
  assert.deepEqual(cache.choices, ["none", "dual"]);
});

test("a body has what was filled in, with the types of the fields and all digits", () => {
  const values = {
    gen_length: " 64 ",
    seed: "9223372036854775807",
    top_p: ".5",
    cache: "dual",
    raw: "true",
    stop: "a b\n\nc",
    canvas_ids: "1, 2 3",
    schema: '{"a": [1]}',
    suffix: "",
    unknown: "left out",
  };
  assert.equal(
    bodyOf(FIELDS, values, { prompt: 'say "hi"' }),
    '{"prompt":"say \\"hi\\"","gen_length":64,"seed":9223372036854775807,"top_p":0.5,"cache":"dual",' +
      '"raw":true,"stop":["a b","c"],"canvas_ids":[1,2,3],"schema":{"a": [1]}}',
  );
});

test("what is no number goes to the server, which says what is wrong with it", () => {
  const body = JSON.parse(bodyOf(FIELDS, { top_p: "much", canvas_ids: "1 x", schema: "{" }, {}));
  assert.deepEqual(body, { top_p: "much", canvas_ids: [1, "x"], schema: "{" });
});

test("a key is asked for where the document says that calls need one", () => {
  assert.equal(needsKey(DOCUMENT), false);
  assert.equal(needsKey({ paths: { "/v1/generate/stream": { post: { security: [{ ApiKey: [] }] } } } }), true);
});

test("errors name their field, in each of the server's formats", () => {
  const detail = [
    { loc: ["body", "top_p"], msg: "too large" },
    { loc: ["body", "messages", 0, "role"], msg: "missing" },
    { loc: ["body"], msg: "one prompt" },
  ];
  assert.deepEqual(problemsOf(422, JSON.stringify({ detail })), [
    { field: "top_p", message: "too large" },
    { field: "messages", message: "item 0: item role: missing" },
    { field: "", message: "one prompt" },
  ]);
  const named = { field: "steps", message: "must be: at least 2" };
  assert.deepEqual(problemsOf(422, '{"detail": "steps: must be: at least 2"}'), [named]);
  assert.deepEqual(problemsOf(400, '{"error": {"message": "steps: must be: at least 2"}}'), [named]);
  assert.deepEqual(problemsOf(502, "<html>"), [{ field: "", message: "the server answered 502" }]);
  assert.deepEqual(problemOf("No such thing"), { field: "", message: "No such thing" });
});

test("events are read whole, wherever the network cuts them", async () => {
  const text = ': ping\n\nevent: step\ndata: {"a": "é: x"}\n\nevent: done\ndata: {}\n\n';
  const bytes = new TextEncoder().encode(text);
  for (const size of [1, 7, 1000]) {
    const stream = new ReadableStream({
      start(controller) {
        for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
        controller.close();
      },
    });
    const events = [];
    for await (const event of eventsOf(stream)) events.push(event);
    assert.deepEqual(events, [{ name: "step", data: { a: "é: x" } }, { name: "done", data: {} }]);
  }
  assert.equal(eventOf(": ping"), null);
});

const commit = (position, confidence) => ({ position, token_id: 100 + position, text: `<${position}>`, confidence });

/** Six positions in blocks of three; position 0 is given, 4 stays masked, two steps commit two each. */
function recorded() {
  const recording = new Recording();
  const block = (index) => ({ index, start: 3 * index, end: 3 * index + 3 });
  recording.add({ step: 1, block: block(1), committed: [commit(2, 0.4), commit(1, 0.95)], canvas: ["<0>", "<1>", "<2>", null, null, null], seed: 7 }, 0.5);
  recording.add({ step: 2, block: block(1), committed: [commit(5, 0.7), { ...commit(3, 0.6), text: "" }], canvas: ["<0>", "<1>", "<2>", "", null, "<5>"], seed: 7 }, 1.5);
  return recording;
}

const DONE = { text: "<0><1><2>", finish_reason: "stop", seed: 7, usage: { completion_tokens: 3, steps: 2, forward_passes: 6 } };

test("a recording shows the canvas after any number of commits, the surest of a step first", () => {
  const recording = recorded();
  const kinds = (count) => recording.at(count).cells.map(({ kind }) => kind[0]).join("");
  assert.deepEqual([0, 1, 2, 3, 4].map(kinds), ["gmmmmm", "gwmmmm", "gwwmmm", "gwwmmw", "gwwsmw"]);
  const { cells, block } = recording.at(3);
  assert.deepEqual(cells[5], { kind: "word", text: "<5>", token_id: 105, confidence: 0.7, step: 2, isNew: true });
  assert.equal(cells[1].isNew, false);
  assert.equal(block.index, 1);
  assert.deepEqual(recording.at(1).block, { index: 0, start: 0, end: 3 });
  assert.deepEqual(recording.blockStarts, [0, 3]);
});

test("a canvas that grows block by block has masks where nothing is yet", () => {
  const recording = new Recording();
  const event = (step, start, end, canvas, committed) => ({ step, block: { index: step - 1, start, end }, canvas, committed, seed: 1 });
  recording.add(event(1, 0, 2, ["<0>", null], [commit(0, 0.9)]), 1);
  recording.add(event(2, 2, 6, ["<0>", "<1>", null, null, null, null], [commit(1, 0.9)]), 2);
  recording.add(event(3, 6, 10, ["<0>", "<1>", "<2>", "<3>", "<4>", "<5>", null, null, null, null], [2, 3, 4, 5].map((p) => commit(p, 0.9))), 3);
  assert.deepEqual(recording.blockStarts, [0, 2, 6]);
  assert.equal(recording.total, 10);
  const { cells } = recording.at(1);
  assert.deepEqual(cells.map(({ kind }) => kind[0]).join(""), "wmmmmmmmmm");
});

test("steps can be gone through one by one, and time passes as it did", () => {
  const recording = recorded();
  assert.deepEqual([0, 1, 2, 4].map((count) => recording.nextEnd(count)), [2, 2, 4, 4]);
  assert.deepEqual([4, 3, 2, 0].map((count) => recording.previousEnd(count)), [2, 2, 0, 0]);
  assert.deepEqual([0.4, 0.5, 1.4, 9].map((seconds) => recording.countAfter(seconds)), [0, 2, 2, 4]);
});

test("numbers are those of the moment shown; at the end those of the answer", () => {
  const recording = recorded();
  assert.equal(recording.total, 5);
  const { steps, perSecond, passesPerToken } = recording.stats(2);
  assert.deepEqual([steps, perSecond, passesPerToken], [1, 4, 0.5]);
  assert.equal(recording.stats(0).passesPerToken, null);
  recording.finish(DONE, 2);
  assert.deepEqual(recording.stats(), { count: 4, total: 5, steps: 2, seconds: 2, perSecond: 1.5, passesPerToken: 2 });
  assert.equal(recording.at(4).block, null);
});

test("kept words become a canvas with masks elsewhere, and given tokens can be kept again", () => {
  assert.deepEqual(recorded().canvasKeeping(new Set([0, 2]), 9, [42]), [42, 9, 102, 9, 9, 9]);
});

test("a file of a recording has every commit once, with its text and its time", () => {
  const recording = recorded();
  recording.finish(DONE, 2);
  const file = JSON.parse(JSON.stringify(recording));
  assert.deepEqual(file.steps.map(({ seconds, committed }) => [seconds, committed.map(({ position }) => position)]), [[0.5, [1, 2]], [1.5, [5, 3]]]);
  assert.equal(file.steps[0].committed[1].text, "<2>");
  assert.deepEqual(file.answer, DONE);
});

test("certainty has three levels", () => {
  assert.deepEqual([1, 0.9, 0.89, 0.5, 0.49, 0].map(certainty), ["sure", "sure", "fair", "fair", "unsure", "unsure"]);
});

test("a link says mode, prompt and settings, and what it says can be read", () => {
  const shown = { mode: "pair", prompt: "a & b\n#c", settings: { a: { seed: "7", stop: "x\ny", steps: "" }, b: { top_p: "0.5" } } };
  const read = readHash(hashOf(shown));
  assert.deepEqual(read, { ...shown, settings: { a: { seed: "7", stop: "x\ny" }, b: { top_p: "0.5" } } });
});

test("an address without a link's content is none", () => {
  for (const hash of ["", "#", "#prompt", "#mode=other&a.seed=1"]) assert.equal(readHash(hash), null);
});

test("a model is described by what the server tells, the demo checkpoint by what it knows", () => {
  const demo = describe({ id: "dllm", checkpoint: "demo_checkpoint_dream", family: "dream", num_parameters: 1_066_112, max_model_len: 512 });
  assert.deepEqual(demo.facts, ["Dream", "1.1M parameters", "context of 512 tokens"]);
  assert.deepEqual([demo.mode, demo.about.includes("capitals")], ["prompt", true]);
  const other = describe({ id: "dllm", checkpoint: "LLaDA-8B-Instruct", family: "new", max_model_len: 4096 });
  assert.deepEqual([other.name, other.mode, other.facts], ["LLaDA-8B-Instruct", "chat", ["new", "context of 4,096 tokens"]]);
  const blockwise = describe({ id: "dllm", family: "sdar", block_length: 4 });
  assert.deepEqual(blockwise.facts, ["SDAR", "block by block, 4 tokens each"]);
  const silent = describe({ id: "dllm" });
  assert.deepEqual([silent.name, silent.facts], ["dllm", []]);
});

test("counts are said as people say them", () => {
  assert.deepEqual([999, 1500, 1_066_112, 59_000_000, 8_015_581_184].map(magnitude), ["999", "1.5K", "1.1M", "59M", "8B"]);
});
