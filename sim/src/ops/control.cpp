// Control flow: bra, brx.idx, call, ret, exit, trap.
#include "ops/control.h"

#include "ops/syscalls.h"
#include "ops/table.h"
#include "sim/memory.h"
#include "sim/module.h"

namespace ptxsim {
namespace {

void exec_bra(Warp& w, const Inst& in) { w.branch(in.target); }
void exec_ret(Warp& w, const Inst&) { w.return_lanes(); }
void exec_exit(Warp& w, const Inst&) { w.exit_lanes(); }
void exec_trap(Warp& w, const Inst&) { fault(w, static_cast<uint32_t>(__builtin_ctz(w.exec)), "trap"); }
void exec_call(Warp& w, const Inst& in) { w.call(in.target, in.imm[0]); }

void exec_brx(Warp& w, const Inst& in) {
  const auto& table = w.program->branch_tables[in.imm[0]];
  const auto* index = w.src<uint32_t>(in.op[0]);
  uint32_t target[kWarpSize] = {};
  for_lanes(w.exec, [&](uint32_t l) {
    if (index[l] >= table.size()) fault(w, l, "brx.idx index out of range");
    target[l] = table[index[l]];
  });
  w.branch_each(target);
}

void exec_call_indirect(Warp& w, const Inst& in) {
  const auto* address = w.src<uint64_t>(in.op[0]);
  uint32_t function[kWarpSize] = {};
  for_lanes(w.exec, [&](uint32_t l) {
    auto it = w.program->function_by_address.find(address[l]);
    if (it == w.program->function_by_address.end()) fault(w, l, "indirect call of an address that is no function");
    function[l] = it->second;
  });
  w.call_each(function, in.imm[0]);
}

void decode_bra(Decode& d) {
  d.flag("uni");
  d.expect_count(1);
  const ast::Operand& o = d.arg(0);
  const uint32_t* body = d.builder().function().find_label(o.scope, o.name);
  if (o.kind != ast::Operand::symbol || !body) d.unsupported("unknown label");
  d.exec(exec_bra, InstClass::branch);
  d.finish();
  d.builder().add_branch_fixup(d.builder().next_pc() - 1, *body);
}

void decode_brx(Decode& d) {
  if (!d.flag("idx")) d.unsupported();
  d.flag("uni");
  d.expect_count(2);
  d.in(0, Type::u32);
  const ast::Operand& o = d.arg(1);
  const auto* names = d.builder().function().find_branch_table(o.scope, o.name);
  if (!names) d.unsupported("unknown .branchtargets");
  std::vector<uint32_t> bodies;
  for (std::string_view name : *names) {
    const uint32_t* body = d.builder().function().find_label(o.scope, name);
    if (!body) d.unsupported("unknown label in .branchtargets");
    bodies.push_back(*body);
  }
  auto& tables = d.builder().program().branch_tables;
  d.inst.imm[0] = static_cast<uint32_t>(tables.size());
  tables.emplace_back();
  d.builder().add_table_fixup(d.inst.imm[0], std::move(bodies));
  d.exec(exec_brx, InstClass::branch);
  d.finish();
}

void add_slots(Decode& d, const ast::Operand& list, std::vector<CallSite::Slot>& out) {
  for (const ast::Operand& o : list.parts) {
    if (o.kind != ast::Operand::variable) d.unsupported("call argument that is not a .param variable");
    const ast::Variable& v = d.builder().function().variables[o.index];
    out.push_back({d.builder().variable_offset(o.index), static_cast<uint32_t>(v.size)});
  }
}

void decode_call(Decode& d) {
  d.flag("uni");
  CallSite site;
  size_t i = 0;
  if (d.count() > 0 && d.arg(0).kind == ast::Operand::vector) add_slots(d, d.arg(i++), site.results);
  const ast::Operand& callee = d.arg(i++);
  if (i < d.count() && d.arg(i).kind == ast::Operand::vector) add_slots(d, d.arg(i++), site.args);
  Program& p = d.builder().program();
  d.inst.imm[0] = static_cast<uint32_t>(p.call_sites.size());
  p.call_sites.push_back(site);
  if (callee.kind == ast::Operand::reg) {
    d.add(d.in_of(callee, Type::u64));
    d.exec(exec_call_indirect, InstClass::call);
    // Any function of the module may be the target.
    for (const auto& f : d.builder().source().functions)
      if (!f->is_entry && f->has_body) d.builder().function_number(*f);
    return d.finish();
  }
  if (callee.kind != ast::Operand::symbol) d.unsupported("call target");
  if (const Handler h = find_syscall(callee.name)) {
    d.exec(h, InstClass::call);
    return d.finish();
  }
  const ast::Function* f = d.builder().module().find_function(callee.name);
  if (!f || !f->has_body) d.unsupported("call of the undefined function " + std::string(callee.name));
  d.inst.target = d.builder().function_number(*f);
  d.exec(exec_call, InstClass::call);
  d.finish();
}

void decode_ret(Decode& d) {
  d.flag("uni");
  d.exec(exec_ret, InstClass::branch);
  d.finish();
}
void decode_exit(Decode& d) {
  d.exec(exec_exit, InstClass::branch);
  d.finish();
}
void decode_trap(Decode& d) {
  d.exec(exec_trap, InstClass::other);
  d.finish();
}

}  // namespace

void emit_implicit_return(ProgramBuilder& b, uint32_t line) {
  Inst in;
  in.exec = exec_ret;
  in.klass = InstClass::branch;
  in.line = line;
  b.emit(in, {});
}

void register_control(OpcodeTable& t) {
  t["bra"] = decode_bra;
  t["brx"] = decode_brx;
  t["call"] = decode_call;
  t["ret"] = decode_ret;
  t["exit"] = decode_exit;
  t["trap"] = decode_trap;
  t["brkpt"] = decode_trap;
}

}  // namespace ptxsim
