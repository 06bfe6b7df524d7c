/** The page: a form to ask with, the song that is open, and the songs the server keeps. */

import { address, ask, ServerError } from "/static/api.js";
import { markErrors, readOrder } from "/static/order.js";
import { clock, Player } from "/static/player.js";

/** @typedef {Record<string, any>} Json a message of the contract, as protobuf writes it in JSON */
/** @typedef {{plan: Json | null, durationS: number, progress: Json, timings: Json, lines: Json[] | null}} Track */

const FRAMES_PER_S = 48_000;
const RETRY_S = 2; // until a song is watched again whose events broke off
const NO_SONG = ["Nothing is playing", "Say what it should sound like. It plays here as soon as its first second exists."];
/** @type {Record<string, string>} */
const STAGES = { STAGE_LM: "Plan", STAGE_DIT: "Diffusion", STAGE_VAE: "Sound" };
/** @type {Record<string, string>} */
const STATES = { SONG_STATE_RUNNING: "being made", SONG_STATE_CANCELLED: "cancelled", SONG_STATE_FAILED: "failed" };
/** @type {Record<string, string>} */
const METRES = { 2: "2/4", 3: "3/4", 4: "4/4", 6: "6/8" };
const TRACKS = "vocals backing_vocals drums bass guitar keyboard strings synth percussion brass woodwinds fx".split(" ");

/** @param {string} query @returns {any} */
const find = (query) => document.querySelector(query);
const languages = new Intl.DisplayNames(["en"], { type: "language" });

/** The open song: what the server says of it, and a track for each variant. */
const view = {
  song: /** @type {Json | null} */ (null),
  tracks: /** @type {Track[]} */ ([]),
  wanted: "",
  chosen: 0,
  decoded: 0,
  isNew: false,
  askedMs: 0,
  heardAfterS: 0,
  events: /** @type {EventSource | null} */ (null),
};
const list = { songs: /** @type {Json[]} */ ([]), next: "", uploads: /** @type {HTMLOptionElement[]} */ ([]) };

const player = new Player({
  onTime: markLine,
  onDecoded: (/** @type {number} */ share) => {
    view.decoded = share;
    showStages();
  },
  onPick: (/** @type {number} */ startS, /** @type {number} */ endS) => {
    find("#repaint-start").value = startS.toFixed(1);
    find("#repaint-end").value = endS.toFixed(1);
    find("#part").open = true;
  },
  onError: () => attempt(async () => {
    await ask("GET", view.song?.name); // the song may be gone, or the server
    throw new ServerError("The sound broke off. Open the song again to go on listening.");
  }, showAt("#song-error")),
});

/**
 * @param {string} tag @param {Json} properties @param {(Node | string)[]} children
 * @returns {any}
 */
function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** @param {string} text */
function say(text) {
  if (find("#status").textContent !== text) find("#status").textContent = text;
}

/**
 * Does something that asks the server, and shows what it refuses.
 * @param {() => Promise<void>} action @param {(error: ServerError | null) => void} show null when all is well
 */
async function attempt(action, show) {
  try {
    show(null);
    await action();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    show(error);
  }
}

/** @param {string} query where a message is shown @returns {(error: ServerError | null) => void} */
const showAt = (query) => (error) => (find(query).textContent = error?.message ?? "");

/** @param {Json} song */
function titleOf({ request = {} }) {
  const words = request.caption || (request.lyrics ?? "").replace(/\[.*?\]/g, "").trim().split("\n")[0];
  return words || `From ${nameOf(request.source ?? "nothing")}`;
}

/** @param {string} source @returns {string} the title of a song, or a file's name */
function nameOf(source) {
  const song = list.songs.find(({ name }) => source.startsWith(name));
  return song ? titleOf(song) : (list.uploads.find(({ value }) => value === source)?.text ?? source);
}

/** @param {Json} variant */
const secondsOf = (variant) => Number(variant.frameCount ?? 0) / FRAMES_PER_S;

// The songs that are kept

/** Loads the newest songs, or the page of songs that comes after those shown. */
async function loadSongs(isMore = false) {
  await attempt(async () => {
    const { songs, nextPageToken } = await ask("GET", `songs?page_size=50${isMore ? `&page_token=${list.next}` : ""}`);
    Object.assign(list, { songs: isMore ? [...list.songs, ...songs] : songs, next: nextPageToken });
  }, showAt("#songs .error"));
  showSongs();
  if (view.song) showAbout(); // it may be named by its source
}

