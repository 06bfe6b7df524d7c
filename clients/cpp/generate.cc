// Makes a song and writes it as it comes, to a file or to a player; after a lost connection it goes on where it was.
#include <grpcpp/grpcpp.h>
#include <csignal>
#include <fstream>
#include <iostream>
#include <map>
#include <mutex>
#include <thread>
#include "errors.pb.h"
#include "soundstage/music/v1/song_service.grpc.pb.h"

using namespace soundstage::music::v1;
using namespace soundstage::type::v1;
using std::chrono::milliseconds;

std::map<std::string, std::string> options = {
    {"--caption", ""},        {"--duration", "10"},    // in seconds
    {"--seed", ""},           {"--encoding", "PCM"},   // or WAV, FLAC, MP3, OGG_OPUS, WEBM_OPUS, MP4_AAC, MP4_OPUS
    {"--output", "song.pcm"}, {"--address", "127.0.0.1:50050"}};  // output "-" is stdout
std::unique_ptr<SongService::Stub> songs;
std::string song;
std::mutex mutex;  // of song, which the thread that waits for Ctrl-C reads
std::ofstream file;
std::ostream* sink = nullptr;  // opened with the first audio: a refused request leaves no empty file behind
uint64_t next_frame = 0;
int num_failures = 0;  // in a row

struct Call : grpc::ClientContext {
  Call() { if (auto key = std::getenv("SOUNDSTAGE_KEY")) AddMetadata("authorization", std::string("Bearer ") + key); }
};

// Detached, the song would be finished for nobody.
[[noreturn]] void cancel(const std::string& reason) {
  Call context;
  context.set_deadline(std::chrono::system_clock::now() + milliseconds(5000));
  std::lock_guard lock(mutex);
  CancelSongRequest request;
  CancelSongResponse response;
  request.set_song(song);
  songs->CancelSong(&context, request, &response);
  std::cerr << "cancelled: " << reason << std::endl;
  std::_Exit(1);
}

void write(const AudioChunk& chunk) {
  const std::string& output = options["--output"];
  if (!sink) sink = output == "-" ? &std::cout : &(file = std::ofstream(output, std::ios::binary));
  if (!sink->write(chunk.data().data(), chunk.data().size()).flush()) cancel(output + " cannot be written");
  uint64_t end = chunk.first_frame() + chunk.frame_count();
  if (end <= next_frame) return;
  next_frame = end, num_failures = 0;
  std::cerr << "audio up to frame " << end << std::endl;
}

// Takes all events of GenerateSong or of StreamAudio.
template <class Event>
grpc::Status receive(std::unique_ptr<grpc::ClientReader<Event>> events) {
  for (Event event; events->Read(&event);) {
    if constexpr (std::is_same_v<Event, GenerateSongResponse>) {
      std::lock_guard lock(mutex);
      if (event.has_accepted()) song = event.accepted().song();
    }
    if (event.has_audio_chunk())
      write(event.audio_chunk());
    else
      std::cerr << event.ShortDebugString() << std::endl;
  }
  return events->Finish();
}

int main(int argc, char** argv) {
  for (int i = 1; i < argc; i += 2) {
    if (!options.count(argv[i]) || i + 1 == argc) return std::cerr << argv[i] << " is unknown or has no value\n", 2;
    options[argv[i]] = argv[i + 1];
  }
  Encoding encoding;
  if (!Encoding_Parse("ENCODING_" + options["--encoding"], &encoding))
    return std::cerr << "--encoding is " << options["--encoding"] << "; audio.proto has the names\n", 2;
  GenerateSongRequest request;
  request.set_caption(options["--caption"]);
  request.mutable_metadata()->set_duration_s(std::strtod(options["--duration"].c_str(), nullptr));
  if (!options["--seed"].empty()) request.add_seeds(std::strtoul(options["--seed"].c_str(), nullptr, 10));
  request.mutable_output()->mutable_format()->set_encoding(encoding);
  request.set_detach(true);
  std::signal(SIGPIPE, SIG_IGN);  // a player that goes away is an error of write()
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  pthread_sigmask(SIG_BLOCK, &interrupt, nullptr);  // before gRPC starts threads of its own
  songs = SongService::NewStub(grpc::CreateChannel(options["--address"], grpc::InsecureChannelCredentials()));
  std::thread([&] { for (int signal; !sigwait(&interrupt, &signal);) cancel("Ctrl-C"); }).detach();
  Call context;
  grpc::Status status = receive(songs->GenerateSong(&context, request));
  while (status.error_code() == grpc::UNAVAILABLE && !song.empty() && num_failures < 4) {
    std::this_thread::sleep_for(milliseconds(200 << num_failures++));
    StreamAudioRequest rest;
    rest.set_song(song);
    rest.set_first_frame(next_frame);
    rest.mutable_output()->mutable_format()->set_encoding(encoding);
    if (encoding == ENCODING_WAV && sink)
      rest.mutable_output()->mutable_format()->set_encoding(ENCODING_PCM);  // the header has come
    else if (sink == &std::cout && encoding != ENCODING_PCM)
      cancel("the connection was lost, and on a pipe only PCM and WAV can go on after that");
    else if (encoding != ENCODING_WAV && encoding != ENCODING_PCM)
      rest.set_first_frame(0), sink = nullptr;  // other files must be of one piece
    std::cerr << "the connection was lost; going on at frame " << rest.first_frame() << std::endl;
    Call again;
    status = receive(songs->StreamAudio(&again, rest));
  }
  if (!status.ok()) std::cerr << "error " << status.error_code() << ": " << status.error_message() << std::endl;
  google::rpc::Status rich;
  google::rpc::BadRequest bad_request;
  rich.ParseFromString(status.error_details());
  for (const auto& detail : rich.details())
    if (!detail.UnpackTo(&bad_request)) std::cerr << detail.ShortDebugString() << std::endl;
  for (const auto& violation : bad_request.field_violations())
    std::cerr << violation.field() << ": " << violation.description() << std::endl;
  std::_Exit(status.ok() ? 0 : 1);  // past the thread, which still waits
}
