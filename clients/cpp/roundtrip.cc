// Reads messages from the wire and writes each as JSON and to the wire again:
//   roundtrip FOLDER soundstage.music.v1.Song.failed.binpb ...
#include <google/protobuf/dynamic_message.h>
#include <google/protobuf/util/json_util.h>

#include <filesystem>
#include <fstream>
#include <iostream>

using namespace google::protobuf;

int main(int argc, char** argv) {
  for (int i = 2; i < argc; ++i) {
    const std::filesystem::path file = argv[i], output = argv[1] / file.stem();
    const Descriptor* kind = DescriptorPool::generated_pool()->FindMessageTypeByName(file.stem().stem());
    if (!kind) return std::cerr << file << " is of no known type\n", 1;
    std::unique_ptr<Message> message(MessageFactory::generated_factory()->GetPrototype(kind)->New());
    std::ifstream bytes(file, std::ios::binary);
    std::string json;
    if (!message->ParseFromIstream(&bytes)) return std::cerr << file << " cannot be read\n", 1;
    if (!util::MessageToJsonString(*message, &json).ok()) return std::cerr << file << " has no JSON\n", 1;
    std::ofstream(output.string() + ".json") << json;
    std::ofstream again(output.string() + ".binpb", std::ios::binary);
    if (!message->SerializeToOstream(&again)) return std::cerr << file << " cannot be written\n", 1;
  }
}
