// Everything that happened to one canvas, so that any moment of it can be shown again. No DOM.

/** Probabilities from which a committed token counts as sure, and as fair. */
const SURE = 0.9;
const FAIR = 0.5;

/** How sure the model was of a token: "sure", "fair" or "unsure". */
export function certainty(confidence) {
  if (confidence >= SURE) return "sure";
  return confidence >= FAIR ? "fair" : "unsure";
}

/** The events of one request. Positions in `order` are in the order of their commitment. */
export class Recording {
  constructor() {
    /** `step`, `seconds`, `block`, `canvas` and `count` (commits until then) of each step. */
    this.frames = [];
    /** `position`, `token_id`, `confidence` and `frame` of each commit. */
    this.order = [];
    /** The last event, or null. */
    this.done = null;
    this.seconds = 0;
    this.seed = null;
  }

  /** Adds an event `step`, so many seconds after the request began. */
  add(event, seconds) {
    // Within a step the surest come first, which is the order in which a schedule would take them.
    const committed = [...event.committed].sort((a, b) => b.confidence - a.confidence);
    const frame = this.frames.length;
    for (const { position, token_id, confidence } of committed) {
      this.order.push({ position, token_id, confidence, frame });
    }
    const { step, block, canvas } = event;
    this.frames.push({ step, seconds, block, canvas, count: this.order.length });
    this.seconds = seconds;
    this.seed = event.seed;
  }

  /** Adds the event `done`. */
  finish(event, seconds) {
    this.done = event;
    this.seconds = seconds;
    this.seed = event.seed;
  }

  /** Positions of the canvas; that of a block-wise model may grow. */
  get length() {
    return this.frames.at(-1)?.canvas.length ?? 0;
  }

  /** Where blocks begin. The first one may be shorter, if a prompt's end shares a block with it. */
  get blockStarts() {
    const blocks = this.frames.map(({ block }) => block);
    const length = Math.max(...blocks.map(({ start, end }) => end - start));
    const first = (blocks.at(-1).start % length) || length;
    const starts = [0];
    for (let start = first; start < this.length; start += length) starts.push(start);
    return starts;
  }

  /** Positions that are to be decoded: all but those that the request gave. */
  get total() {
    const last = this.frames.at(-1);
    if (last === undefined) return 0;
    return this.order.length + last.canvas.filter((text) => text === null).length;
  }

  /** The first commit count at which a step has ended, after (or before) this count. */
  nextEnd(count) {
    return this.frames.find((frame) => frame.count > count)?.count ?? this.order.length;
  }

  previousEnd(count) {
    return this.frames.findLast((frame) => frame.count < count)?.count ?? 0;
  }

  /** How many commits had happened after so many seconds. */
  countAfter(seconds) {
    return this.frames.findLast((frame) => frame.seconds <= seconds)?.count ?? 0;
  }

  /**
   * The canvas after the first `count` commits.
   *
   * @returns `cells`, each with `kind` (mask, word, special, given), `text`, `token_id`,
   *   `confidence`, `step` and `isNew` (committed in the newest step shown); and the `block` being
   *   decoded, or null at the end.
   */
  at(count) {
    const newest = count === 0 ? -1 : this.order[count - 1].frame;
    const frame = this.frames[Math.max(newest, 0)];
    const cells = this.frames.at(-1).canvas.map((text) => ({ kind: "given", text: text ?? "" }));
    this.order.forEach(({ position, token_id, confidence, frame: at }, index) => {
      const text = frame.canvas[position] ?? this.frames[at].canvas[position];
      cells[position] = index < count
        ? { kind: text ? "word" : "special", text, token_id, confidence, step: this.frames[at].step, isNew: at === newest }
        : { kind: "mask", text: "" };
    });
    this.frames.at(-1).canvas.forEach((text, position) => {
      if (text === null) cells[position] = { kind: "mask", text: "" };
    });
    return { cells, block: this.#blockAt(count) };
  }

  /** The block of the first mask; an event names the block that the next step decodes. */
  #blockAt(count) {
    if (this.done !== null && count === this.order.length) return null;
    const next = this.order[count];
    const blocks = this.frames.map((frame) => frame.block);
    if (next === undefined) return blocks.at(-1);
    return blocks.find(({ start, end }) => start <= next.position && next.position < end) ?? {
      // The first event of all comes after the first step, which may have finished a block.
      index: 0,
      start: 0,
      end: blocks[0].start,
    };
  }

  /** Numbers after the first `count` commits, `seconds` after the start. */
  stats(count = this.order.length) {
    const ended = this.done !== null && count === this.order.length;
    const frame = this.frames.findLast((one) => one.count <= count);
    const seconds = ended ? this.seconds : (frame?.seconds ?? 0);
    const steps = ended ? this.done.usage.steps : (frame?.step ?? 0);
    // The last event knows passes, and tokens without the end of the canvas.
    const tokens = ended ? this.done.usage.completion_tokens : count;
    const passes = ended ? this.done.usage.forward_passes : steps;
    return {
      count,
      total: this.total,
      steps,
      seconds,
      perSecond: seconds > 0 ? tokens / seconds : null,
      passesPerToken: tokens > 0 ? passes / tokens : null,
    };
  }

  /** A canvas with the tokens at these positions, and the mask everywhere else. */
  canvasKeeping(positions, maskId, given = []) {
    const ids = new Array(this.length).fill(maskId);
    for (const position of positions) ids[position] = given[position] ?? maskId;
    for (const { position, token_id } of this.order) {
      if (positions.has(position)) ids[position] = token_id;
    }
    return ids;
  }

  /** What a file of it holds. */
  toJSON() {
    return {
      seed: this.seed,
      steps: this.frames.map(({ step, seconds, block, canvas }, index) => ({
        step,
        seconds: Number(seconds.toFixed(4)),
        block,
        committed: this.order
          .filter(({ frame }) => frame === index)
          .map(({ position, token_id, confidence }) => ({ position, token_id, text: canvas[position], confidence })),
      })),
      answer: this.done,
    };
  }
}
