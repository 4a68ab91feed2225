// The settings in the page's address, so that a link shows them to others. Never the key. No DOM.

export const MODES = ["chat", "prompt", "pair", "jobs"];

/** The part of an address behind `#`. */
export function hashOf({ mode, prompt, settings }) {
  const parameters = new URLSearchParams({ mode });
  if (prompt) parameters.set("prompt", prompt);
  for (const [side, values] of Object.entries(settings)) {
    for (const [name, text] of Object.entries(values)) {
      if (text !== "") parameters.set(`${side}.${name}`, text);
    }
  }
  return `#${parameters}`;
}

/** What such a part says, or null if it says nothing. */
export function readHash(hash) {
  const parameters = new URLSearchParams(hash.replace(/^#/, ""));
  const mode = parameters.get("mode");
  if (!MODES.includes(mode)) return null;
  const settings = { a: {}, b: {} };
  for (const [name, text] of parameters) {
    const [, side, field] = /^([ab])\.(\w+)$/.exec(name) ?? [];
    if (field !== undefined) settings[side][field] = text;
  }
  return { mode, prompt: parameters.get("prompt") ?? "", settings };
}
