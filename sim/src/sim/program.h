// The decoded form of one kernel: what the interpreter executes.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptx/ast.h"
#include "ptx/types.h"

namespace ptxsim {

struct Warp;
struct Inst;
class Module;

constexpr uint32_t kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

/// Executes one instruction for the lanes in Warp::exec.
using Handler = void (*)(Warp&, const Inst&);

/// Where an operand's 32 lane values lie (contiguous, lane 0 first).
/// A predicate is one 32-bit lane mask instead.
enum class Bank : uint8_t {
  frame,      ///< registers of the current function activation
  constants,  ///< immediates, broadcast to 32 lanes
  special,    ///< special registers of the warp
};

struct Operand {
  uint32_t offset = 0;
  Bank bank = Bank::frame;
  uint8_t bytes = 0;     ///< per lane; 0 = absent ("_")
  bool written = false;  ///< a result; never set for what an instruction also reads
  bool present() const { return bytes != 0; }
};

/// Classes of the dynamic instruction counters.
enum class InstClass : uint8_t {
  fp32,
  fp64,
  fp16,
  int_,
  logic,
  sfu,
  conversion,
  move,
  predicate,
  mma,
  ld_global,
  st_global,
  ld_shared,
  st_shared,
  ld_local,
  st_local,
  ld_param,
  ld_const,
  ld_generic,
  st_generic,
  atomic,
  async_copy,
  barrier,
  warp_sync,
  branch,
  call,
  fence,
  other,
  count
};
const char* inst_class_name(InstClass c);

/// Which vote on lanes an access needs; see memory.h.
struct MemoryAccess {
  Space space = Space::generic;
  uint8_t elem_bytes = 0;
  uint8_t vec = 1;
  bool volatile_or_relaxed = false;  ///< a strong access: polls, so yield to others
  bool deferred = false;             ///< cp.async: done when the thread has waited for it
  bool cluster = false;              ///< .shared::cluster: other CTAs' shared memory allowed
};

struct Inst {
  Handler exec = nullptr;
  const Operand* op = nullptr;  ///< destination(s) first
  uint32_t guard_offset = 0;    ///< predicate in the frame
  uint32_t guard_flip = 0;      ///< all ones for @!p
  bool guarded = false;
  uint8_t n_op = 0;
  InstClass klass = InstClass::other;
  uint8_t variant = 0;          ///< handler-specific selector
  uint32_t target = 0;          ///< branch target, callee or other index
  uint32_t imm[3] = {0, 0, 0};  ///< handler-specific
  int64_t disp = 0;             ///< address displacement
  MemoryAccess mem;
  uint32_t line = 0;
  uint32_t loc = 0;
  uint32_t op_index = 0;  ///< where `op` starts in Program::operands
};

/// Layout of a function's activation record.
struct FunctionLayout {
  const ast::Function* source = nullptr;
  uint32_t entry_pc = 0;
  uint32_t end_pc = 0;
  uint32_t frame_bytes = 0;               ///< registers
  uint32_t local_bytes = 0;               ///< per lane: .local variables and .param areas
  std::vector<uint32_t> variable_offset;  ///< per ast variable, in its space
};

struct KernelParam {
  std::string name;
  Type type = Type::b8;
  uint32_t offset = 0;
  uint32_t size = 0;
  uint32_t align = 1;
  bool is_array = false;  ///< .b8 name[n]: a by-value struct
};

/// A call's argument areas, as offsets in the caller's local frame.
struct CallSite {
  struct Slot {
    uint32_t offset, size;
  };
  std::vector<Slot> args, results;
};

struct Program {
  std::string kernel;
  const Module* module = nullptr;
  const ast::Module* source = nullptr;
  std::vector<Inst> code;
  std::vector<Operand> operands;
  std::vector<FunctionLayout> functions;  ///< [0] is the kernel
  std::unordered_map<uint64_t, uint32_t> function_by_address;
  std::vector<CallSite> call_sites;
  std::vector<std::vector<uint32_t>> branch_tables;
  std::vector<uint8_t> constant_bytes;  ///< bank `constants`
  std::vector<KernelParam> params;
  uint32_t param_bytes = 0;
  uint32_t static_shared_bytes = 0;  ///< .shared variables
  uint32_t dynamic_shared_align = 16;
  uint32_t max_threads = 0;
  uint32_t required_threads[3] = {0, 0, 0};
  uint32_t required_cluster[3] = {0, 0, 0};
  /// Matrix instructions: operations per warp, by pc; the counters derive from it.
  struct MmaWork {
    Type type;
    uint64_t flops;
  };
  std::unordered_map<uint32_t, MmaWork> mma_work;

  /// "kernel k, PTX line 12 (file.cu:34): instruction"
  std::string where(uint32_t pc) const;
};

/// Shared memory below this address is reserved by the system, as on sm_80+.
constexpr uint32_t kReservedShared = 1024;

/// Frame header: where each lane returns to.
struct FrameHeader {
  uint32_t return_pc[kWarpSize];
  uint32_t caller_frame[kWarpSize];
  uint32_t caller_local[kWarpSize];
  uint32_t call_site[kWarpSize];
};

/// Slots of the special bank, each 32 lanes; 64-bit ones first.
enum class Special : uint32_t {
  zero64,
  shared_base64,
  param_base64,
  gridid64,  // 64-bit
  zero32,
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  smid,
  nsmid,
  lanemask_eq,
  lanemask_le,
  lanemask_lt,
  lanemask_ge,
  lanemask_gt,
  clusterid_x,
  clusterid_y,
  clusterid_z,
  nclusterid_x,
  nclusterid_y,
  nclusterid_z,
  cluster_ctaid_x,
  cluster_ctaid_y,
  cluster_ctaid_z,
  cluster_nctaid_x,
  cluster_nctaid_y,
  cluster_nctaid_z,
  cluster_ctarank,
  cluster_nctarank,
  is_explicit_cluster,
  total_smem_size,
  dynamic_smem_size,
  aggr_smem_size,
  reserved_smem_offset,
  envreg1,
  envreg2,  // address of the cooperative launch's workspace, high and low word
  count
};
constexpr uint32_t kSpecial64Count = 4;
constexpr uint32_t special_offset(Special s) {
  const auto i = static_cast<uint32_t>(s);
  return i < kSpecial64Count ? i * 256 : kSpecial64Count * 256 + (i - kSpecial64Count) * 128;
}
constexpr uint32_t kSpecialBankBytes = special_offset(Special::count);

}  // namespace ptxsim
