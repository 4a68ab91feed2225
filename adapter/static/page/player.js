// Replays a recording: a scrubber over its commits, play, and slow motion.

import { h } from "./dom.js";

/** Ways to play: how many commits are shown after so many seconds from the start. */
const SPEEDS = {
  "as it ran": (recording, seconds) => recording.countAfter(seconds),
  "8 steps a second": (recording, seconds) => afterSteps(recording, 8 * seconds),
  "1 step a second": (recording, seconds) => afterSteps(recording, seconds),
  "8 tokens a second": (recording, seconds) => Math.min(Math.floor(8 * seconds), recording.order.length),
};

function afterSteps(recording, steps) {
  const shown = Math.min(Math.floor(steps), recording.frames.length);
  return shown === 0 ? 0 : recording.frames[shown - 1].count;
}

let lastId = 0;

/**
 * Controls of one recording, of which `scrubber` and `element` are put where they belong.
 *
 * @param speed the way to play at first.
 * @param onmove called with the number of commits to show.
 */
export class Player {
  constructor({ label, speed, onmove }) {
    this.onmove = onmove;
    this.recording = null;
    this.count = 0;
    this.timer = null;
    const id = `speed-${++lastId}`;
    const step = (name, sign, count) =>
      h("button", { type: "button", title: name, "aria-label": name, on: { click: () => this.#jump(count()) } }, sign);
    this.play = h("button", { type: "button", on: { click: () => this.toggle() } });
    this.scrubber = h("input", {
      type: "range",
      class: "scrubber",
      min: 0,
      max: 0,
      "aria-label": `Replay of ${label}`,
      hidden: true,
      on: { input: () => this.#jump(Number(this.scrubber.value)) },
    });
    this.speed = h("select", { id, on: { change: () => this.#restart() } },
      ...Object.keys(SPEEDS).map((name) => h("option", {}, name)));
    this.speed.value = speed;
    this.element = h("div", { class: "player", role: "group", "aria-label": `Controls of the replay of ${label}`, hidden: true },
      step("One step back", "◂", () => this.recording.previousEnd(this.count)),
      this.play,
      step("One step on", "▸", () => this.recording.nextEnd(this.count)),
      h("label", { htmlFor: id, class: "hidden" }, "Speed"), this.speed);
    this.#showState();
  }

  /** Offers a finished recording, shown to its end. */
  offer(recording) {
    this.recording = recording;
    this.scrubber.max = recording.order.length;
    this.element.hidden = this.scrubber.hidden = recording.order.length === 0;
    this.#set(recording.order.length);
  }

  get isPlaying() {
    return this.timer !== null;
  }

  /** Plays, or stops. At the end it begins again. */
  toggle() {
    if (this.isPlaying) this.pause();
    else this.start(this.count < this.recording.order.length ? this.count : 0);
  }

  /** Plays from this number of commits on. */
  start(count = 0) {
    this.pause();
    this.#set(count);
    const speed = SPEEDS[this.speed.value];
    // The moment of this speed's time line at which so many commits have happened.
    let seconds = 0;
    while (speed(this.recording, seconds) < count) seconds += 0.05;
    const began = performance.now() - 1000 * seconds;
    const tick = () => {
      const now = speed(this.recording, (performance.now() - began) / 1000);
      if (now !== this.count) this.#set(Math.max(now, count));
      if (this.count < this.recording.order.length) this.timer = requestAnimationFrame(tick);
      else this.pause();
    };
    this.timer = requestAnimationFrame(tick);
    this.#showState();
  }

  pause() {
    if (this.timer !== null) cancelAnimationFrame(this.timer);
    this.timer = null;
    this.#showState();
  }

  #jump(count) {
    this.pause();
    this.#set(count);
  }

  #restart() {
    if (this.isPlaying) this.start(this.count);
  }

  #set(count) {
    this.count = count;
    this.scrubber.value = count;
    const { steps, total } = this.recording.stats(count);
    this.scrubber.setAttribute("aria-valuetext", `step ${steps}, ${count} of ${total} tokens`);
    this.onmove(count);
  }

  #showState() {
    this.play.textContent = this.isPlaying ? "❚❚" : "▶";
    const name = this.isPlaying ? "Pause" : "Play";
    this.play.title = name;
    this.play.setAttribute("aria-label", name);
  }
}
