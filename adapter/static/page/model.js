// What the page says about the model that is served, with prompts to try. No DOM.

const FAMILIES = {
  llada: "LLaDA",
  dream: "Dream",
  illada: "iLLaDA",
  sdar: "SDAR",
  fast_dllm: "Fast-dLLM v2",
  nemotron: "Nemotron-Labs-Diffusion",
};

/** Fields with which a paragraph fits. */
const LONG = { gen_length: "128" };

/** A checkpoint that knows its tasks and nothing else has prompts of these tasks. */
const DEMO = {
  about:
    "It was trained for demonstrations and knows a few tasks: sums below 100, sorting, counting, " +
    "comparing, capitals, opposites, spelling, days and months, definitions and short paragraphs. " +
    "It answers one question at a time.",
  mode: "prompt",
  examples: [
    { prompt: "Tell me about AI", fields: LONG },
    { prompt: "What is 17 + 25?" },
    { prompt: "What is the capital of France?" },
    { prompt: "Sort these numbers: 7 3 9 1" },
    { prompt: "Count from 41 to 44." },
    { prompt: "What is the opposite of hot?" },
    { prompt: "Write backwards: k e m a" },
    { prompt: "Explain machine learning in simple words." },
    { prompt: "Write a paragraph about rain.", fields: LONG },
  ],
};

const GENERAL = {
  about: "",
  mode: "chat",
  examples: [
    { prompt: "Explain in two sentences how a diffusion language model writes." },
    { prompt: "Write a short poem about rain on a window.", fields: LONG },
    { prompt: "What is 17 + 25? Think step by step.", fields: LONG },
    { prompt: "Write a Python function that reverses a string.", fields: LONG },
  ],
};

/**
 * Describes a model of /v1/models.
 *
 * @returns `name`, `facts` (short texts), `about`, the `mode` to begin with, `examples`.
 */
export function describe(model) {
  const known = (model.checkpoint ?? "").startsWith("demo_checkpoint") ? DEMO : GENERAL;
  const facts = [];
  if (model.family) facts.push(FAMILIES[model.family] ?? model.family);
  if (model.num_parameters) facts.push(`${magnitude(model.num_parameters)} parameters`);
  if (model.max_model_len) facts.push(`context of ${model.max_model_len.toLocaleString("en")} tokens`);
  if (model.block_length) facts.push(`block by block, ${model.block_length} tokens each`);
  return { name: model.checkpoint ?? model.id, facts, ...known };
}

/** A count as people say it: 1.1M, 8B. */
export function magnitude(count) {
  for (const [unit, size] of [["B", 1e9], ["M", 1e6], ["K", 1e3]]) {
    if (count >= size) {
      const number = count / size;
      return `${number < 10 ? Number(number.toFixed(1)) : Math.round(number)}${unit}`;
    }
  }
  return String(count);
}
