// The turns of one mode: what was asked, and the answers below it.

import { Answer } from "./answer.js";
import { h, prefersStillness } from "./dom.js";
import { bodyOf } from "./schema.js";

/**
 * Turns one below the other.
 *
 * @param mode chat (all turns are sent), prompt (each alone) or pair (each under two settings).
 * `maskIdOf` tells the mask's token id of a model by name; undefined where the server does not.
 */
export class Thread {
  constructor({ mode, fields, onlink, onproblems, onredo }) {
    this.mode = mode;
    this.fields = fields;
    this.onlink = onlink;
    this.onproblems = onproblems;
    this.onredo = onredo;
    this.maskIdOf = () => undefined;
    this.messages = [];
    this.running = [];
    this.answers = [];
    this.turns = 0;
    this.element = h("section", { class: "thread", "aria-label": "Answers" });
  }

  get isEmpty() {
    return this.element.childElementCount === 0;
  }

  get isRunning() {
    return this.running.length > 0;
  }

  clear() {
    this.pause();
    this.messages = [];
    this.answers = [];
    this.element.replaceChildren();
  }

  stop() {
    for (const answer of this.running) answer.stop();
  }

  /** Pauses every replay. */
  pause() {
    for (const { player } of this.answers) player.pause();
  }

  /**
   * Asks, and shows each answer until its end.
   *
   * @param values texts of the fields, for each side.
   * @param before the messages that come first; null: those of the thread.
   */
  async ask(prompt, values, before = null) {
    const messages = before ?? this.messages;
    const isChat = this.mode === "chat";
    const asked = isChat ? { messages: [...messages, { role: "user", content: prompt }] } : { prompt };
    this.turns += 1;
    const answers = Object.keys(values).map((side) => this.#answer(side, prompt, values, messages));
    this.running = answers;
    this.answers.push(...answers);
    const turn = h("article", { class: "turn", "aria-label": `Turn ${this.turns}` },
      h("p", { class: "asked" }, h("span", { class: "hidden" }, "You asked: "), prompt),
      h("div", { class: `answers ${this.mode}` }, ...answers.map(({ element }) => element)),
      answers.length > 1 ? this.#playAll(answers) : null);
    this.element.append(turn);
    reveal(turn);
    const ends = await Promise.allSettled(
      Object.values(values).map((texts, index) => answers[index].run(bodyOf(this.fields, texts, asked))),
    );
    this.running = [];
    const refused = answers.every(({ recording }) => recording.frames.length === 0);
    if (refused) turn.remove();
    else reveal(turn);
    Object.keys(values).forEach((side, index) => {
      if (ends[index].status === "rejected") this.onproblems(ends[index].reason, side);
    });
    if (isChat && ends[0].value === true) {
      this.messages = [...asked.messages, { role: "assistant", content: answers[0].text }];
    }
    return !refused;
  }

  #answer(side, prompt, values, messages) {
    const isPair = Object.keys(values).length > 1;
    const name = isPair ? side.toUpperCase() : "";
    const maskId = this.maskIdOf(values[side].model);
    const redo = (ids) => this.onredo(prompt, { [side]: { ...values[side], canvas_ids: ids.join(" "), gen_length: "" } }, messages);
    return new Answer({
      label: `answer ${this.turns}${name}`,
      title: isPair ? `${name}: ${summaryOf(values[side])}` : "",
      speed: isPair ? "8 steps a second" : "8 tokens a second",
      maskId,
      onredo: maskId === undefined ? null : redo,
      onlink: (seed) => this.onlink(prompt, { ...values, [side]: { ...values[side], seed: values[side].seed || String(seed) } }),
    });
  }

  #playAll(answers) {
    const play = () => {
      for (const { player } of answers) if (player.recording !== null) player.start();
    };
    return h("button", { type: "button", class: "both", on: { click: play } }, "Replay both");
  }
}

/** Scrolls as little as needed: a turn has grown, and the composer covers the end of the page. */
function reveal(turn) {
  turn.scrollIntoView({ block: "nearest", behavior: prefersStillness() ? "auto" : "smooth" });
}

function summaryOf(values) {
  const given = Object.entries(values).filter(([, text]) => text !== "");
  return given.map(([name, text]) => `${name} ${text}`).join(", ") || "the server’s defaults";
}
