// Jobs that this browser submitted: their states, their texts, and how to cancel them.

import { CallError, call } from "./api.js";
import { announce, copyText, h } from "./dom.js";

const STORE = "dllm.jobs";
const POLL_MILLISECONDS = 1000;
const ACTIVE = new Set(["running"]);
const MARKS = { running: "◌", finished: "✓", failed: "✕", cancelled: "–", expired: "–" };

/** The list. Only ids and prompts are kept; the server has everything else. */
export class Jobs {
  constructor({ onproblem }) {
    this.onproblem = onproblem;
    this.jobs = read();
    this.timer = null;
    this.list = h("ol", { class: "jobs" });
    this.empty = h("p", { class: "nothing" }, "No jobs yet. A job is kept by the server: you can close this page and come back for its text.");
    this.clear = h("button", { type: "button", hidden: true, on: { click: () => this.#forgetDone() } }, "Forget finished jobs");
    this.element = h("section", { class: "thread", "aria-label": "Jobs" }, this.empty, this.list, this.clear);
    this.drawn = null;
    this.#draw();
    addEventListener("storage", ({ key }) => {
      if (key !== STORE) return;
      this.jobs = read();
      this.#draw();
    });
  }

  /** Submits a body (JSON) for each prompt. Throws `CallError`. */
  async submit(prompts, bodyOf) {
    const isBatch = prompts.length > 1;
    const body = bodyOf(isBatch ? { prompts } : { prompt: prompts[0] });
    const response = await call("POST", isBatch ? "v1/generate_batch" : "v1/generate", { body });
    const { request_ids: ids } = await response.json();
    const created = Date.now();
    ids.forEach((id, index) => this.jobs.unshift({ id, prompt: prompts[index], created, status: "running" }));
    this.#store();
    announce(`${ids.length} submitted`);
    this.watch();
  }

  /** Asks for the state of each job that is not done, until all are, or a call fails. */
  async watch() {
    clearTimeout(this.timer);
    for (const job of this.jobs.filter(({ status }) => ACTIVE.has(status))) {
      if (!(await this.#refresh("GET", job))) return;
    }
    this.#store();
    if (this.jobs.some(({ status }) => ACTIVE.has(status))) {
      this.timer = setTimeout(() => this.watch(), POLL_MILLISECONDS);
    }
  }

  /** Brings a job up to date; false if the call failed, which is shown. */
  async #refresh(method, job) {
    try {
      const response = await call(method, `v1/result/${job.id}`);
      const { status, text, error, finish_reason, usage } = await response.json();
      // An answer from before a cancellation may come after it; a job that is done stays so.
      if (ACTIVE.has(status) && !ACTIVE.has(job.status)) return true;
      Object.assign(job, { status, text, error, finish_reason, usage });
      if (!ACTIVE.has(status)) announce(`Job ${job.id} ${status}`);
    } catch (error) {
      if (!(error instanceof CallError)) throw error;
      if (error.status !== 404) {
        this.onproblem(error);
        return false;
      }
      Object.assign(job, { status: "expired", text: null });
    }
    return true;
  }

  async #cancel(job) {
    await this.#refresh("DELETE", job);
    this.#store();
  }

  /** The job may belong to the key that was entered before, or after. */
  #lookAgain(job) {
    job.status = "running";
    this.watch();
  }

  #forgetDone() {
    this.jobs = this.jobs.filter(({ status }) => ACTIVE.has(status));
    this.#store();
  }

  #forget(job) {
    this.jobs = this.jobs.filter((other) => other !== job);
    this.#store();
  }

  #store() {
    const kept = this.jobs.map(({ id, prompt, created, status }) => ({ id, prompt, created, status }));
    this.#draw();
    try {
      localStorage.setItem(STORE, JSON.stringify(kept));
    } catch {
      const message = "this browser has no room for more jobs: the next visit will not list the newest; forget some";
      this.onproblem(new CallError(0, [{ field: "", message }]));
    }
  }

  /** Draws the list if anything changed, and leaves the focus where it was. */
  #draw() {
    const drawn = JSON.stringify(this.jobs);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const focused = this.list.contains(document.activeElement)
      ? document.activeElement.getAttribute("aria-label")
      : null;
    this.empty.hidden = this.jobs.length > 0;
    this.clear.hidden = !this.jobs.some(({ status }) => !ACTIVE.has(status));
    this.list.replaceChildren(...this.jobs.map((job) => this.#item(job)));
    if (focused !== null) this.list.querySelector(`[aria-label="${focused}"]`)?.focus();
  }

  #item(job) {
    const button = (name, act) => h("button", { type: "button", "aria-label": `${name} job ${job.id}`, on: { click: act } }, name);
    const isActive = ACTIVE.has(job.status);
    return h("li", { class: "job", "data-status": job.status },
      h("p", { class: "job-head" },
        h("span", { class: "badge" }, h("span", { "aria-hidden": "true" }, MARKS[job.status] ?? "?"), ` ${job.status}`),
        h("span", { class: "job-id" }, `job ${job.id}`),
        h("time", { dateTime: new Date(job.created).toISOString() }, new Date(job.created).toLocaleTimeString())),
      h("p", { class: "job-prompt" }, job.prompt),
      job.text || job.error ? h("p", { class: "job-text" }, job.text ?? job.error) : null,
      h("div", { class: "actions" },
        isActive ? button("Cancel", () => this.#cancel(job)) : null,
        job.status === "finished" && job.text === undefined ? button("Show", async () => { await this.#refresh("GET", job); this.#store(); }) : null,
        job.status === "expired" ? button("Look again", () => this.#lookAgain(job)) : null,
        job.text ? button("Copy", () => copyText(job.text)) : null,
        isActive ? null : button("Forget", () => this.#forget(job))));
  }
}

/** Whether it is a job as this page stores it, and not another page's of the same address. */
function isJob(job) {
  const isDate = Number.isFinite(job?.created) && Math.abs(job.created) < 8e15;
  return isDate && Number.isInteger(job.id) && typeof job.prompt === "string" && job.status in MARKS;
}

function read() {
  try {
    const jobs = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return jobs.filter(isJob);
  } catch {
    return [];
  }
}
