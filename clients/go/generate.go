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
	"google.golang.org/grpc/status"
	music "soundstage/music/v1"
	types "soundstage/type/v1"
)

var (
	caption  = flag.String("caption", "", "what the music is like")
	duration = flag.Float64("duration", 10, "in seconds")
	seed     = flag.Uint("seed", uint(time.Now().Unix()), "the same one makes the same song")
	encoding = flag.String("encoding", "PCM", "or WAV, FLAC, MP3, OGG_OPUS, WEBM_OPUS, MP4_AAC, MP4_OPUS")
	output   = flag.String("output", "song.pcm", `a file, or "-" for stdout`)
	address  = flag.String("address", "127.0.0.1:50050", "of the gateway")

	song      string
	sink      *os.File // opened with the first audio: a refused request leaves no empty file behind
	nextFrame uint64
	failures  int // in a row
)

func audioAs(encoding string) *music.OutputOptions {
	number, isKnown := types.Encoding_value["ENCODING_"+encoding]
	if !isKnown {
		log.Fatalf("--encoding is %s; see --help", encoding)
	}
	return &music.OutputOptions{Format: &types.AudioFormat{Encoding: types.Encoding(number)}}
}

// take takes what Recv answered of an event of GenerateSong or of StreamAudio.
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGPIPE)
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
		} else if *encoding != "WAV" && *encoding != "PCM" && *output != "-" {
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
		if bad, ok := detail.(*errdetails.BadRequest); ok {
			for _, violation := range bad.FieldViolations {
				log.Printf("%s: %s", violation.Field, violation.Description)
			}
		} else {
			log.Print(detail)
		}
	}
	if _, isCall := status.FromError(err); !isCall || ctx.Err() != nil {
		stop() // so that one more Ctrl-C ends this at once
		songs.CancelSong(context.Background(), &music.CancelSongRequest{Song: song})
	}
	log.Fatal(err)
}
