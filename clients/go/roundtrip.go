// Reads messages from the wire and writes each as JSON and to the wire again:
// roundtrip FOLDER soundstage.music.v1.Song.failed.binpb ...
package main

import (
	"log"
	"os"
	"path/filepath"
	"strings"

	_ "google.golang.org/genproto/googleapis/rpc/errdetails"
	_ "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	_ "soundstage/music/v1"
	_ "soundstage/type/v1"
)

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func main() {
	for _, file := range os.Args[2:] {
		name := strings.TrimSuffix(filepath.Base(file), ".binpb")
		kind := must(protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(name).Parent()))
		message := kind.New().Interface()
		if err := proto.Unmarshal(must(os.ReadFile(file)), message); err != nil {
			log.Fatal(err)
		}
		written := map[string][]byte{
			".json":  must(protojson.Marshal(message)),
			".binpb": must(proto.MarshalOptions{Deterministic: true}.Marshal(message)),
		}
		for suffix, data := range written {
			if err := os.WriteFile(filepath.Join(os.Args[1], name+suffix), data, 0o644); err != nil {
				log.Fatal(err)
			}
		}
	}
}
