// Makes a song and writes it as it comes, to a file or to a player; after a lost connection it goes on where it was.
import fs from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const MAX_FAILURES = 4; // in a row

const { values: options } = parseArgs({
  options: {
    caption: { type: "string", default: "" },
    duration: { type: "string", default: "10" }, // in seconds
    seed: { type: "string" }, // drawn by the server when absent
    encoding: { type: "string", default: "PCM" }, // or WAV, FLAC, MP3, OGG_OPUS, WEBM_OPUS, MP4_AAC, MP4_OPUS
    output: { type: "string", default: "song.pcm" }, // a file, or "-" for stdout
    address: { type: "string", default: "127.0.0.1:50050" },
  },
});

const folder = (path) => fileURLToPath(new URL(path, import.meta.url));
const definitions = loader.loadSync(["soundstage/music/v1/song_service.proto", "errors.proto"], {
  includeDirs: [folder("../../protos"), folder("..")], keepCase: true, longs: Number, enums: String, oneofs: true, defaults: true,
});
const { SongService } = grpc.loadPackageDefinition(definitions).soundstage.music.v1;
const client = new SongService(options.address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
if (process.env.SOUNDSTAGE_KEY) metadata.set("authorization", `Bearer ${process.env.SOUNDSTAGE_KEY}`);

const encoding = `ENCODING_${options.encoding}`;
const isKnown = definitions["soundstage.type.v1.Encoding"].type.value.some(({ name }) => name === encoding);
if (!isKnown) {
  console.error(`--encoding is ${options.encoding}; soundstage/type/v1/audio.proto has the names`);
  process.exit(2);
}
let sink, song, nextFrame = 0, failures = 0;

// Resolves when the bytes are gone: a slow player slows the stream, and nothing piles up here.
const write = (data) => new Promise((resolve, reject) => {
  // Opened only now: a refused request leaves no empty file behind.
  sink ??= (options.output === "-" ? process.stdout : fs.createWriteStream(options.output)).on("error", reject);
  sink.write(data, (error) => (error ? reject(error) : resolve()));
});

// Of GenerateSong and of StreamAudio, whose audio events have the same names.
const take = {
  accepted: (accepted) => {
    song = accepted.song;
    console.error(`${song}, seed ${accepted.seeds[0]}`);
  },
  plan: ({ metadata: m }) => console.error(`plan: ${m.bpm} bpm, ${m.key_scale}, ${m.duration_s} s`),
  progress: ({ stage, done, total }) => console.error(`${stage} ${done}/${total}`),
  audio_chunk: async ({ first_frame, frame_count, data }) => {
    await write(data);
    const end = first_frame + frame_count;
    if (end <= nextFrame) return;
    [nextFrame, failures] = [end, 0];
    console.error(`audio up to frame ${end}`);
  },
};

const rest = () => {
  const request = { song, first_frame: nextFrame, output: { format: { encoding } } };
  if (encoding === "ENCODING_WAV" && sink) {
    request.output.format.encoding = "ENCODING_PCM"; // the header has come
  } else if (!["ENCODING_WAV", "ENCODING_PCM"].includes(encoding)) {
    if (sink === process.stdout) throw new Error("the connection was lost, and on a pipe only PCM and WAV can go on");
    [request.first_frame, sink] = [0, undefined]; // other files must be of one piece
  }
  console.error(`the connection was lost; going on at frame ${request.first_frame}`);
  return request;
};

const run = async (request) => {
  let events = client.GenerateSong(request, metadata);
  for (;;) {
    try {
      for await (const response of events) await take[response.event]?.(response[response.event]);
      return;
    } catch (error) {
      if (error.code !== grpc.status.UNAVAILABLE || !song || failures === MAX_FAILURES) throw error;
    }
    await sleep(200 * 2 ** failures++);
    events = client.StreamAudio(rest(), metadata);
  }
};

// Prints a call's status, and its google.rpc details on lines of their own.
const explain = (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  const [bytes] = error.metadata.get("grpc-status-details-bin");
  const details = bytes ? definitions["google.rpc.Status"].deserialize(bytes).details : [];
  for (const { type_url, value } of details) {
    const detail = definitions[type_url.split("/").pop()]?.deserialize(value) ?? {};
    if (detail.reason) console.error(`  reason: ${detail.reason}`);
    for (const { field, description } of detail.field_violations ?? []) console.error(`  ${field}: ${description}`);
    const delay = detail.retry_delay;
    if (delay) console.error(`  try again in ${delay.seconds + delay.nanos / 1e9} s`);
  }
};

// Detached, the song would be finished for nobody.
const cancel = (reason) => client.CancelSong({ song }, metadata, { deadline: Date.now() + 5000 }, () => {
  console.error(`cancelled: ${reason}`);
  process.exit(1);
});
process.on("SIGINT", () => cancel("Ctrl-C"));

try {
  const seeds = options.seed === undefined ? [] : [Number(options.seed)];
  const length = { duration_s: Number(options.duration) };
  await run({ caption: options.caption, seeds, metadata: length, output: { format: { encoding } }, detach: true });
} catch (error) {
  if (error.metadata) {
    explain(error);
    process.exitCode = 1;
  } else cancel(error.message);
}