function showSongs() {
  find("#songs ul").replaceChildren(...list.songs.map(songItem));
  find("#more").hidden = !list.next;
  const source = find("#source");
  const { value } = source;
  source.replaceChildren(...list.uploads, ...list.songs.flatMap(sourceOptions));
  if ([...source.options].some((option) => option.value === value)) source.value = value;
}

/** @param {Json} song */
function songItem(song) {
  const title = titleOf(song);
  const at = new Date(song.createTime).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const state = STATES[song.state] ?? clock(secondsOf(song.variants[0]));
  const open = make("button", { className: "open", onclick: () => openSong(song.name) },
    make("span", {}, title), make("small", {}, `${state} · ${at}`));
  if (song.name === view.song?.name) open.firstChild.setAttribute("aria-current", "true");
  const forget = make("button", { className: "forget", ariaLabel: `Delete ${title}`, onclick: () => deleteSong(song) }, "✕");
  return make("li", {}, open, forget);
}

/** @param {Json} song */
function sourceOptions(song) {
  return song.variants.flatMap((/** @type {Json} */ variant, /** @type {number} */ number) => {
    const label = song.variants.length > 1 ? `${titleOf(song)} (${number + 1})` : titleOf(song);
    return variant.frameCount ? [make("option", { value: `${song.name}/variants/${number}` }, label)] : [];
  });
}

/** @param {Json} song */
async function deleteSong(song) {
  if (!confirm(`Delete “${titleOf(song)}”? It cannot be brought back.`)) return;
  await attempt(async () => {
    await ask("DELETE", song.name);
    if (song.name === view.song?.name) {
      closeSong();
      history.replaceState(null, "", location.pathname + location.search);
    }
  }, showAt("#songs .error"));
  await loadSongs();
}

// The song that is open

/** @param {string} name "songs/{id}" @param {boolean} isNew plays it as soon as it can be heard */
async function openSong(name, isNew = false) {
  closeSong();
  view.wanted = name;
  location.hash = name;
  await attempt(async () => {
    const { song } = await ask("GET", name);
    if (view.wanted !== name) return; // another was opened meanwhile
    view.isNew = isNew;
    view.tracks = song.variants.map(trackOf);
    showSong(song);
    if (song.state === "SONG_STATE_RUNNING") watch(song);
    if (isNew && find("#stage").getBoundingClientRect().bottom > innerHeight) find("#stage").scrollIntoView();
    choose(0);
  }, showAt("#song-error"));
}

function closeSong() {
  view.events?.close();
  Object.assign(view, { song: null, wanted: "", tracks: [], chosen: 0, decoded: 0, isNew: false, heardAfterS: 0, events: null });
  player.close();
  [find("#title").textContent, find("#about").textContent] = NO_SONG;
  find("#song-error").textContent = "";
  find("#stages").replaceChildren();
  find("#download").removeAttribute("href");
  for (const query of ["#cancel", "#variant", "#part", "#plan", "#words"]) find(query).hidden = true;
}

/** @param {Json} variant @returns {Track} */
function trackOf(variant) {
  const timings = Object.fromEntries((variant.timings ?? []).map((/** @type {Json} */ t) => [t.stage, t.durationS ?? 0]));
  return { plan: variant.plan ?? null, durationS: secondsOf(variant), progress: {}, timings, lines: null };
}

/** @param {Json} song */
function showSong(song) {
  find("#repaint-caption").value = song.request.caption ?? "";
  find("#variant").hidden = song.variants.length < 2;
  find("#variant").replaceChildren(make("legend", {}, "Variant"), ...song.variants.flatMap(variantChoice));
  showState(song);
}

/** @param {Json} song as it is now */
function showState(song) {
  view.song = song;
  find("#song-error").textContent = song.error?.message ?? "";
  find("#cancel").hidden = song.state !== "SONG_STATE_RUNNING";
  showSongs();
  showAbout();
  showStages();
}

function showAbout() {
  const { state, request, variants } = /** @type {Json} */ (view.song);
  const source = [...find("#source").options].find((option) => option.value === request.source)?.text ?? request.source;
  const parts = [
    STATES[state],
    `seed ${variants[view.chosen].seed ?? 0}`,
    source && `made from ${source}`,
    view.heardAfterS && `heard after ${view.heardAfterS.toFixed(1)} s`,
  ];
  find("#title").textContent = titleOf(/** @type {Json} */ (view.song));
  find("#about").textContent = parts.filter(Boolean).join(" · ");
}

