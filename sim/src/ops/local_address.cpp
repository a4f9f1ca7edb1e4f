#include "ops/local_address.h"

#include "sim/warp.h"

namespace ptxsim {
namespace {

void exec_local_base(Warp& w, const Inst& in) {
  auto* d = w.dst<uint64_t>(in.op[0]);
  for_lanes(w.exec, [&](uint32_t l) { d[l] = w.local; });
}

template <class D>
void exec_add_disp(Warp& w, const Inst& in) {
  const auto* a = w.src<uint64_t>(in.op[1]);
  auto* d = w.dst<D>(in.op[0]);
  for_lanes(w.exec, [&](uint32_t l) { d[l] = static_cast<D>(a[l] + static_cast<uint64_t>(in.disp)); });
}

Inst helper(const ast::Instruction& source, Handler h) {
  Inst in;
  in.exec = h;
  in.klass = InstClass::move;
  in.line = source.line;
  in.loc = source.loc;
  return in;
}

}  // namespace

void emit_local_base(ProgramBuilder& b, const ast::Instruction& source, const Operand& dst) {
  b.emit(helper(source, exec_local_base), {dst});
}

void emit_address(ProgramBuilder& b, const ast::Instruction& source, const Operand& dst, const Operand& base,
                  int64_t disp) {
  Inst in = helper(source, dst.bytes == 8 ? exec_add_disp<uint64_t> : exec_add_disp<uint32_t>);
  in.disp = disp;
  b.emit(in, {dst, base});
}

}  // namespace ptxsim
