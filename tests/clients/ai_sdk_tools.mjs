// The Vercel AI SDK's own calls for tools and objects; prints what it reads as JSON.
// node ai_sdk_tools.mjs http://localhost:8000
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";

const dllm = createOpenAICompatible({
  name: "dllm",
  baseURL: `${process.argv[2]}/v1`,
  supportsStructuredOutputs: true,
});
const schema = jsonSchema({
  type: "object",
  properties: { exact: { type: "boolean" }, unit: { type: "boolean" } },
  required: ["exact", "unit"],
  additionalProperties: false,
});
const prompt = "What is 17 + 25?";
const call = {
  model: dllm("dllm"),
  prompt,
  maxOutputTokens: 64,
  maxRetries: 0,
  tools: { Add: tool({ description: "Adds two numbers.", inputSchema: schema }) },
  toolChoice: { type: "tool", toolName: "Add" },
};
const read = (calls) => calls.map((one) => [one.toolName, one.input]);
const whole = await generateText(call);
const streamed = streamText(call);
for await (const _ of streamed.fullStream);
const object = await generateObject({ model: dllm("dllm"), prompt, schema, maxOutputTokens: 64 });
console.log(JSON.stringify({
  whole: read(whole.toolCalls),
  streamed: read(await streamed.toolCalls),
  reason: whole.finishReason,
  structured: [object.object],
}));