/** @param {Json} _ @param {number} number */
function variantChoice(_, number) {
  const id = `variant-${number}`;
  const input = make("input", { type: "radio", name: "variant", id, checked: number === view.chosen });
  input.onchange = () => choose(number);
  return [input, make("label", { htmlFor: id }, String(number + 1))];
}

/** @param {number} number the variant to show and play */
function choose(number) {
  const track = view.tracks[number];
  Object.assign(view, { chosen: number, decoded: 0 });
  player.close();
  find("#stages").replaceChildren(...Object.keys(STAGES).map(stageItem));
  showAbout();
  find("#part").hidden = !track.durationS;
  showStages();
  showPlan();
  showLines();
  showDownload();
  if (track.durationS) {
    player.open(view.song?.name, number, track.durationS, view.isNew);
    if (!track.lines) void alignLines(track);
  }
}

/** Follows a song's events until it ends; a lost connection goes on where it was. @param {Json} song */
function watch(song) {
  view.events?.close();
  const events = (view.events = new EventSource(address(`${song.name}/events`)));
  for (const name of Object.keys(ON_EVENT)) {
    events.addEventListener(name, (message) => {
      const event = JSON.parse(message.data);
      const number = event.variant ?? 0;
      ON_EVENT[name](view.tracks[number], event[name], number);
      if (number === view.chosen) showStages();
    });
  }
  const settle = (retryS = RETRY_S) => {
    events.close();
    void endSong(song.name, retryS);
  };
  events.addEventListener("end", (message) => settle(JSON.parse(message.data).error?.retryAfterS));
  events.addEventListener("error", () => {
    if (events.readyState === EventSource.CLOSED) settle();
    else say("The connection is lost; trying again");
  });
}

/** What each event changes. @type {Record<string, (track: Track, said: Json, number: number) => void>} */
const ON_EVENT = {
  plan(track, plan, number) {
    track.plan = plan;
    if (number === view.chosen) showPlan();
  },
  queued(track, queued) {
    track.progress[queued.stage] = queued;
  },
  progress(track, progress) {
    track.progress[progress.stage] = progress;
    say(progress.stage === "STAGE_LM" ? "Planning" : "Diffusing");
  },
  completed(track, completed, number) {
    const isNews = !track.durationS;
    Object.assign(track, { ...trackOf(completed), plan: track.plan, progress: track.progress, lines: track.lines });
    if (isNews && number === view.chosen) choose(number);
    say("Ready to hear");
  },
};

/**
 * Shows how a song ended; one that goes on is watched again, as the server was busy, or away.
 * @param {string} name @param {number} retryS
 */
async function endSong(name, retryS) {
  await attempt(async () => {
    const { song } = await ask("GET", name);
    if (view.song?.name !== name) return;
    showState(song);
    song.variants.forEach((/** @type {Json} */ variant, /** @type {number} */ number) => {
      view.tracks[number].plan ??= variant.plan ?? null;
      if (variant.frameCount) ON_EVENT.completed(view.tracks[number], variant, number);
    });
    if (song.state === "SONG_STATE_RUNNING") setTimeout(() => view.song?.name === name && watch(song), retryS * 1000);
    if (song.state !== "SONG_STATE_COMPLETED") say(`The song is ${STATES[song.state]}`);
  }, showAt("#song-error"));
  await loadSongs();
}

/** @param {string} stage */
function stageItem(stage) {
  const label = STAGES[stage];
  return make("li", {}, make("div", {}, make("b", {}, label), make("span", {})), make("progress", { max: 1, value: 0, ariaLabel: label }));
}

function showStages() {
  const track = view.tracks[view.chosen];
  if (!track || !find("#stages").children.length) return;
  Object.keys(STAGES).forEach((stage, index) => {
    const { share, text } = stage === "STAGE_VAE" ? describeSound(track) : describeStage(track, stage);
    const item = find("#stages").children[index];
    item.querySelector("span").textContent = text;
    item.querySelector("progress").value = share;
  });
}

/** @param {Track} track */
function describeSound(track) {
  if (!track.durationS) return { share: 0, text: "" };
  return { share: view.decoded, text: view.decoded < 1 ? `${Math.floor(view.decoded * 100)} %` : "whole" };
}

