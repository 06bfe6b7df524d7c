/** Forms: what they ask for, and what the server finds wrong with it. Inputs are named as the request's fields are. */

import { ServerError } from "/static/api.js";

/** @typedef {import("./api.js").Violation} Violation */

/**
 * Reads a form as a GenerateSongRequest in JSON; what is left empty is left out. Raises ServerError where a number is
 * none, before the server can.
 * @param {HTMLFormElement} form
 */
export function readOrder(form) {
  /** @type {Record<string, any>} */
  const order = {};
  /** @type {Violation[]} */
  const violations = [];
  const readNumber = (/** @type {string} */ field, /** @type {string} */ text) => {
    const number = Number(text.replace(",", "."));
    if (Number.isNaN(number)) violations.push({ field, description: `is “${text}”; must be a number` });
    return number;
  };
  for (const [name, entry] of new FormData(form)) {
    const input = /** @type {HTMLInputElement} */ (form.elements.namedItem(name));
    const text = String(entry).trim();
    if (!text) continue;
    if (name === "seeds") order.seeds = text.split(/[\s,]+/).map((seed) => readNumber(name, seed));
    else if (input.type === "checkbox") put(order, name, JSON.parse(text));
    else put(order, name, input.inputMode ? readNumber(name, text) : entry);
  }
  if (violations.length) throw new ServerError("What is marked is not a number.", 0, violations);
  return order;
}

/**
 * Puts a value where a path such as "task.repaint.start_s" says.
 * @param {Record<string, any>} record @param {string} path @param {unknown} value
 */
function put(record, path, value) {
  const names = path.split(".");
  const last = /** @type {string} */ (names.pop());
  for (const name of names) record = record[name] ??= {};
  record[last] = value;
}

/**
 * Shows an error in a form: its message below, and each field at fault marked.
 * @param {HTMLFormElement} form @param {ServerError | null} error null takes the marks away
 */
export function markErrors(form, error) {
  for (const input of form.querySelectorAll("[aria-invalid]")) unmark(/** @type {HTMLElement} */ (input));
  const alert = /** @type {HTMLElement} */ (form.querySelector("[role=alert]"));
  alert.textContent = error?.message ?? "";
  const marked = (error?.violations ?? []).map((violation) => mark(form, violation)).filter((input) => input !== null);
  (marked[0] ?? (error ? alert : null))?.scrollIntoView({ block: "center" });
  marked[0]?.focus({ preventScroll: true });
}

/**
 * @param {HTMLFormElement} form @param {Violation} violation
 * @returns {HTMLElement | null} the input, if the form has it
 */
function mark(form, { field, description }) {
  const input = form.elements.namedItem(field.replace(/\[.*/, ""));
  if (!(input instanceof HTMLElement)) return null;
  const note = document.createElement("span");
  note.id = `${input.id}-error`;
  note.className = "error";
  note.textContent = description;
  input.after(note);
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", note.id);
  input.closest("details")?.setAttribute("open", "");
  return input;
}

/** @param {HTMLElement} input */
function unmark(input) {
  document.getElementById(`${input.id}-error`)?.remove();
  input.removeAttribute("aria-invalid");
  input.removeAttribute("aria-describedby");
}
