// One answer: its canvas while it is denoised, its numbers, its replay, and what to do with it.

import { CallError, call, eventsOf, problemOf } from "./api.js";
import { Canvas } from "./canvas.js";
import { announce, copyText, download, h } from "./dom.js";
import { Player } from "./player.js";
import { Recording } from "./recording.js";

const REASONS = { stop: "ended by itself", length: "canvas full" };

/**
 * Runs a request and shows it.
 *
 * @param label how it is called for screen readers.
 * @param title shown above it, or "".
 * @param speed how its replay plays at first.
 * @param onredo called with the ids of a canvas in which the kept words are fixed; null: not offered.
 * @param onlink returns the address that repeats it with a seed.
 */
export class Answer {
  constructor({ label, title, speed, maskId, onredo, onlink }) {
    this.recording = new Recording();
    this.text = "";
    this.body = "";
    this.given = [];
    this.maskId = maskId;
    this.abort = new AbortController();
    this.onlink = onlink;
    this.player = new Player({ label, speed, onmove: (count) => this.#draw(count) });
    this.canvas = new Canvas({ label: `Canvas of ${label}`, onselect: () => this.#offerRedo() });
    this.bar = h("progress", { max: 1, value: 0, "aria-label": `Progress of ${label}` });
    this.numbers = h("p", { class: "numbers" });
    this.state = h("p", { class: "state" }, "waiting for the engine …");
    this.redo = onredo === null ? null : h("button", { type: "button", class: "redo", hidden: true, on: { click: () => onredo(this.#keptCanvas()) } });
    this.actions = h("div", { class: "actions", hidden: true },
      this.#action("Copy text", () => copyText(this.text), "Copied"),
      this.#action("Copy link", () => copyText(this.onlink(this.recording.seed)), "Copied"),
      this.#action("Export JSON", () => this.#save(), "Saved"),
      this.redo);
    this.element = h("section", { class: "answer", "aria-label": label },
      title === "" ? null : h("h2", {}, title),
      this.canvas.element, this.canvas.detail,
      h("div", { class: "progress" }, this.bar, this.player.scrubber, this.numbers),
      h("div", { class: "foot" }, this.player.element, this.actions),
      this.state);
  }

  /** Runs the request to its end. Throws `CallError`; returns whether there is an answer. */
  async run(body) {
    this.body = body;
    this.given = JSON.parse(body).canvas_ids ?? [];
    const began = performance.now();
    const seconds = () => (performance.now() - began) / 1000;
    try {
      const { signal } = this.abort;
      const response = await call("POST", "v1/generate/stream", { body, signal });
      for await (const { name, data } of eventsOf(response.body)) this.#take(name, data, seconds());
      if (this.recording.done === null) throw new CallError(0, [{ field: "", message: "the stream ended without an answer" }]);
    } catch (error) {
      if (!this.abort.signal.aborted) {
        this.#end(`failed: ${error.message}`);
        throw error;
      }
    }
    if (this.recording.done === null) {
      this.#end("stopped");
      announce("Stopped");
      return false;
    }
    const { finish_reason: reason, seed, usage } = this.recording.done;
    const cached = usage.cached_tokens > 0 ? `, ${usage.cached_tokens} of them cached` : "";
    const read = `${usage.prompt_tokens} prompt tokens${cached}`;
    this.#end(`${REASONS[reason] ?? reason} · ${read} · seed ${seed}`);
    announce(`Answer: ${this.text || "empty"}`);
    return true;
  }

  stop() {
    this.abort.abort();
  }

  #take(name, data, seconds) {
    if (name === "error") throw new CallError(0, [problemOf(data.error)]);
    if (name === "done") {
      this.recording.finish(data, seconds);
      this.text = data.text;
      return;
    }
    this.recording.add(data, seconds);
    this.text = data.final_text;
    this.state.textContent = "denoising …";
    this.#draw(this.recording.order.length);
  }

  #end(state) {
    this.state.textContent = state;
    this.element.classList.add("over");
    if (this.recording.order.length === 0) return;
    this.bar.hidden = true; // The scrubber shows the same.
    this.player.offer(this.recording);
    this.actions.hidden = false;
  }

  #draw(count) {
    const isOver = this.element.classList.contains("over");
    const ended = isOver && count === this.recording.order.length;
    const view = this.recording.at(count);
    const { blockStarts } = this.recording;
    this.canvas.draw(view, { blockStarts, ended });
    const blocks = blockStarts.length;
    const { total, steps, seconds, perSecond, passesPerToken } = this.recording.stats(count);
    this.bar.max = Math.max(total, 1);
    this.bar.value = count;
    this.numbers.replaceChildren(
      number(`${count} of ${total}`, "tokens"),
      view.block === null || blocks === 1 ? "" : number(`${view.block.index + 1} of ${blocks}`, "blocks"),
      number(String(steps), steps === 1 ? "step" : "steps"),
      number(`${seconds.toFixed(2)} s`, ""),
      number(perSecond === null ? "–" : perSecond.toFixed(perSecond < 100 ? 1 : 0), "tokens per second"),
      number(passesPerToken === null ? "–" : passesPerToken.toFixed(2), "passes per token"),
    );
  }

  #offerRedo() {
    if (this.redo === null) return;
    const count = this.canvas.kept.size;
    this.redo.hidden = count === 0;
    this.redo.textContent = `Keep ${count === 1 ? "this token" : `these ${count} tokens`}, redo the rest`;
  }

  #keptCanvas() {
    return this.recording.canvasKeeping(this.canvas.kept, this.maskId, this.given);
  }

  #save() {
    const file = { request: JSON.parse(this.body), ...this.recording.toJSON() };
    download(`denoising-${this.recording.seed}.json`, JSON.stringify(file, null, 1));
  }

  #action(name, act, done) {
    const button = h("button", { type: "button" }, name);
    button.addEventListener("click", async () => {
      await act();
      button.textContent = done;
      announce(done);
      setTimeout(() => (button.textContent = name), 1500);
    });
    return button;
  }
}

function number(value, unit) {
  return h("span", {}, h("b", {}, value), unit === "" ? "" : ` ${unit}`);
}