/** @param {Track} track @param {string} stage */
function describeStage(track, stage) {
  const { done = 0, total = 0, position, waitS = 0 } = track.progress[stage] ?? {};
  if (track.timings[stage] !== undefined) return { share: 1, text: `${track.timings[stage].toFixed(1)} s` };
  if (track.durationS) return { share: 0, text: "not asked" };
  if (Number(total)) return { share: done / total, text: `${done} of ${total}` };
  if (track.progress[stage]) return { share: 0, text: `${position ?? 0} ahead, ${Math.ceil(waitS)} s` };
  return { share: 0, text: "" };
}

function showPlan() {
  const plan = view.tracks[view.chosen]?.plan;
  find("#plan").hidden = !plan;
  if (!plan) return;
  const { bpm, keyScale, timeSignature, vocalLanguage, durationS } = plan.metadata ?? {};
  const rows = [
    ["bpm", "Tempo", bpm && `${bpm} bpm`],
    ["key_scale", "Key", keyScale],
    ["time_signature", "Metre", METRES[timeSignature] ?? timeSignature],
    ["vocal_language", "Language", vocalLanguage && (vocalLanguage === "unknown" ? "unknown" : languages.of(vocalLanguage))],
    ["duration_s", "Length", durationS && clock(durationS)],
  ];
  find("#plan dl").replaceChildren(...rows.filter(([, , value]) => value).flatMap(([name, label, value]) => [
    make("dt", {}, label), make("dd", {}, value), make("dd", { className: "origin" }, originOf(plan, name)),
  ]));
  find("#plan p").textContent = plan.caption ?? "";
}

/** @param {Json} plan @param {string} name */
function originOf(plan, name) {
  const field = plan.fields?.find((/** @type {Json} */ known) => known.name === name);
  return field?.origin === "ORIGIN_LM" ? "planner" : field?.origin === "ORIGIN_USER" ? "you" : "";
}

/** Asks when each line is sung; a song that cannot say any more keeps its bare lines. @param {Track} track */
async function alignLines(track) {
  if (!view.song?.request.lyrics) return;
  await attempt(async () => {
    track.lines = (await ask("GET", `${view.song?.name}/lyrics?variant=${view.chosen}`)).lines ?? [];
    if (track === view.tracks[view.chosen]) showLines();
  }, () => {});
}

function showLines() {
  const texts = (view.song?.request.lyrics ?? "").split("\n");
  const lines = view.tracks[view.chosen].lines ?? texts.map((/** @type {string} */ text) => ({ text }));
  find("#words").hidden = !view.song?.request.lyrics;
  find("#words ol").replaceChildren(...lines.map(({ text = "" }) =>
    make("li", { className: text.startsWith("[") ? "tag" : "" }, text)));
}

/** @param {number} timeS */
function markLine(timeS) {
  const lines = view.tracks[view.chosen]?.lines ?? [];
  const now = lines.findIndex(({ startS = 0, endS = 0 }) => startS <= timeS && timeS < endS);
  const items = find("#words ol").children;
  if (items[now]?.hasAttribute("aria-current")) return;
  for (const item of items) item.removeAttribute("aria-current");
  items[now]?.setAttribute("aria-current", "true");
  if (items[now]) items[now].parentElement.scrollTop = items[now].offsetTop - 40;
}

function showDownload() {
  const isMade = Boolean(view.tracks[view.chosen]?.durationS);
  const path = `${view.song?.name}/audio.${find("#format").value}`;
  find("#download").ariaDisabled = String(!isMade);
  if (isMade) find("#download").href = address(path, { variant: view.chosen, download: 1 });
  else find("#download").removeAttribute("href");
}

// Asking for songs

/** @param {HTMLFormElement} form @param {() => Json} read the order */
async function submit(form, read) {
  if (form.ariaBusy === "true") return;
  form.ariaBusy = "true";
  view.askedMs = performance.now();
  await attempt(async () => {
    const { song } = await ask("POST", "songs", read());
    await openSong(song.name, true);
    await loadSongs();
  }, (error) => markErrors(form, error));
  form.ariaBusy = "false";
}

/** @returns {Json} a song in the words of the form */
function newSong() {
  const kind = find("#kind").value;
  const order = readOrder(find("#order"));
  return kind ? { ...order, task: { [kind]: order.task?.[kind] ?? {} } } : order;
}

