/** The player: an audio element, and the waveform it is steered by. */

import { address, ask } from "/static/api.js";

const NUM_BINS = 600;
const POLL_MS = 400;
const MAX_BUFFER_S = 120; // of more, a browser stops reading for longer than the server waits for it
const DRAG_PX = 4;
const SCALE_S = [1, 2, 5, 10, 15, 30, 60];

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
  /** @param {{onTime: Function, onDecoded: Function, onPick: Function, onError: Function}} listeners */
  constructor(listeners) {
    this.listeners = listeners;
    this.audio = /** @type {HTMLAudioElement} */ (byId("audio"));
    this.canvas = /** @type {HTMLCanvasElement} */ (byId("waveform"));
    this.screen = /** @type {HTMLElement} */ (byId("screen"));
    this.turn = 0; // counts what was opened, so that an answer for something before is let go
    this.close();
    this.listenToAudio();
    this.listenToHands();
    new ResizeObserver(() => this.draw()).observe(this.screen);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
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
    this.song = "";
    this.variant = 0;
    this.durationS = 0;
    this.bins = /** @type {number[][]} */ ([]);
    this.isDecoded = false;
    this.canSeek = false;
    this.pick = /** @type {[number, number] | null} */ (null);
    this.audio.removeAttribute("src");
    this.audio.load();
    byId("play").disabled = true;
    this.showTime();
  }

  play() {
    this.audio.play().catch(() => {}); // the browser wants a click first, or the sound fails, which "error" tells
  }

  /** Goes to a time, which the whole song alone allows. */
  seek(/** @type {number} */ timeS) {
    if (!this.isDecoded) return;
    if (!this.canSeek) {
      const isPlaying = !this.audio.paused;
      this.load({});
      this.canSeek = true;
      if (isPlaying) this.play();
    }
    this.audio.currentTime = Math.min(Math.max(timeS, 0), this.durationS);
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
      const path = `${this.song}/waveform?variant=${this.variant}&bins=${NUM_BINS}`;
      const { bins, numBins } = await ask("GET", path).catch(() => ({ bins: this.bins, numBins: NUM_BINS }));
      if (turn !== this.turn) return;
      this.bins = bins ?? [];
      this.isDecoded = this.bins.length >= numBins;
      this.listeners.onDecoded(this.bins.length / numBins);
      this.draw();
      await new Promise((resume) => setTimeout(resume, POLL_MS));
    }
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
    audio.addEventListener("error", () => {
      if (this.song) this.listeners.onError();
    });
    byId("play").addEventListener("click", () => (audio.paused ? this.play() : audio.pause()));
    byId("volume").addEventListener("input", () => (audio.volume = byId("volume").value));
  }

  animate() {
    this.draw();
    if (!this.audio.paused) requestAnimationFrame(() => this.animate());
  }

  showTime() {
    const timeS = Math.min(this.audio.currentTime, this.durationS);
    byId("time").textContent = `${clock(timeS)} / ${clock(this.durationS)}`;
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
      ArrowLeft: () => this.seek(nowS - 5),
      ArrowRight: () => this.seek(nowS + 5),
      Home: () => this.seek(0),
      End: () => this.seek(this.durationS),
      " ": () => byId("play").click(),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  draw() {
    const { canvas, durationS } = this;
    const scale = devicePixelRatio;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = canvas.clientHeight * scale;
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    context.scale(scale, scale);
    const style = getComputedStyle(canvas);
    const color = (/** @type {string} */ name) => style.getPropertyValue(name);
    const [wave, played, picked] = [color("--wave"), color("--played"), color("--picked")];
    const { clientWidth: width, clientHeight: height } = canvas;
    const middle = (height - 16) / 2; // below are the seconds
    const nowS = this.audio.currentTime;
    const loudest = Math.max(0.05, ...this.bins.flat().map(Math.abs));
    for (let x = 0; x < width; x += 3) {
      const [low, high] = this.extent(x / width, (x + 3) / width);
      const timeS = (x / width) * durationS;
      const isPicked = this.pick && timeS >= this.pick[0] && timeS < this.pick[1];
      context.fillStyle = isPicked ? picked : timeS < nowS ? played : wave;
      const [top, bottom] = [high, low].map((value) => middle * (1 - (0.88 * value) / loudest));
      context.fillRect(x, top - 0.5, 2, bottom - top + 1);
    }
    if (!durationS) return;
    context.fillStyle = played;
    context.fillRect(Math.min(nowS / durationS, 1) * (width - 2), 6, 2, height - 28);
    context.fillStyle = color("--scale");
    const stepS = SCALE_S.find((step) => durationS / step <= width / 70) ?? durationS;
    for (let timeS = 0; timeS < durationS - stepS / 4; timeS += stepS) {
      context.fillText(clock(timeS), (timeS / durationS) * width, height - 8);
    }
  }

  /** The lowest and highest sample between two shares of the song; [0, 0] where nothing is decoded. */
  extent(/** @type {number} */ from, /** @type {number} */ to) {
    const bins = this.bins.slice(Math.floor(from * NUM_BINS), Math.ceil(to * NUM_BINS));
    return [Math.min(...bins.map(([low]) => low), 0), Math.max(...bins.map(([, high]) => high), 0)];
  }
}
