/** The player: an audio element, and the waveform it is steered by. */

import { address, ask } from "/static/api.js";

const NUM_BINS = 600;
const STUCK_MS = 2000;
const POLL_MS = 400;
const MAX_BUFFER_S = 120; // of more, a browser stops reading for longer than the server waits for it
const DRAG_PX = 4;
const ENOUGH_S = 0.5;
const SCALE_PX = 16; // below the waveform are the seconds
const KEY_S = 5;
const PAGE_S = 30;
const STEPS_S = [1, 2, 5, 10, 15, 30, 60];
const QUIET = 0.05; // what is softer is not drawn larger

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

/** @param {number} timeS */
export function clock(timeS) {
  const whole = Math.floor(timeS);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/**
 * Plays one variant of one song at a time. It tells `onTime(timeS)` while it plays, `onDecoded(share)` as the waveform
 * grows, `onPick(startS, endS)` as a part is dragged over, and `onError()`.
 */
export class Player {
  turn = 0; // counts what was opened, so that an answer for something before is let go
  song = "";
  variant = 0;
  durationS = 0;
  /** @type {number[][]} the lowest and highest sample of each part that is decoded */
  bins = [];
  isDecoded = false;
  isFile = false; // which can be sought; a stream cannot
  isWanted = false; // to play; a source that has failed, or is about to, cannot say so
  /** @type {[number, number] | null} the part that is marked, in seconds */
  pick = null;
  audio = /** @type {HTMLAudioElement} */ (byId("audio"));
  canvas = /** @type {HTMLCanvasElement} */ (byId("waveform"));
  screen = /** @type {HTMLElement} */ (byId("screen"));

  /** @param {{onTime: Function, onDecoded: Function, onPick: Function, onError: Function}} listeners */
  constructor(listeners) {
    this.listeners = listeners;
    this.listenToAudio();
    this.listenToHands();
    new ResizeObserver(() => this.draw()).observe(this.screen);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.close();
  }

  /** Begins to load a variant that is made, and to play it when told to. */
  open(/** @type {string} */ song, /** @type {number} */ variant, /** @type {number} */ durationS, isPlayed = false) {
    this.close();
    Object.assign(this, { song, variant, durationS });
    byId("play").disabled = false;
    this.showTime();
    this.load({ max_buffer_s: MAX_BUFFER_S });
    if (isPlayed) this.play();
    void this.follow(this.turn);
  }

  close() {
    this.turn += 1;
    Object.assign(this, { song: "", variant: 0, durationS: 0, bins: [], isDecoded: false, isFile: false, pick: null });
    this.isWanted = false;
    this.audio.removeAttribute("src");
    this.audio.load();
    byId("play").disabled = true;
    this.showTime();
  }

  play() {
    if (this.audio.ended) this.seek(0);
    this.isWanted = true;
    // The browser wants a click first, or the sound fails, which "error" tells.
    this.audio.play().catch(({ name }) => (this.isWanted &&= name !== "NotAllowedError"));
  }

  /** Goes to a time, which the whole song alone allows. */
  seek(/** @type {number} */ timeS) {
    if (!this.isDecoded) return;
    if (!this.isFile) this.load({});
    this.isFile = true;
    this.audio.currentTime = Math.min(Math.max(timeS, 0), this.durationS);
    if (this.isWanted) this.play();
    this.showTime();
  }

  /** Marks a part of the song, in seconds. */
  select(/** @type {[number, number] | null} */ pick) {
    this.pick = pick;
    this.draw();
  }

  /** Sets the source: paced, it is a stream without an end; else a file, once it is decoded. */
  load(/** @type {Record<string, number>} */ pace) {
    const extension = this.audio.canPlayType('audio/webm; codecs="opus"') ? "webm" : "wav";
    this.audio.src = address(`${this.song}/audio.${extension}`, { variant: this.variant, ...pace });
  }

  /** Draws the waveform as it is decoded, until it is whole. */
  async follow(/** @type {number} */ turn) {
    while (turn === this.turn && !this.isDecoded) {
      await this.look();
      await new Promise((resume) => setTimeout(resume, POLL_MS));
    }
  }

  /** Asks once how far it is decoded. */
  async look() {
    const { turn } = this;
    const path = `${this.song}/waveform?variant=${this.variant}&bins=${NUM_BINS}`;
    const found = await ask("GET", path).catch(() => null); // the sound itself tells what is wrong
    if (!found || turn !== this.turn) return;
    this.bins = found.bins;
    this.isDecoded = this.bins.length >= NUM_BINS;
    this.listeners.onDecoded(this.bins.length / NUM_BINS);
    this.showTime();
  }

  listenToAudio() {
    const { audio } = this;
    const showState = () => {
      byId("play").classList.toggle("playing", !audio.paused);
      byId("play").setAttribute("aria-label", audio.paused ? "Play" : "Pause");
      if (!audio.paused) requestAnimationFrame(() => this.animate());
    };
    for (const name of ["play", "pause", "ended", "emptied"]) audio.addEventListener(name, showState);
    audio.addEventListener("timeupdate", () => this.showTime());
    audio.addEventListener("error", async () => {
      await this.look();
      if (!this.mend()) this.listeners.onError();
    });
    // A browser goes on for long before it calls it an error, and does not always say that it waits.
    for (const name of ["waiting", "stalled"]) audio.addEventListener(name, () => this.mend());
    let lastS = -1;
    setInterval(() => {
      if (!audio.paused && audio.currentTime === lastS) this.mend();
      lastS = audio.currentTime;
    }, STUCK_MS);
    audio.addEventListener("pause", () => (this.isWanted &&= audio.ended || !audio.paused));
    audio.addEventListener("ended", () => {
      if (audio.currentTime >= this.durationS - ENOUGH_S || !this.mend()) this.isWanted = false;
    });
    byId("play").addEventListener("click", () => (audio.paused ? this.play() : audio.pause()));
    byId("volume").addEventListener("input", () => (audio.volume = byId("volume").value));
  }

  /** Goes on from the file where a stream has broken off; tells whether it can. */
  mend() {
    const can = this.isDecoded && !this.isFile;
    if (can) this.seek(this.audio.currentTime);
    return can || !this.song;
  }

  animate() {
    this.draw();
    if (!this.audio.paused) requestAnimationFrame(() => this.animate());
  }

  showTime() {
    const timeS = Math.min(this.audio.currentTime, this.durationS);
    byId("time").textContent = `${clock(timeS)} / ${clock(this.durationS)}`;
    this.screen.ariaDisabled = String(!this.isDecoded); // a stream cannot be sought
    this.screen.ariaValueMax = this.durationS.toFixed(1);
    this.screen.ariaValueNow = timeS.toFixed(1);
    this.screen.ariaValueText = `${clock(timeS)} of ${clock(this.durationS)}`;
    this.listeners.onTime(timeS);
    this.draw();
  }

  listenToHands() {
    const { screen } = this;
    let fromX = 0;
    let isDrag = false;
    const timeAt = (/** @type {number} */ x) => {
      const { left, width } = this.canvas.getBoundingClientRect();
      return (Math.min(Math.max(x - left, 0), width) / width) * this.durationS;
    };
    screen.addEventListener("pointerdown", (event) => {
      screen.setPointerCapture(event.pointerId);
      fromX = event.clientX;
      isDrag = false;
    });
    screen.addEventListener("pointermove", (event) => {
      if (!screen.hasPointerCapture(event.pointerId) || !this.durationS) return;
      isDrag ||= Math.abs(event.clientX - fromX) > DRAG_PX;
      if (!isDrag) return;
      const [startS, endS] = [timeAt(fromX), timeAt(event.clientX)].sort((a, b) => a - b);
      this.select([startS, endS]);
      this.listeners.onPick(startS, endS);
    });
    screen.addEventListener("pointerup", (event) => {
      if (!isDrag) this.seek(timeAt(event.clientX));
    });
    screen.addEventListener("keydown", (event) => this.press(event));
  }

  press(/** @type {KeyboardEvent} */ event) {
    const nowS = this.audio.currentTime;
    /** @type {Record<string, () => void>} */
    const keys = {
      ArrowLeft: () => this.seek(nowS - KEY_S),
      ArrowDown: () => this.seek(nowS - KEY_S),
      ArrowRight: () => this.seek(nowS + KEY_S),
      ArrowUp: () => this.seek(nowS + KEY_S),
      PageDown: () => this.seek(nowS - PAGE_S),
      PageUp: () => this.seek(nowS + PAGE_S),
      Home: () => this.seek(0),
      End: () => this.seek(this.durationS),
      " ": () => byId("play").click(),
    };
    if (!keys[event.key] || (event.key !== " " && !this.isDecoded)) return;
    event.preventDefault();
    keys[event.key]();
  }

  draw() {
    const { canvas, durationS } = this;
    const { clientWidth: width, clientHeight: height } = canvas;
    canvas.width = width * devicePixelRatio; // which wipes it
    canvas.height = height * devicePixelRatio;
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    context.scale(devicePixelRatio, devicePixelRatio);
    this.drawWave(context, width, height - SCALE_PX);
    if (!durationS) return;
    context.fillStyle = this.color("played");
    context.fillRect(Math.min(this.audio.currentTime / durationS, 1) * (width - 2), 6, 2, height - SCALE_PX - 12);
    context.fillStyle = this.color("scale");
    const stepS = STEPS_S.find((step) => durationS / step <= width / 70) ?? durationS;
    for (let timeS = 0; timeS < durationS - stepS / 4; timeS += stepS) {
      context.fillText(clock(timeS), (timeS / durationS) * width, height - 8);
    }
  }

  drawWave(/** @type {CanvasRenderingContext2D} */ context, /** @type {number} */ width, /** @type {number} */ height) {
    const loudest = Math.max(QUIET, ...this.bins.flat().map(Math.abs));
    const [wave, played, picked] = ["wave", "played", "picked"].map((name) => this.color(name));
    const [startS, endS] = this.pick ?? [0, 0];
    for (let x = 0; x < width; x += 3) {
      const timeS = (x / width) * this.durationS;
      const isPicked = timeS >= startS && timeS < endS;
      context.fillStyle = isPicked ? picked : timeS < this.audio.currentTime ? played : wave;
      const [low, high] = this.extent(x / width, (x + 3) / width).map((value) => (0.44 * height * value) / loudest);
      context.fillRect(x, height / 2 - high - 0.5, 2, high - low + 1);
    }
  }

  color(/** @type {string} */ name) {
    return getComputedStyle(this.canvas).getPropertyValue(`--${name}`);
  }

  /** The lowest and highest sample between two shares of the song; [0, 0] where nothing is decoded. */
  extent(/** @type {number} */ from, /** @type {number} */ to) {
    const bins = this.bins.slice(Math.floor(from * NUM_BINS), Math.ceil(to * NUM_BINS));
    return [Math.min(...bins.map((bin) => bin[0]), 0), Math.max(...bins.map((bin) => bin[1]), 0)];
  }
}
