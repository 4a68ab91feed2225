// What OpenAI's own client for Node makes of the API at argv[2]; prints one JSON document.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "-", maxRetries: 0 });
const ask = { model: "dllm", messages: [{ role: "user", content: "tell me" }] };
const options = { max_completion_tokens: 24, temperature: 0.7, seed: 5, ignore_eos: true, block_length: 8 };

const whole = await client.chat.completions.create({ ...ask, ...options });

const pieces = [];
let last = null;
for await (const chunk of await client.chat.completions.create({
  ...ask, ...options, stream: true, stream_options: { include_usage: true },
})) {
  pieces.push(...chunk.choices.map((choice) => choice.delta.content ?? ""));
  last = chunk;
}

const refusal = await client.chat.completions
  .create({ ...ask, frequency_penalty: 1 })
  .catch((error) => ({ kind: error.constructor.name, param: error.param, message: error.message }));

const response = await client.responses.create({
  model: "dllm", input: "tell me", max_output_tokens: 24, temperature: 0.7, seed: 5, ignore_eos: true, block_length: 8,
});
const deltas = [];
for await (const event of await client.responses.create({
  model: "dllm", input: "tell me", max_output_tokens: 24, temperature: 0.7, seed: 5, ignore_eos: true, block_length: 8,
  stream: true,
})) {
  if (event.type === "response.output_text.delta") deltas.push(event.delta);
}

const models = [];
for await (const model of client.models.list()) models.push(model.id);

console.log(JSON.stringify({
  text: whole.choices[0].message.content,
  usage: whole.usage,
  pieces,
  streamUsage: last.usage,
  refusal,
  response: response.output_text,
  deltas,
  models,
}));
