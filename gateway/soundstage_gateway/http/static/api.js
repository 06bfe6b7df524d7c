/** The server: one way to ask it, one kind of error, one key. */

/** @typedef {{field: string, description: string}} Violation */

const KEY = "soundstage-key";

/** What the server refused, or that it was not there. */
export class ServerError extends Error {
  /**
   * @param {string} message for people
   * @param {number} status HTTP status; 0 when no answer came
   * @param {Violation[]} violations the fields at fault
   */
  constructor(message, status = 0, violations = []) {
    super(message);
    this.status = status;
    this.violations = violations;
  }
}

/**
 * A URL for players, which cannot send a header: it carries the key.
 * @param {string} path
 * @param {Record<string, string | number>} query
 */
export function address(path, query = {}) {
  const key = sessionStorage.getItem(KEY);
  const search = new URLSearchParams(Object.entries(key ? { ...query, key } : query).map(([k, v]) => [k, String(v)]));
  return `/v1/${path}?${search}`;
}

/**
 * Asks the server; raises ServerError. Asks the listener for a key when the server does.
 * @param {string} method
 * @param {string} path below /v1/
 * @param {object | File} [body] sent as JSON; a file as it is
 * @returns {Promise<any>} the answer's JSON
 */
export async function ask(method, path, body) {
  const key = sessionStorage.getItem(KEY);
  const answer = await send(method, path, body);
  if (answer.status === 401) {
    const error = await readError(answer);
    // While this was on its way another may have been given.
    if (sessionStorage.getItem(KEY) === key) await askForKey(error);
    return ask(method, path, body);
  }
  if (!answer.ok) throw await readError(answer);
  return answer.status === 204 ? null : answer.json();
}

/** @param {string} method @param {string} path @param {object | File} [body] */
async function send(method, path, body) {
  const headers = new Headers();
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  const isFile = body instanceof File;
  if (body && !isFile) headers.set("Content-Type", "application/json");
  try {
    return await fetch(`/v1/${path}`, { method, headers, body: isFile ? body : body && JSON.stringify(body) });
  } catch {
    throw new ServerError("The server does not answer. What you wrote is still here: try again in a while.");
  }
}

/** @param {Response} answer */
async function readError(answer) {
  const { error } = await answer.json().catch(() => ({}));
  if (!error) return new ServerError(`The server answered ${answer.status} ${answer.statusText}.`, answer.status);
  const later = error.retryAfterS ? ` Try again in ${Math.ceil(error.retryAfterS)} s.` : "";
  const id = answer.status === 500 && error.requestId ? ` (${error.requestId})` : ""; // by which the log has it
  return new ServerError(error.message + later + id, answer.status, error.violations);
}

/** @type {Promise<void> | null} */
let asking = null;

/** Opens the dialog for the key, once for all who wait; raises the error again when it is left without one. */
function askForKey(/** @type {ServerError} */ error) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = /** @type {HTMLDialogElement} */ (document.querySelector("#key"));
    const input = /** @type {HTMLInputElement} */ (dialog.querySelector("input"));
    /** @type {HTMLElement} */ (dialog.querySelector(".error")).textContent = error.message;
    dialog.onclose = () => {
      asking = null;
      sessionStorage.setItem(KEY, input.value);
      if (dialog.returnValue === "use" && input.value) resolve();
      else reject(error);
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}
