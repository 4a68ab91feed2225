// Draws the positions of a canvas. They are options of a list box: arrow keys move, space keeps.

import { h } from "./dom.js";
import { certainty } from "./recording.js";

const SPECIAL = "·";
const WORDS = { sure: "sure", fair: "fairly sure", unsure: "unsure" };

let lastId = 0;

/** One canvas. `onselect` is called after the kept positions changed. */
export class Canvas {
  constructor({ label, onselect }) {
    this.kept = new Set();
    this.onselect = onselect;
    this.cells = [];
    this.nodes = [];
    this.active = -1;
    this.id = `canvas-${++lastId}`;
    this.detail = h("p", { class: "detail" });
    this.element = h("div", {
      class: "canvas",
      role: "listbox",
      tabIndex: 0,
      "aria-label": label,
      "aria-multiselectable": "true",
      on: {
        keydown: (event) => this.#pressed(event),
        click: (event) => this.#clicked(event),
        pointerover: (event) => this.#show(this.nodes.indexOf(event.target)),
        pointerleave: () => this.#show(this.active),
        focus: () => this.#move(Math.max(this.active, 0)),
      },
    });
  }

  /** Shows `cells` and marks the `block`, as `Recording.at` returns them. */
  draw({ cells, block }, { blockStarts, ended }) {
    if (cells.length !== this.nodes.length) this.#layOut(cells.length);
    cells.forEach((cell, position) => {
      const edge = position > 0 && blockStarts.includes(position) ? "edge" : "";
      this.#drawCell(position, cell, `${placeIn(block, position)} ${edge}`);
    });
    this.cells = cells;
    this.element.classList.toggle("ended", ended);
    this.#show(this.active);
  }

  /** Forgets which positions are to be kept. */
  clearKept() {
    for (const position of this.kept) this.nodes[position]?.setAttribute("aria-selected", "false");
    this.kept.clear();
    this.onselect();
  }

  #layOut(length) {
    this.nodes = Array.from({ length }, (_, position) =>
      h("span", { role: "option", id: `${this.id}-${position}`, "aria-selected": "false" }),
    );
    this.element.replaceChildren(...this.nodes);
    this.cells = [];
  }

  #drawCell(position, cell, place) {
    const before = this.cells[position];
    const look = `token ${cell.kind} ${place} ${cell.isNew ? "new" : ""}`;
    const node = this.nodes[position];
    if (before?.text === cell.text && before.kind === cell.kind && node.className === look) return;
    node.className = look;
    node.textContent = cell.kind === "special" ? SPECIAL : cell.text;
    node.dataset.certainty = cell.confidence === undefined ? "" : certainty(cell.confidence);
    const name = cell.kind === "word" || cell.kind === "given" ? null : nameOf(cell);
    if (name === null) node.removeAttribute("aria-label");
    else node.setAttribute("aria-label", name);
  }

  #pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const last = this.nodes.length - 1;
    if (event.key in steps) this.#move(this.active + steps[event.key]);
    else if (event.key === "Home") this.#move(0);
    else if (event.key === "End") this.#move(last);
    else if (event.key === " " || event.key === "Enter") this.#toggle(this.active);
    else return;
    event.preventDefault();
  }

  #clicked(event) {
    const position = this.nodes.indexOf(event.target);
    if (position < 0) return;
    this.#move(position);
    this.#toggle(position);
  }

  #move(position) {
    if (this.nodes.length === 0) return;
    this.nodes[this.active]?.classList.remove("current");
    this.active = Math.min(Math.max(position, 0), this.nodes.length - 1);
    this.nodes[this.active].classList.add("current");
    this.element.setAttribute("aria-activedescendant", this.nodes[this.active].id);
    this.#show(this.active);
  }

  #toggle(position) {
    const cell = this.cells[position];
    if (cell === undefined || cell.kind === "mask") return;
    if (this.kept.has(position)) this.kept.delete(position);
    else this.kept.add(position);
    this.nodes[position].setAttribute("aria-selected", String(this.kept.has(position)));
    this.onselect();
  }

  /** Writes what is known about a position below the canvas. */
  #show(position) {
    const cell = this.cells[position];
    this.detail.textContent = cell === undefined ? "" : `Position ${position + 1}: ${factsOf(cell)}`;
  }
}

/** Whether the block before a position is being decoded, or the position's own. */
function placeIn(block, position) {
  if (block === null || position < block.start) return "";
  return position < block.end ? "active" : "later";
}

function nameOf(cell) {
  return { mask: "masked", special: "special token" }[cell.kind] ?? cell.text;
}

function factsOf(cell) {
  if (cell.kind === "mask") return "still masked";
  const text = cell.kind === "special" ? "a special token" : `“${cell.text}”`;
  if (cell.kind === "given") return `${text}, given`;
  const percent = (100 * cell.confidence).toFixed(1);
  return (
    `${text}, token ${cell.token_id}, committed in step ${cell.step} at ${percent}% ` +
    `(${WORDS[certainty(cell.confidence)]})`
  );
}

/** Explains the looks of positions. */
export function legend() {
  const sample = (kind, name, text) =>
    h("li", {}, h("span", { class: `token ${kind}`, "data-certainty": name, "aria-hidden": "true" }, text));
  const entries = [
    [sample("mask", "", ""), "masked"],
    [sample("word", "sure", "word"), "sure, 90% or more"],
    [sample("word", "fair", "word"), "fairly sure"],
    [sample("word", "unsure", "word"), "unsure, below 50%"],
    [sample("special", "sure", SPECIAL), "special token"],
  ];
  for (const [item, words] of entries) item.append(` ${words}`);
  return h("ul", { class: "legend", "aria-label": "Legend" }, ...entries.map(([item]) => item));
}
