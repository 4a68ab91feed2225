// Starts the page and connects its parts.

import { CallError, call, key } from "./api.js";
import { legend } from "./canvas.js";
import { h } from "./dom.js";
import { SettingsForm } from "./form.js";
import { Jobs } from "./jobs.js";
import { hashOf, readHash } from "./link.js";
import { describe } from "./model.js";
import { bodyOf, fieldsOf, needsKey } from "./schema.js";
import { Thread } from "./thread.js";

const HEALTH_MILLISECONDS = 10_000;
const REMEMBER_MILLISECONDS = 300;
/** What a visitor begins with; side B differs, so that there is something to compare. */
const FIRST_SETTINGS = { a: { gen_length: "64" }, b: { gen_length: "64", confidence_threshold: "0.9" } };

const $ = (id) => document.getElementById(id);
const state = {
  mode: "prompt",
  /** Whether the model says which mode to begin with: you have not chosen one. */
  isModeOpen: true,
  fields: [],
  forms: {},
  threads: {},
  jobs: null,
  remembering: null,
};

async function start() {
  $("legend").append(legend());
  const linked = readHash(location.hash);
  watchHealth();
  listen();
  let schema;
  try {
    schema = await (await call("GET", "openapi.json")).json();
  } catch (error) {
    showProblems(error, "a");
    return;
  }
  $("key-row").hidden = !needsKey(schema);
  $("key").value = key.get();
  build(fieldsOf(schema), linked);
  await readModel();
}

function build(fields, linked) {
  state.fields = fields;
  for (const [side, title] of [["a", "Settings A"], ["b", "Settings B"]]) {
    const form = new SettingsForm({ side, title, fields, onchange: remember });
    state.forms[side] = form;
    $("forms").append(form.element);
  }
  for (const mode of ["chat", "prompt", "pair"]) {
    const thread = new Thread({ mode, fields, onlink: linkTo, onproblems: showRefusal, onredo: redo });
    state.threads[mode] = thread;
    $("threads").append(thread.element);
  }
  state.jobs = new Jobs({ onproblem: (error) => showProblems(error, "a") });
  $("threads").append(state.jobs.element);
  if (matchMedia("(max-width: 60rem)").matches) $("settings").open = false;
  const settings = linked?.settings ?? FIRST_SETTINGS;
  for (const [side, form] of Object.entries(state.forms)) form.values = settings[side];
  if (linked !== null) $("prompt").value = linked.prompt;
  state.isModeOpen = linked === null;
  show(linked?.mode ?? "prompt");
}

/** Says which model is served, with prompts to try. */
async function readModel() {
  let list;
  try {
    list = await (await call("GET", "v1/models")).json();
  } catch (error) {
    if (error.status === 401) $("about").textContent = "Enter your API key to see which model is served.";
    else showProblems(error, "a");
    return;
  }
  const model = list.data[0];
  const { name, facts, about, mode, examples } = describe(model);
  $("model").textContent = $("served").textContent = name;
  document.title = `${name} · dLLM-Serve`;
  $("facts").textContent = facts.join(" · ");
  $("about").textContent = about;
  $("examples").replaceChildren(...examples.map(({ prompt, fields = {} }) =>
    h("li", {}, h("button", { type: "button", on: { click: () => tryExample(prompt, fields) } }, prompt))));
  for (const thread of Object.values(state.threads)) {
    thread.maskIdOf = (name) => (list.data.find(({ id }) => id === name) ?? model).mask_token_id;
  }
  if (list.data.length > 1) {
    const names = list.data.map(({ id }) => id);
    for (const form of Object.values(state.forms)) form.offer("model", names);
  }
  if (state.isModeOpen) show(mode);
}

function tryExample(prompt, fields) {
  $("prompt").value = prompt;
  for (const form of Object.values(state.forms)) form.fill(fields);
  run();
}

/** Switches to a mode. */
function show(mode) {
  state.mode = mode;
  document.querySelector(`[name="mode"][value="${mode}"]`).checked = true;
  document.body.dataset.mode = mode;
  for (const [name, thread] of Object.entries(state.threads)) thread.element.hidden = name !== mode;
  state.jobs.element.hidden = mode !== "jobs";
  state.forms.b.element.hidden = mode !== "pair";
  state.forms.a.heading.hidden = mode !== "pair";
  $("lines-row").hidden = mode !== "jobs";
  $("legend").hidden = mode === "jobs";
  $("start").textContent = mode === "jobs" ? "Submit" : "Denoise";
  if (mode === "jobs") state.jobs.watch();
  update();
  remember();
}

/** Shows which buttons there are now. */
function update() {
  const thread = state.threads[state.mode];
  $("intro").hidden = state.mode === "jobs" || !thread.isEmpty;
  const isRunning = thread?.isRunning ?? false;
  $("clear").hidden = thread === undefined || thread.isEmpty || isRunning;
  $("clear").textContent = state.mode === "chat" ? "New chat" : "Clear";
  const [shown, other] = isRunning ? [$("stop"), $("start")] : [$("start"), $("stop")];
  const hadFocus = document.activeElement === other;
  shown.hidden = false;
  other.hidden = true;
  if (hadFocus) shown.focus();
}

