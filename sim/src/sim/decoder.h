// Turns the parsed functions a kernel reaches into a Program.
#pragma once
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "sim/program.h"
#include "sim/registers.h"

namespace ptxsim {

class Module;
class ProgramBuilder;

/// Decodes one instruction. A decode function consumes every modifier of the
/// opcode and adds operands in the order its handler expects; whatever is left
/// over is an error, so nothing is ever silently ignored.
class Decode {
 public:
  Decode(ProgramBuilder& builder, const ast::Instruction& source);

  // ---- modifiers ----
  std::string_view base() const { return base_; }
  bool flag(std::string_view name);                                      ///< consumes it if present
  std::string_view pick(std::initializer_list<std::string_view> names);  ///< consumes one, or ""
  Type type();                                                           ///< consumes the first type
  bool has_type() const;
  std::string_view next();  ///< consumes the first modifier
  bool more() const { return !mods_.empty(); }
  const std::vector<std::string_view>& modifiers() const { return mods_; }

  // ---- operands ----
  size_t count() const { return source_.operands.size(); }
  const ast::Operand& arg(size_t i) const;
  void expect_count(size_t n) const;

  Operand out_of(const ast::Operand& o, Type t);
  Operand in_of(const ast::Operand& o, Type t);
  Operand any_register(const ast::Operand& o, unsigned min_bytes);  ///< size may exceed the type
  Operand any_result(const ast::Operand& o, unsigned min_bytes);    ///< the same, written
  Operand any_source(const ast::Operand& o, Type t);                ///< register as is, or immediate
  Operand predicate_of(const ast::Operand& o);                      ///< must not be negated
  void add(const Operand& o) { operands_.push_back(o); }
  Operand take_last() {
    const Operand o = operands_.back();
    operands_.pop_back();
    return o;
  }
  void out(size_t i, Type t) { add(out_of(arg(i), t)); }
  void in(size_t i, Type t) { add(in_of(arg(i), t)); }
  void predicate(size_t i) { add(predicate_of(arg(i))); }
  void absent() { add({}); }
  /// Predicate source that may be negated: sets `negated`.
  void predicate_in(size_t i, bool& negated);
  uint64_t immediate(size_t i) const;
  /// [base + disp]: adds the base, sets the displacement. Variables are resolved by space.
  void address(size_t i, Space space);
  void address_of(const ast::Operand& o, Space space);
  Operand address_base(const ast::Operand& o, Space space, int64_t& disp);
  Operand constant(Type t, uint64_t bits);
  Operand scratch(unsigned bytes);  ///< a register nobody else uses

  // ---- result ----
  Inst inst;
  void exec(Handler h, InstClass c) { inst.exec = h, inst.klass = c; }
  [[noreturn]] void unsupported(const std::string& why = "") const;
  void finish();

  ProgramBuilder& builder() { return builder_; }
  const ast::Instruction& source() const { return source_; }

 private:
  ProgramBuilder& builder_;
  const ast::Instruction& source_;
  std::string_view base_;
  std::vector<std::string_view> mods_;
  std::vector<Operand> operands_;
};

using DecodeFn = void (*)(Decode&);
/// Opcode (text before the first dot) -> decode function, nullptr if unknown.
DecodeFn find_opcode(std::string_view base);

class ProgramBuilder {
 public:
  ProgramBuilder(const Module& module, const ast::Function& kernel);
  std::unique_ptr<Program> build();

  // ---- used by Decode ----
  Program& program() { return *program_; }
  const ast::Function& function() const { return *fn_; }
  const ast::Module& source() const { return source_; }
  const Module& module() const { return module_; }
  Operand register_operand(uint32_t index) const { return registers_[index]; }
  Operand constant(unsigned bytes, uint64_t bits);
  Operand scratch(unsigned bytes);
  uint32_t function_number(const ast::Function& f);  ///< makes it part of the program
  uint32_t variable_offset(uint32_t index);          ///< of the current function, in its space
  uint64_t shared_offset(const ast::Variable& v, bool dynamic_ok);
  void emit(Inst inst, const std::vector<Operand>& operands);
  Operand carry();  ///< the condition code CC.CF of the current function, a predicate
  bool in_kernel() const { return current_ == 0; }
  uint32_t current_function() const { return current_; }
  uint32_t next_pc() const { return static_cast<uint32_t>(program_->code.size()); }

 private:
  void layout_params();
  void decode_function(uint32_t number);
  void allocate_registers();
  void allocate_local();
  void pack_frame();
  void layout_shared();

  const Module& module_;
  const ast::Module& source_;
  const ast::Function& kernel_;
  std::unique_ptr<Program> program_;
  const ast::Function* fn_ = nullptr;
  uint32_t current_ = 0;
  std::vector<Operand> registers_;
  uint32_t frame_top_ = 0;
  std::vector<RegisterSlot> slots_;  ///< of the current function's frame
  std::map<std::pair<unsigned, uint64_t>, Operand> constants_;
  std::map<const ast::Variable*, uint32_t> shared_;
  uint32_t shared_top_ = kReservedShared;
  Operand carry_;
  std::vector<uint32_t> body_to_pc_;
  std::vector<std::pair<uint32_t, uint32_t>> branch_fixups_;  ///< pc, body index
  std::vector<std::pair<uint32_t, std::vector<uint32_t>>> table_fixups_;

 public:
  void add_branch_fixup(uint32_t pc, uint32_t body_index) { branch_fixups_.emplace_back(pc, body_index); }
  void add_table_fixup(uint32_t table, std::vector<uint32_t> body_indices) {
    table_fixups_.emplace_back(table, std::move(body_indices));
  }
};

}  // namespace ptxsim
