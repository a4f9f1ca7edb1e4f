// A loaded PTX module: its variables have memory, its kernels decode on demand.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ptx/ast.h"
#include "sim/program.h"

namespace ptxsim {

class Module {
 public:
  explicit Module(std::string ptx);
  ~Module();
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  const ast::Module& source() const { return *source_; }
  std::vector<std::string> kernels() const;
  bool has_kernel(std::string_view name) const;
  /// The decoded kernel (cached); throws Error if it cannot be simulated.
  const Program& kernel(std::string_view name) const;

  const ast::Variable* find_variable(std::string_view name) const;
  const ast::Function* find_function(std::string_view name) const;
  /// Host address of a .global or .const variable.
  uint64_t variable_address(std::string_view name) const;
  uint64_t function_address(const ast::Function& f) const;
  const ast::Function* function_at(uint64_t address) const;

 private:
  void allocate_variables();
  void apply_relocations();

  std::unique_ptr<ast::Module> source_;
  std::unordered_map<std::string_view, uint8_t*> memory_;
  std::vector<uint8_t*> allocations_;
  mutable std::mutex mutex_;
  mutable std::unordered_map<std::string, std::unique_ptr<Program>> programs_;
};

}  // namespace ptxsim