/** The settings of the sides that the mode has. */
function settingsNow() {
  const sides = state.mode === "pair" ? ["a", "b"] : ["a"];
  return Object.fromEntries(sides.map((side) => [side, state.forms[side].values]));
}

async function run() {
  const prompt = $("prompt").value;
  if (state.threads[state.mode]?.isRunning) return;
  state.isModeOpen = false;
  clearProblems();
  if (prompt.trim() === "") {
    showProblems(new CallError(0, [{ field: "prompt", message: "write something first" }]), "a");
    return;
  }
  if (state.mode === "jobs") await submit(prompt);
  else if (await ask(prompt, settingsNow()) && state.mode === "chat") $("prompt").value = "";
}

async function ask(prompt, settings, before = null) {
  const thread = state.threads[state.mode];
  const asking = thread.ask(prompt, settings, before);
  update();
  try {
    return await asking;
  } finally {
    update();
  }
}

function redo(prompt, settings, before) {
  if (state.threads[state.mode].isRunning) return;
  clearProblems();
  ask(prompt, settings, before);
}

async function submit(text) {
  const prompts = $("lines").checked ? text.split("\n").filter((line) => line.trim() !== "") : [text];
  try {
    await state.jobs.submit(prompts, (prompt) => bodyOf(state.fields, state.forms.a.values, prompt));
    $("prompt").value = "";
  } catch (error) {
    showProblems(error, "a");
  }
}

/** Shows why an answer failed; the page first takes the shape in which it stays. */
function showRefusal(error, side) {
  update();
  showProblems(error, side);
}

/** Shows what went wrong beside the field it names, or above the button. */
function showProblems(error, side) {
  if (!(error instanceof CallError)) throw error;
  if (error.status === 401) {
    $("key-row").hidden = false;
    showAt("key", "key-error", error.problems[0].message);
    return;
  }
  const others = state.forms[side]?.showProblems(error.problems) ?? error.problems;
  const ofPrompt = others.filter(({ field }) => ["prompt", "prompts", "messages"].includes(field));
  if (ofPrompt.length > 0) showAt("prompt", "prompt-error", ofPrompt.map(({ message }) => message).join("; "));
  const rest = others.filter((problem) => !ofPrompt.includes(problem));
  if (rest.length > 0) {
    $("problem").textContent = rest.map(({ field, message }) => (field ? `${field}: ${message}` : message)).join("; ");
    $("problem").hidden = false;
  }
}

function showAt(control, place, message) {
  $(place).textContent = message;
  $(place).hidden = false;
  $(control).setAttribute("aria-invalid", "true");
  $(control).focus();
}

function clearProblems() {
  for (const form of Object.values(state.forms)) form.clearProblems();
  for (const id of ["prompt-error", "problem", "key-error"]) $(id).hidden = true;
  for (const id of ["prompt", "key"]) $(id).removeAttribute("aria-invalid");
}

/** The address that shows these settings. */
function linkTo(prompt, settings) {
  return new URL(hashOf({ mode: state.mode, prompt, settings }), location.href).href;
}

/** Keeps the settings in the address; after a pause, as browsers refuse many changes in a row. */
function remember() {
  clearTimeout(state.remembering);
  state.remembering = setTimeout(() => {
    history.replaceState(null, "", linkTo($("prompt").value, settingsNow()));
  }, REMEMBER_MILLISECONDS);
}

async function watchHealth() {
  if (!document.hidden) {
    const message = await healthNow();
    $("health").dataset.ok = String(message === "ready");
    if ($("health").textContent !== message) $("health").textContent = message;
  }
  setTimeout(watchHealth, HEALTH_MILLISECONDS);
}

async function healthNow() {
  try {
    const { status, reason } = await (await fetch("v1/health")).json();
    return status === "ok" ? "ready" : `not ready: ${reason}`;
  } catch {
    return "the server cannot be reached";
  }
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("prompt").addEventListener("input", remember);
  if (!CSS.supports("field-sizing", "content")) {
    $("prompt").addEventListener("input", () => grow($("prompt")));
  }
  $("stop").addEventListener("click", () => state.threads[state.mode].stop());
  $("clear").addEventListener("click", () => {
    state.threads[state.mode].clear();
    update();
    $("prompt").focus();
  });
  $("key").addEventListener("change", () => {
    key.set($("key").value);
    clearProblems();
    readModel();
    if (state.mode === "jobs") state.jobs.watch();
  });
  for (const input of document.querySelectorAll('[name="mode"]')) {
    input.addEventListener("change", () => {
      state.isModeOpen = false;
      show(input.value);
    });
  }
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    } else if (event.key === "Escape") {
      state.threads[state.mode]?.stop();
      state.threads[state.mode]?.pause();
    }
  });
}

/** Makes an area as high as its text, where styles alone cannot. */
function grow(area) {
  area.style.blockSize = "auto";
  area.style.blockSize = `${area.scrollHeight}px`;
}

start();
