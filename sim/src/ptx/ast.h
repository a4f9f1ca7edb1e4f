// What the parser makes of a PTX module: declarations and undecoded instructions.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ptx/types.h"

namespace ptxsim::ast {

/// An initialiser word that holds the address of another symbol.
struct Relocation {
  uint32_t offset = 0;
  std::string symbol;
  int64_t addend = 0;
  bool generic = false;  ///< generic(sym): a generic address
};

struct Variable {
  std::string name;
  Space space = Space::global;
  Type type = Type::b8;
  uint64_t size = 0;  ///< bytes; 0 for an unsized extern array
  uint32_t align = 1;
  bool external = false;
  std::vector<uint8_t> init;  ///< empty: zero-initialised
  std::vector<Relocation> relocs;
};

struct Register {
  std::string name;
  Type type = Type::b32;
};

struct Operand {
  enum Kind : uint8_t {
    reg,       ///< index = register of the function
    imm,       ///< bits (+ real32 / real64 flag)
    variable,  ///< index = variable of the function (.local/.param/.shared in its body)
    symbol,    ///< name of a module-level variable, function or label; + offset
    special,   ///< name of a special register
    address,   ///< [base + offset], base = parts[0] if any; parts[1] = tensor coordinates
    vector,    ///< {a, b, ...}
    sink,      ///< _
  };
  enum Number : uint8_t { integer, real32, real64 };

  Kind kind = imm;
  Number number = integer;
  bool negated = false;  ///< !p
  uint32_t index = 0;
  uint32_t scope = 0;  ///< the {} block a symbol is named in (labels are local to blocks)
  uint64_t bits = 0;
  int64_t offset = 0;
  std::string_view name;
  std::vector<Operand> parts;
  std::vector<Operand> second;  ///< the q of "p|q", at most one
};

struct Instruction {
  std::string_view opcode;  ///< full spelling, dots included
  std::vector<Operand> operands;
  std::vector<Operand> guard;  ///< @p / @!p, at most one
  uint32_t line = 0;
  uint32_t loc = 0;  ///< index into Module::locations, 0 = unknown
};

struct SourceLocation {
  uint32_t file = 0;
  uint32_t line = 0;
};

/// A {} block: the labels defined in it. Lookup continues in the parent.
struct Scope {
  uint32_t parent = 0;
  std::unordered_map<std::string_view, uint32_t> labels;  ///< -> index into body
  /// .branchtargets lists, by the label in front of them
  std::unordered_map<std::string_view, std::vector<std::string_view>> branch_tables;
};

struct Function {
  std::string name;
  bool is_entry = false;
  bool has_body = false;
  std::vector<uint32_t> params;   ///< indices into variables
  std::vector<uint32_t> results;  ///< likewise
  std::vector<Register> registers;
  std::vector<Variable> variables;
  std::vector<Instruction> body;
  std::vector<Scope> scopes;  ///< scopes[0] is the whole body
  uint32_t max_threads = 0;   ///< .maxntid / .reqntid product, 0 = unset
  uint32_t required_threads[3] = {0, 0, 0};
  uint32_t required_cluster[3] = {0, 0, 0};
  uint32_t line = 0;

  const uint32_t* find_label(uint32_t scope, std::string_view name) const;
  const std::vector<std::string_view>* find_branch_table(uint32_t scope, std::string_view name) const;
};

struct Module {
  std::shared_ptr<const std::string> text;  ///< names refer into it
  std::string target;                       ///< e.g. sm_90a
  std::vector<Variable> variables;
  std::vector<std::unique_ptr<Function>> functions;
  std::unordered_map<std::string_view, uint32_t> variable_index;
  std::unordered_map<std::string_view, uint32_t> function_index;
  std::vector<SourceLocation> locations{{}};
  std::map<uint32_t, std::string> files;

  std::string_view line_text(uint32_t line) const;
};

}  // namespace ptxsim::ast

namespace ptxsim {
/// Parses PTX text; throws Error with the line on anything it does not know.
std::unique_ptr<ast::Module> parse_ptx(std::string text);
}  // namespace ptxsim
