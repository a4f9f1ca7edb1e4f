#include "runtime/fatbin.h"

#include <cstdint>
#include <cstring>

#include "ptxsim/error.h"

namespace ptxsim {
namespace {

constexpr uint32_t kWrapperMagic = 0x466243b1;
constexpr uint32_t kFatbinMagic = 0xba55ed50;
constexpr const char* kFlags =
    "compile with: nvcc --cudart=none --compress-mode=none -gencode arch=compute_XX,code=compute_XX";

struct Wrapper {
  uint32_t magic, version;
  const uint8_t* data;
  const void* unused;
};
struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;  ///< of all entries
};
struct Entry {
  uint16_t kind;  ///< 1 = PTX, 2 = machine code
  uint16_t version;
  uint32_t header_bytes;
  uint64_t payload_bytes;
  uint32_t compressed_bytes, options_offset;
  uint16_t minor, major;
  uint32_t arch;  ///< e.g. 90
  uint32_t name_offset, name_bytes;
  uint64_t flags;
  uint64_t unused;
  uint64_t uncompressed_bytes;
};
constexpr uint64_t kCompressed = 0x2000 | 0x8000;  // LZ4, zstd

}  // namespace

std::string ptx_of_fatbin(const void* pointer, uint32_t arch) {
  Wrapper wrapper;
  std::memcpy(&wrapper, pointer, sizeof wrapper);
  if (wrapper.magic != kWrapperMagic) fail("not a fat binary (bad magic)");
  Header header;
  std::memcpy(&header, wrapper.data, sizeof header);
  if (header.magic != kFatbinMagic)
    fail("not a fat binary (bad header magic); is this relocatable device code (-rdc)?");
  std::string best;
  uint32_t best_arch = 0, newest_refused = 0;
  bool compressed = false, machine_code = false;
  const uint8_t* p = wrapper.data + header.header_bytes;
  const uint8_t* const end = p + header.bytes;
  while (p + sizeof(Entry) <= end) {
    Entry e;
    std::memcpy(&e, p, sizeof e);
    const uint8_t* payload = p + e.header_bytes;
    p = payload + e.payload_bytes;
    if (e.kind != 1) {
      machine_code = true;
      continue;
    }
    if (e.flags & kCompressed) {
      compressed = true;
      continue;
    }
    if (e.arch > arch) {
      newest_refused = e.arch;
      continue;
    }
    if (e.arch < best_arch) continue;
    best_arch = e.arch;
    best.assign(reinterpret_cast<const char*>(payload), e.payload_bytes);
    best.resize(std::strlen(best.c_str()));  // the payload is padded with zeros
  }
  if (!best.empty()) return best;
  if (newest_refused)
    fail("the fat binary holds PTX for sm_", newest_refused, " only, but the simulated device is sm_", arch,
         " (set PTXSIM_ARCH=", newest_refused, ")");
  if (compressed) fail("the PTX in the fat binary is compressed; ", kFlags);
  if (machine_code) fail("the fat binary holds machine code but no PTX; ", kFlags);
  fail("the fat binary is empty; ", kFlags);
}

}  // namespace ptxsim