/** @returns {Json} the open song with a part made anew */
function repaintedSong() {
  const { lyrics, instrumental, diffusion, model, adapters } = view.song?.request;
  const source = `${view.song?.name}/variants/${view.chosen}`;
  return { lyrics, instrumental, diffusion, model, adapters, source, ...readOrder(find("#repaint")) };
}

/** Shows what the chosen task needs, and takes what it does not. */
function showTask() {
  const kind = find("#kind").value;
  find("#task").hidden = find("#task").disabled = !kind;
  for (const part of document.querySelectorAll("[data-kind]")) {
    const fieldset = /** @type {HTMLFieldSetElement} */ (part);
    fieldset.hidden = fieldset.disabled = fieldset.dataset.kind !== kind;
  }
  find("#duration").disabled = Boolean(kind); // the song is as long as its source
}

async function upload() {
  const [file] = find("#upload").files;
  if (!file) return;
  find("#upload").value = ""; // so that a file that was mended is news, under its old name too
  say(`Sending ${file.name}`);
  await attempt(async () => {
    const { asset, durationS } = await ask("POST", "assets", file);
    list.uploads.unshift(make("option", { value: asset }, `${file.name}, ${clock(durationS)}`));
    showSongs();
    find("#source").value = asset;
    say(`${file.name} is there`);
  }, (error) => {
    const violations = error ? [{ field: "source", description: error.message }] : [];
    markErrors(find("#order"), error && new ServerError(error.message, error.status, violations));
  });
}

/** Whether a key is written as on a keyboard; the others are the same keys. @param {string} key */
const isPlain = (key) => !/[♯♭]/.test(key);

async function showCapabilities() {
  await attempt(async () => {
    const can = await ask("GET", "capabilities");
    const option = (/** @type {string} */ value, text = value) => make("option", { value }, text);
    const numbers = Array.from({ length: can.maxVariants ?? 1 }, (_, index) => option(String(index + 1)));
    find("#variants").replaceChildren(...numbers);
    find("#key-scale").append(...(can.keyScales ?? []).filter(isPlain).map((/** @type {string} */ key) => option(key)));
    find("#time-signature").append(...(can.timeSignatures ?? []).map((/** @type {string} */ beats) => option(beats, METRES[beats])));
    find("#language").append(...(can.vocalLanguages ?? []).map((/** @type {string} */ code) =>
      option(code, code === "unknown" ? code : languages.of(code))));
    for (const kind of find("#kind").options) kind.hidden = kind.disabled = kind.value && !can.tasks?.includes(kind.value);
    const gone = (can.stages ?? []).filter((/** @type {Json} */ stage) => !stage.reachable);
    say(gone.length ? `${gone.map((/** @type {Json} */ stage) => stage.stage).join(", ")} does not answer` : "Ready");
  }, showAt("#order-error"));
}

function start() {
  for (const select of document.querySelectorAll("select.tracks")) {
    select.append(...TRACKS.map((track) => make("option", { value: `TRACK_${track.toUpperCase()}` }, track.replace("_", " "))));
  }
  for (const [form, read] of [[find("#order"), newSong], [find("#repaint"), repaintedSong]]) {
    form.addEventListener("submit", (/** @type {SubmitEvent} */ event) => {
      event.preventDefault();
      void submit(form, read);
    });
  }
  find("#kind").addEventListener("change", showTask);
  find("#upload").addEventListener("change", upload);
  find("#audio").addEventListener("playing", () => {
    if (!view.isNew || view.heardAfterS) return;
    view.heardAfterS = (performance.now() - view.askedMs) / 1000;
    showAbout();
  });
  find("#format").addEventListener("change", showDownload);
  find("#more").addEventListener("click", () => loadSongs(true));
  find("#instrumental").addEventListener("change", () => (find("#lyrics").disabled = find("#instrumental").checked));
  find("#cancel").addEventListener("click", () =>
    attempt(() => ask("POST", `${view.song?.name}/cancel`), showAt("#song-error")));
  for (const input of [find("#repaint-start"), find("#repaint-end")]) {
    input.addEventListener("input", () => player.select([+find("#repaint-start").value, +find("#repaint-end").value]));
  }
  showTask();
  void showCapabilities();
  void loadSongs();
  addEventListener("hashchange", followAddress);
  followAddress();
}

/** Opens the song that the address names, or none. */
function followAddress() {
  const name = location.hash.slice(1);
  if (name === view.wanted) return;
  if (name.startsWith("songs/")) void openSong(name);
  else closeSong();
}

start();
