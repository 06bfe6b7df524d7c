// Makes a song and writes it as it comes, to a file or to a player; after a lost connection it goes on where it was.
package main

import (
	"context"
	"flag"
	"io"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	music "soundstage/music/v1"
	types "soundstage/type/v1"
)

var (
	caption             = flag.String("caption", "", "what the music is like")
	duration            = flag.Float64("duration", 10, "in seconds")
	seed                = flag.Uint("seed", uint(time.Now().Unix()), "the same one makes the same song")
	encoding            = flag.String("encoding", "PCM", "or WAV, FLAC, MP3, OGG_OPUS, WEBM_OPUS, MP4_AAC, MP4_OPUS")
	output              = flag.String("output", "song.pcm", `a file, or "-" for stdout`)
	address             = flag.String("address", "127.0.0.1:50050", "of the gateway")
	song                string
	sink                *os.File // opened with the first audio: a refused request leaves no empty file behind
	nextFrame, failures uint64   // failures in a row
)

func audioAs(encoding string) *music.OutputOptions {
	number, isKnown := types.Encoding_value["ENCODING_"+encoding]
	if !isKnown {
		log.Fatalf("--encoding is %s; see --help", encoding)
	}
	return &music.OutputOptions{Format: &types.AudioFormat{Encoding: types.Encoding(number)}}
}

func take(event interface{ GetAudioChunk() *types.AudioChunk }, err error) error {
	if err != nil {
		return err
	}
	if response, ok := event.(*music.GenerateSongResponse); ok && response.GetAccepted() != nil {
		song = response.GetAccepted().Song
	}
	chunk := event.GetAudioChunk()
	if chunk == nil {
		log.Print(event)
		return nil
	}
	if sink == nil && *output == "-" {
		sink = os.Stdout
	} else if sink == nil {
		sink, err = os.Create(*output)
	}
	if err == nil {
		_, err = sink.Write(chunk.Data)
	}
	if end := chunk.FirstFrame + uint64(chunk.FrameCount); end > nextFrame {
		nextFrame, failures = end, 0
		log.Printf("audio up to frame %d", nextFrame)
	}
	return err
}

func main() {
	log.SetFlags(0)
	flag.Parse()
	base := metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+os.Getenv("SOUNDSTAGE_KEY"))
	ctx, stop := signal.NotifyContext(base, os.Interrupt, syscall.SIGPIPE)
	request := &music.GenerateSongRequest{Caption: *caption, Seeds: []uint32{uint32(*seed)}, Detach: true}
	request.Metadata, request.Output = &types.SongMetadata{DurationS: duration}, audioAs(*encoding)
	channel, err := grpc.Dial(*address, grpc.WithInsecure())
	if err != nil {
		log.Fatal(err)
	}
	songs := music.NewSongServiceClient(channel)
	events, err := songs.GenerateSong(ctx, request)
	for err == nil {
		err = take(events.Recv())
	}
	for status.Code(err) == codes.Unavailable && song != "" && failures < 4 {
		time.Sleep(200 * time.Millisecond << failures)
		failures++
		rest := &music.StreamAudioRequest{Song: song, FirstFrame: nextFrame, Output: audioAs(*encoding)}
		if *encoding == "WAV" && sink != nil {
			rest.Output = audioAs("PCM") // the header has come
		} else if sink == os.Stdout && *encoding != "PCM" {
			log.Print("the connection was lost, and on a pipe only PCM and WAV can go on after that")
			break
		} else if *encoding != "WAV" && *encoding != "PCM" {
			rest.FirstFrame, sink = 0, nil // other files must be of one piece
		}
		log.Printf("the connection was lost; going on at frame %d", rest.FirstFrame)
		events, refusal := songs.StreamAudio(ctx, rest)
		for err = refusal; err == nil; {
			err = take(events.Recv())
		}
	}
	if err == io.EOF {
		return
	}
	for _, detail := range status.Convert(err).Details() {
		log.Print(detail)
		bad, _ := detail.(*errdetails.BadRequest)
		for _, violation := range bad.GetFieldViolations() {
			log.Printf("%s: %s", violation.Field, violation.Description)
		}
	}
	if song != "" { // detached, it would be finished for nobody
		stop() // so that one more Ctrl-C ends this at once
		songs.CancelSong(base, &music.CancelSongRequest{Song: song})
	}
	log.Fatal(err)
}
