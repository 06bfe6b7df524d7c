// Makes a song and writes raw PCM (48 kHz, stereo, s16) as it comes; "-" writes to stdout, for a player:
//   node generate.mjs "a calm piano" 10 song.pcm [address]
//   node generate.mjs "a calm piano" 10 - | ffplay -f s16le -ar 48000 -ch_layout stereo -
import fs from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [caption, duration = "10", output = "song.pcm", address = "127.0.0.1:50050"] = process.argv.slice(2);

const protos = fileURLToPath(new URL("../../protos", import.meta.url));
const definition = loader.loadSync("soundstage/music/v1/song_service.proto", {
  includeDirs: [protos], keepCase: true, longs: Number, enums: String, oneofs: true,
});
const { SongService } = grpc.loadPackageDefinition(definition).soundstage.music.v1;

const client = new SongService(address, grpc.credentials.createInsecure());
const fail = (message) => {
  console.error(message);
  process.exitCode = 1;
  call.cancel();
};
let sink; // opened with the first audio: a refused request leaves no empty file behind
const open = () => {
  sink = output === "-" ? process.stdout : fs.createWriteStream(output);
  sink.on("error", (error) => fail(`${output} cannot be written: ${error.message}`));
};
const call = client.GenerateSong({ caption, metadata: { duration_s: Number(duration) } });

const show = {
  accepted: ({ song, seeds }) => console.error(`${song}, seed ${seeds}`),
  plan: ({ metadata: m }) => console.error(`plan: ${m.bpm} bpm, ${m.key_scale}, ${m.duration_s} s`),
  progress: ({ stage, done, total }) => console.error(`${stage} ${done}/${total}`),
  audio_header: ({ frame_count, sample_rate_hz }) => {
    console.error(`audio: ${frame_count / sample_rate_hz} s`);
    open();
  },
  completed: ({ pcm_sha256, peak }) => console.error(`done: peak ${peak}, sha256 ${pcm_sha256.toString("hex")}`),
  // Reading waits while the sink is full: a slow player slows the stream, and nothing piles up here.
  audio_chunk: ({ data }) => {
    if (!sink.write(data)) {
      call.pause();
      sink.once("drain", () => call.resume());
    }
  },
};

call.on("data", (response) => show[response.event](response[response.event]));
call.on("end", () => output === "-" || sink.end());
call.on("error", (error) => {
  if (error.code === grpc.status.CANCELLED) return;
  fail(`${grpc.status[error.code]}: ${error.details}`);
});
process.on("SIGINT", () => call.cancel());
