// Fields of a request, as the server's OpenAPI document describes them. No DOM.

/** Forms of the prompt: the page writes these from what you type. */
const PROMPTS = new Set(["prompt", "messages", "input_ids"]);
const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;

/**
 * The fields of a body that you may set, in the document's order.
 *
 * Each has `name`, `kind` (integer, number, boolean, choice, string, strings, integers, json),
 * `doc`, `fallback` (the documented default as text, or ""), `choices` and `range` (in words).
 */
export function fieldsOf(document, body = "GenerateRequest") {
  const { properties } = document.components.schemas[body];
  return Object.entries(properties)
    .filter(([name]) => !PROMPTS.has(name))
    .map(([name, schema]) => fieldOf(name, schema));
}

function fieldOf(name, schema) {
  const variants = (schema.anyOf ?? schema.oneOf ?? [schema]).filter(({ type }) => type !== "null");
  // A list takes every value that a single item can say as well.
  const variant = variants.find(({ type }) => type === "array") ?? variants[0] ?? {};
  const choices = variant.enum ?? schema.enum ?? schema.examples ?? [];
  const fallback = schema.default ?? null;
  return {
    name,
    kind: kindOf(variant, choices),
    doc: schema.description ?? "",
    fallback: fallback === null ? "" : String(fallback),
    choices: choices.map(String),
    range: rangeOf(variant),
  };
}

function kindOf(variant, choices) {
  if (variant.type === "string") return choices.length > 0 ? "choice" : "string";
  if (variant.type === "array") {
    return { string: "strings", integer: "integers" }[variant.items?.type] ?? "json";
  }
  return ["integer", "number", "boolean"].includes(variant.type) ? variant.type : "json";
}

/** The limits of a number in words; bounds of the data type alone are not worth a word. */
function rangeOf({ minimum, exclusiveMinimum, maximum }) {
  const far = (bound) => bound === undefined || Math.abs(bound) >= 1_000_000;
  const least = far(exclusiveMinimum) ? minimum : exclusiveMinimum;
  if (!far(least) && !far(maximum)) {
    return far(exclusiveMinimum) ? `${least} to ${maximum}` : `above ${least}, at most ${maximum}`;
  }
  if (!far(least)) return far(exclusiveMinimum) ? `at least ${least}` : `above ${least}`;
  return far(maximum) ? "" : `at most ${maximum}`;
}

/**
 * A body as JSON.
 *
 * Numbers keep their digits, as a seed may have more than JavaScript's numbers hold. What is no
 * number is sent as it is: the server says what is wrong with it.
 *
 * @param fields the fields, from `fieldsOf`.
 * @param values texts by name, as typed; empty ones are left out.
 * @param prompt the other members, such as `messages`.
 */
export function bodyOf(fields, values, prompt) {
  const members = Object.entries(prompt).map(([name, value]) => [name, JSON.stringify(value)]);
  for (const field of fields) {
    const text = values[field.name] ?? "";
    if (text.trim() !== "") members.push([field.name, encoded(field.kind, text)]);
  }
  return `{${members.map(([name, value]) => `${JSON.stringify(name)}:${value}`).join(",")}}`;
}

function encoded(kind, text) {
  switch (kind) {
    case "integer":
    case "number":
      return numberOf(text.trim());
    case "boolean":
      return text === "true" ? "true" : "false";
    case "strings":
      return JSON.stringify(text.split("\n").filter((line) => line !== ""));
    case "integers":
      return `[${text.trim().split(/[\s,]+/).map(numberOf).join(",")}]`;
    case "json":
      return isJson(text) ? text : JSON.stringify(text);
    default:
      return JSON.stringify(text);
  }
}

function numberOf(text) {
  if (NUMBER.test(text)) return text;
  const value = Number(text);
  return Number.isFinite(value) ? JSON.stringify(value) : JSON.stringify(text);
}

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

/** Whether a call of the document needs a key. */
export function needsKey(document) {
  return document.paths["/v1/generate/stream"]?.post?.security !== undefined;
}
