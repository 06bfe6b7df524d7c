// Reads messages from the wire and writes each as JSON and to the wire again:
//   node roundtrip.mjs FOLDER soundstage.music.v1.Song.failed.binpb ...
import { readFileSync, writeFileSync } from "node:fs";
import { basename } from "node:path";
import { fileURLToPath } from "node:url";
import loader from "@grpc/proto-loader";
import protobuf from "protobufjs";

// As JSON has them; of these protobufjs knows Any alone.
const writtenBy = (write) => ({
  fromObject(object) { return this.fromObject(object); },
  toObject(message, options) { return options.json ? write(message) : this.toObject(message, options); },
});
const decimals = (nanos) => String(nanos).padStart(9, "0");
protobuf.wrappers[".google.protobuf.Duration"] = writtenBy(({ seconds, nanos }) => `${seconds}.${decimals(nanos)}s`);
protobuf.wrappers[".google.protobuf.Timestamp"] = writtenBy(({ seconds, nanos }) =>
  `${new Date(Number(seconds) * 1000).toISOString().slice(0, 19)}.${decimals(nanos)}Z`);

const folder = (path) => fileURLToPath(new URL(path, import.meta.url));
const read = { includeDirs: [folder("../../protos"), folder("..")], keepCase: true };
const protos = ["soundstage/music/v1/song_service.proto", "soundstage/type/v1/tensor.proto", "errors.proto"];
const plain = loader.loadSync(protos, read);
const json = loader.loadSync(protos, { ...read, longs: String, enums: String, bytes: String, json: true });

const [output, ...files] = process.argv.slice(2);
for (const file of files) {
  const name = basename(file, ".binpb");
  const type = name.slice(0, name.lastIndexOf("."));
  const bytes = readFileSync(file);
  writeFileSync(`${output}/${name}.json`, JSON.stringify(json[type].deserialize(bytes)));
  writeFileSync(`${output}/${name}.binpb`, plain[type].serialize(plain[type].deserialize(bytes)));
}
