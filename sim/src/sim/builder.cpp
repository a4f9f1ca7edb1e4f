// ProgramBuilder: lays out registers, local and shared memory and decodes the
// functions a kernel reaches.
#include <algorithm>
#include <cstring>

#include "ops/control.h"
#include "ptxsim/error.h"
#include "sim/decoder.h"
#include "sim/memory.h"
#include "sim/module.h"

namespace ptxsim {
namespace {

uint32_t align_up(uint64_t v, uint64_t a) { return static_cast<uint32_t>((v + a - 1) / a * a); }

unsigned register_bytes(Type t) {
  if (t == Type::pred) return 4;
  return std::max(2u, size_of(t));  // .b8 registers hold 16 bits, as in hardware
}

}  // namespace

ProgramBuilder::ProgramBuilder(const Module& module, const ast::Function& kernel)
    : module_(module), source_(module.source()), kernel_(kernel), program_(std::make_unique<Program>()) {
  program_->kernel = kernel.name;
  program_->module = &module;
  program_->source = &source_;
  program_->max_threads = kernel.max_threads;
  std::copy_n(kernel.required_threads, 3, program_->required_threads);
  std::copy_n(kernel.required_cluster, 3, program_->required_cluster);
}

std::unique_ptr<Program> ProgramBuilder::build() {
  layout_params();
  layout_shared();
  function_number(kernel_);
  for (uint32_t i = 0; i < program_->functions.size(); ++i) decode_function(i);
  // Functions whose address may be taken are those reached by symbol; they were
  // numbered when an instruction or an initialiser named them.
  for (Inst& in : program_->code) in.op = program_->operands.data() + in.op_index;
  return std::move(program_);
}

void ProgramBuilder::layout_params() {
  uint32_t offset = 0;
  for (uint32_t index : kernel_.params) {
    const ast::Variable& v = kernel_.variables[index];
    offset = align_up(offset, v.align);
    program_->params.push_back(
        {v.name, v.type, offset, static_cast<uint32_t>(v.size), v.align, v.size != size_of(v.type)});
    offset += static_cast<uint32_t>(v.size);
  }
  program_->param_bytes = offset;
}

/// Shared variables of the kernel: module-level ones it names, and those in its
/// own and its callees' bodies, in order of appearance; extern arrays alias the
/// dynamic area behind them.
void ProgramBuilder::layout_shared() {
  std::vector<const ast::Function*> todo{&kernel_};
  std::vector<const ast::Function*> seen;
  auto place = [&](const ast::Variable& v) {
    if (shared_.count(&v)) return;
    if (v.size == 0 || v.external) {
      program_->dynamic_shared_align = std::max(program_->dynamic_shared_align, v.align);
      return;
    }
    shared_top_ = align_up(shared_top_, v.align);
    shared_[&v] = shared_top_;
    shared_top_ += static_cast<uint32_t>(v.size);
  };
  auto visit_symbol = [&](std::string_view name) {
    if (const ast::Variable* v = module_.find_variable(name); v && v->space == Space::shared) place(*v);
    if (const ast::Function* f = module_.find_function(name); f && f->has_body) todo.push_back(f);
  };
  auto visit = [&](auto&& self, const ast::Operand& o) -> void {
    if (o.kind == ast::Operand::symbol) visit_symbol(o.name);
    for (const auto& p : o.parts) self(self, p);
  };
  for (const ast::Variable& v : source_.variables)  // virtual functions and tables of pointers
    for (const ast::Relocation& r : v.relocs)
      if (const ast::Function* f = module_.find_function(r.symbol); f && f->has_body) todo.push_back(f);
  while (!todo.empty()) {
    const ast::Function* f = todo.back();
    todo.pop_back();
    if (std::find(seen.begin(), seen.end(), f) != seen.end()) continue;
    seen.push_back(f);
    for (const ast::Variable& v : f->variables)
      if (v.space == Space::shared) place(v);
    for (const ast::Instruction& in : f->body)
      for (const ast::Operand& o : in.operands) visit(visit, o);
  }
  program_->static_shared_bytes = shared_top_ - kReservedShared;
}

uint64_t ProgramBuilder::shared_offset(const ast::Variable& v, bool) {
  auto it = shared_.find(&v);
  if (it != shared_.end()) return it->second;
  if (v.size == 0 || v.external) return align_up(shared_top_, std::max(program_->dynamic_shared_align, 16u));
  fail("internal error: shared variable ", v.name, " was not laid out");
}

uint32_t ProgramBuilder::function_number(const ast::Function& f) {
  for (uint32_t i = 0; i < program_->functions.size(); ++i)
    if (program_->functions[i].source == &f) return i;
  if (!f.has_body) fail("kernel ", program_->kernel, " needs the undefined function ", f.name);
  FunctionLayout layout;
  layout.source = &f;
  program_->functions.push_back(std::move(layout));
  const auto number = static_cast<uint32_t>(program_->functions.size() - 1);
  if (number) program_->function_by_address[module_.function_address(f)] = number;
  return number;
}

uint32_t ProgramBuilder::variable_offset(uint32_t index) {
  return program_->functions[current_].variable_offset[index];
}

void ProgramBuilder::allocate_registers() {
  frame_top_ = sizeof(FrameHeader);
  slots_.clear();
  registers_.assign(fn_->registers.size(), {});
  for (size_t i = 0; i < registers_.size(); ++i) {
    const Type t = fn_->registers[i].type;
    const unsigned bytes = register_bytes(t);
    const unsigned slot = t == Type::pred ? 4 : bytes * kWarpSize;
    frame_top_ = align_up(frame_top_, std::min(slot, 64u));
    registers_[i] = {frame_top_, Bank::frame, static_cast<uint8_t>(bytes)};
    slots_.push_back({frame_top_, slot, t != Type::pred});
    frame_top_ += slot;
  }
}

void ProgramBuilder::allocate_local() {
  FunctionLayout& layout = program_->functions[current_];
  layout.variable_offset.assign(fn_->variables.size(), 0);
  uint32_t top = 0;
  for (uint32_t i = 0; i < fn_->variables.size(); ++i) {
    const ast::Variable& v = fn_->variables[i];
    if (in_kernel() && i < fn_->params.size()) {
      layout.variable_offset[i] = program_->params[i].offset;
    } else if (v.space == Space::local || v.space == Space::param) {
      top = align_up(top, v.align);
      layout.variable_offset[i] = top;
      top += static_cast<uint32_t>(v.size);
    }
  }
  layout.local_bytes = align_up(top, 16);
}

void ProgramBuilder::decode_function(uint32_t number) {
  current_ = number;
  fn_ = program_->functions[number].source;
  carry_ = {};
  allocate_registers();
  allocate_local();
  branch_fixups_.clear();
  table_fixups_.clear();
  body_to_pc_.clear();
  program_->functions[number].entry_pc = next_pc();
  for (const ast::Instruction& in : fn_->body) {
    body_to_pc_.push_back(next_pc());
    Decode d(*this, in);
    const DecodeFn decode = find_opcode(d.base());
    if (!decode) d.unsupported("unknown opcode " + std::string(d.base()));
    decode(d);
  }
  body_to_pc_.push_back(next_pc());
  emit_implicit_return(*this, fn_->body.empty() ? fn_->line : fn_->body.back().line);
  for (auto [pc, body] : branch_fixups_) program_->code[pc].target = body_to_pc_[body];
  for (auto& [table, bodies] : table_fixups_)
    for (uint32_t b : bodies) program_->branch_tables[table].push_back(body_to_pc_[b]);
  FunctionLayout& layout = program_->functions[number];
  layout.end_pc = next_pc();
  pack_frame();
  layout.frame_bytes = align_up(frame_top_, 64);
}

/// Lets registers share storage, but for those that a wgmma reads or writes after it has been issued.
void ProgramBuilder::pack_frame() {
  if (!table_fixups_.empty()) return;  // branches through tables
  FunctionCode f;
  f.first_pc = program_->functions[current_].entry_pc;
  f.code = std::span(program_->code).subspan(f.first_pc);
  f.operands = program_->operands;
  for (auto [pc, body] : branch_fixups_) f.branches.emplace_back(pc, body_to_pc_[body]);
  auto pin = [&](auto&& self, const ast::Operand& o) -> void {
    if (o.kind == ast::Operand::reg) slots_[o.index].shareable = false;
    for (const ast::Operand& part : o.parts) self(self, part);
  };
  for (const ast::Instruction& in : fn_->body)
    if (in.opcode.starts_with("wgmma"))
      for (const ast::Operand& o : in.operands) pin(pin, o);
  frame_top_ = pack_registers(f, slots_, sizeof(FrameHeader));
}

Operand ProgramBuilder::constant(unsigned bytes, uint64_t bits) {
  auto [it, fresh] = constants_.try_emplace({bytes, bits});
  if (!fresh) return it->second;
  auto& pool = program_->constant_bytes;
  const uint32_t offset = align_up(pool.size(), 64);
  const unsigned store = std::max(bytes, 1u);
  pool.resize(offset + std::max(store, 8u) * kWarpSize, 0);
  for (uint32_t l = 0; l < kWarpSize; ++l) std::memcpy(pool.data() + offset + l * store, &bits, std::min(store, 8u));
  it->second = {offset, Bank::constants, static_cast<uint8_t>(bytes)};
  return it->second;
}

Operand ProgramBuilder::carry() {
  if (!carry_.present()) {
    carry_ = scratch(2);
    carry_.bytes = 4;
  }
  return carry_;
}

Operand ProgramBuilder::scratch(unsigned bytes) {
  frame_top_ = align_up(frame_top_, 64);
  const Operand o{frame_top_, Bank::frame, static_cast<uint8_t>(bytes)};
  slots_.push_back({frame_top_, std::max(bytes, 2u) * kWarpSize, false});
  frame_top_ += slots_.back().bytes;
  return o;
}

void ProgramBuilder::emit(Inst inst, const std::vector<Operand>& operands) {
  if (operands.size() > 255) fail("internal error: too many operands at PTX line ", inst.line);
  inst.n_op = static_cast<uint8_t>(operands.size());
  inst.op_index = static_cast<uint32_t>(program_->operands.size());
  program_->operands.insert(program_->operands.end(), operands.begin(), operands.end());
  program_->code.push_back(inst);
}

std::string Program::where(uint32_t pc) const {
  std::string out = "kernel " + kernel;
  if (pc >= code.size()) return out;
  const Inst& in = code[pc];
  out += ", PTX line " + std::to_string(in.line);
  const ast::SourceLocation& loc = source->locations[in.loc];
  if (loc.line) {
    auto file = source->files.find(loc.file);
    out += " (" + (file == source->files.end() ? std::string("file ?") : file->second) + ":" +
           std::to_string(loc.line) + ")";
  }
  return out + ": " + std::string(source->line_text(in.line));
}

const char* inst_class_name(InstClass c) {
  static constexpr const char* kNames[] = {
      "fp32",       "fp64",      "fp16",      "int",       "logic",      "sfu",        "conversion",
      "move",       "predicate", "mma",       "ld_global", "st_global",  "ld_shared",  "st_shared",
      "ld_local",   "st_local",  "ld_param",  "ld_const",  "ld_generic", "st_generic", "atomic",
      "async_copy", "barrier",   "warp_sync", "branch",    "call",       "fence",      "other"};
  static_assert(std::size(kNames) == static_cast<size_t>(InstClass::count));
  return kNames[static_cast<size_t>(c)];
}

}  // namespace ptxsim
