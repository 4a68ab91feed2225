// A chat and an autocompletion as Continue makes them. Arguments: the model's entry in its
// configuration, as JSON, the question, and the text to complete. Prints one JSON document.
import { constructLlmApi } from "@continuedev/openai-adapters";

const { provider, model, apiBase, apiKey } = JSON.parse(process.argv[2]);
const api = constructLlmApi({ provider, apiBase, apiKey });
const never = new AbortController().signal;
const LENGTH = 4096; // Continue's default

const chat = [];
const messages = [{ role: "user", content: process.argv[3] }];
for await (const chunk of api.chatCompletionStream(
  { model, messages, max_tokens: LENGTH, stream: true }, never,
)) chat.push(chunk.choices[0]?.delta?.content ?? "");

const completion = [];
for await (const chunk of api.completionStream(
  { model, prompt: process.argv[4], max_tokens: 16, stop: ["\n\n"], stream: true }, never,
)) completion.push(chunk.choices[0]?.text ?? "");

console.log(JSON.stringify({ chat: chat.join(""), completion: completion.join("") }));
