// A form of the fields that the server publishes, with the server's errors beside them.

import { h } from "./dom.js";

/** Fields to show at once; all others are behind "advanced". */
const FIRST = ["gen_length", "steps", "block_length", "confidence_threshold", "temperature", "seed"];
const ROWS = { strings: ["one per line", 2], integers: ["ids, separated by spaces", 2], json: ["JSON", 3] };

/** Settings that go together, for a beginning. */
const PRESETS = [
  ["Token by token", { confidence_threshold: "", cache: "" }],
  ["Parallel", { confidence_threshold: "0.9", cache: "" }],
  ["Parallel, cached", { confidence_threshold: "0.9", cache: "dual" }],
];

/** The settings of one side, `a` or `b`. `onchange` is called after each change. */
export class SettingsForm {
  constructor({ side, title, fields, onchange }) {
    this.fields = fields;
    this.onchange = onchange;
    this.controls = new Map();
    this.errors = new Map();
    const row = (field) => this.#row(field, `${side}-${field.name}`);
    const first = fields.filter(({ name }) => FIRST.includes(name));
    const others = fields.filter(({ name }) => !FIRST.includes(name));
    this.fold = h("details", { class: "advanced" },
      h("summary", {}, `Advanced: ${others.length} more fields`),
      h("div", { class: "rows" }, ...others.map(row)));
    this.heading = h("h2", {}, title);
    this.element = h("form", { class: "settings-form", "aria-label": title, noValidate: true, on: { input: () => this.#changed(), submit: (event) => event.preventDefault() } },
      this.heading,
      h("div", { class: "presets", role: "group", "aria-label": "Presets" }, ...PRESETS.map(([name, values]) => this.#preset(name, values))),
      h("div", { class: "rows" }, ...FIRST.flatMap((name) => first.filter((field) => field.name === name)).map(row)),
      this.fold);
  }

  /** The texts that were filled in, by field. */
  get values() {
    return Object.fromEntries([...this.controls].map(([name, control]) => [name, control.value]));
  }

  /** Fills in these fields and empties the others. */
  set values(values) {
    for (const [name, control] of this.controls) control.value = values[name] ?? "";
    this.#changed();
  }

  /** Fills in these fields and leaves the others. */
  fill(values) {
    this.values = { ...this.values, ...values };
  }

  /** Lets you choose a field's value among these, above all other fields. */
  offer(name, choices) {
    const control = this.controls.get(name);
    const chosen = control.value;
    const field = { ...this.fields.find((one) => one.name === name), kind: "choice", choices };
    const select = controlOf(field, { id: control.id, "aria-describedby": control.getAttribute("aria-describedby") });
    select.value = choices.includes(chosen) ? chosen : "";
    this.controls.set(name, select);
    const row = control.parentElement;
    control.replaceWith(select);
    this.element.querySelector(".rows").prepend(row);
  }

  /** Shows the problems whose fields are here; returns the others. */
  showProblems(problems) {
    const others = [];
    let first = null;
    for (const { field, message } of problems) {
      const error = this.errors.get(field);
      if (error === undefined) {
        others.push({ field, message });
        continue;
      }
      const control = this.controls.get(field);
      error.textContent = message;
      error.hidden = false;
      control.setAttribute("aria-invalid", "true");
      for (let fold = control.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
      first ??= control;
    }
    first?.focus({ preventScroll: true });
    first?.scrollIntoView({ block: "center" });
    return others;
  }

  clearProblems() {
    for (const [name, error] of this.errors) {
      error.hidden = true;
      error.textContent = "";
      this.controls.get(name).removeAttribute("aria-invalid");
    }
  }

  #row(field, id) {
    const doc = field.range === "" ? field.doc : `${field.doc}; ${field.range}`;
    const control = controlOf(field, { id, "aria-describedby": `${id}-error ${id}-doc` });
    const error = h("p", { class: "error", id: `${id}-error`, hidden: true });
    this.controls.set(field.name, control);
    this.errors.set(field.name, error);
    return h("div", { class: `row ${field.kind}` },
      h("label", { htmlFor: id }, h("code", {}, field.name)), control, error,
      h("p", { class: "doc", id: `${id}-doc` }, doc));
  }

  #preset(name, values) {
    return h("button", { type: "button", on: { click: () => this.fill(values) } }, name);
  }

  #changed() {
    this.onchange();
  }
}

function controlOf(field, attributes) {
  const common = { ...attributes, name: field.name, autocomplete: "off" };
  if (field.kind === "boolean" || field.kind === "choice") {
    const choices = field.kind === "boolean" ? ["true", "false"] : field.choices;
    const nothing = field.fallback === "" ? "default" : `default (${field.fallback})`;
    return h("select", common, h("option", { value: "" }, nothing), ...choices.map((choice) => h("option", { value: choice }, choice)));
  }
  if (field.kind in ROWS) {
    const [placeholder, rows] = ROWS[field.kind];
    return h("textarea", { ...common, placeholder, rows, spellcheck: false });
  }
  const inputMode = { integer: "numeric", number: "decimal" }[field.kind] ?? "text";
  return h("input", { ...common, type: "text", inputMode, placeholder: field.fallback, spellcheck: false });
}
