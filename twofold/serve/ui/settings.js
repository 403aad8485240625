/* What to ask of the sampler. A field left empty is not sent: the server's own default holds. */

import { el } from "/ui/element.js";

const STORE = "twofold.settings";

/* Names are the API's; `hint` is one line for a reader who has never met the word. */
const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.01, hint: "0 always takes the likeliest token; higher wanders more." },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, hint: "Choose among the likeliest tokens that together hold this share." },
  { name: "top_k", label: "Top k", min: 0, max: 100000, step: 1, hint: "Choose among this many tokens; 0 is all of them." },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "Leave out tokens less likely than this share of the likeliest." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.05, max: 5, step: 0.01, hint: "Above 1 makes what was already said less likely." },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 1000000, step: 1, hint: "The longest answer, in tokens." },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, step: 1, hint: "The same seed and question give the same answer." },
];
const TEXTS = [
  { name: "stop", label: "Stop at", empty: "never", hint: "The answer ends before any of these, one in a line; \\n is a new line." },
  { name: "system", label: "System prompt", empty: "none", hint: "Told to the model before every conversation." },
];

/** The settings form: built from the tables above, remembered in localStorage as it changes. */
export class Settings {
  constructor(form, model) {
    this.form = form;
    this.model = model;
    this.hint = el("p", { class: "hint", id: "hint" });
    const [stop, system] = TEXTS.map((field) => this.field(field, el("textarea", { rows: 1, spellcheck: "false", placeholder: field.empty })));
    const numbers = NUMBERS.map((field) => this.field(field, el("input", { type: "number", min: field.min, max: field.max, step: field.step, inputmode: "decimal", placeholder: "default" })));
    form.append(system, el("div", { class: "grid" }, numbers, stop), this.hint);
    this.recall();
    form.addEventListener("input", () => this.changed());
    form.addEventListener("submit", (event) => event.preventDefault());
    form.querySelector("#reset").addEventListener("click", () => this.reset());
  }

  /** The body of a request but for its messages. */
  sampling() {
    const chosen = NUMBERS.map(({ name }) => [name, this.form.elements[name].value]).filter(([, value]) => value !== "");
    const stop = this.form.elements.stop.value.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
    return {
      model: this.model.value,
      stream: true,
      stream_options: { include_usage: true },
      logprobs: true,
      top_logprobs: 5,
      ...Object.fromEntries(chosen.map(([name, value]) => [name, Number(value)])),
      ...(stop.length ? { stop } : {}),
    };
  }

  /** The system prompt as a message, or none. */
  system() {
    const content = this.form.elements.system.value.trim();
    return content ? [{ role: "system", content }] : [];
  }

  /** The first field that holds what the API would refuse, or null. */
  invalid() {
    return [...this.form.querySelectorAll("input")].find(wrong) ?? null;
  }

  field({ name, label, hint }, input) {
    input.name = name;
    input.id = `set-${name}`;
    input.setAttribute("aria-describedby", "hint");
    const tell = () => (this.hint.textContent = `${label}: ${hint}`);
    input.addEventListener("focus", tell);
    const box = el("div", { class: "setting", on: { pointerenter: tell } }, el("label", { for: input.id }, label), input);
    return box;
  }

  changed() {
    const values = [...NUMBERS, ...TEXTS].map(({ name }) => [name, this.form.elements[name].value]);
    localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(values.filter(([, value]) => value !== ""))));
    for (const input of this.form.querySelectorAll("input")) input.setAttribute("aria-invalid", String(wrong(input)));
    const bad = this.invalid();
    if (bad) this.hint.textContent = allowed(bad);
  }

  recall() {
    let values = {};
    try {
      values = JSON.parse(localStorage.getItem(STORE)) ?? {};
    } catch {
      localStorage.removeItem(STORE); // not ours, or cut short: start afresh
    }
    for (const { name } of [...NUMBERS, ...TEXTS]) {
      if (typeof values[name] === "string") this.form.elements[name].value = values[name];
    }
    this.changed();
  }

  reset() {
    this.form.reset();
    this.changed();
    this.hint.textContent = "All settings are the server's own.";
  }
}

/** What a number field takes, as a sentence. */
export function allowed(input) {
  return `${input.labels[0].textContent} is a ${input.step === "1" ? "whole number" : "number"} from ${input.min} to ${input.max}.`;
}

/* A step of 0.01 is for the arrow keys; a finer number is as good. Counts must be whole. */
function wrong({ validity, step }) {
  return validity.badInput || validity.rangeUnderflow || validity.rangeOverflow || (step === "1" && validity.stepMismatch);
}
