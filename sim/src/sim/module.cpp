#include "sim/module.h"

#include <cstdlib>
#include <cstring>

#include "check/allocations.h"
#include "ptxsim/error.h"
#include "sim/decoder.h"
#include "sim/memory.h"

namespace ptxsim {
namespace {
constexpr uint64_t kFunctionStride = 16;
}

Module::Module(std::string ptx) : source_(parse_ptx(std::move(ptx))) {
  allocate_variables();
  apply_relocations();
}

Module::~Module() {
  for (uint8_t* p : allocations_) {
    allocations().remove(p);
    std::free(p);
  }
}

void Module::allocate_variables() {
  for (const ast::Variable& v : source_->variables) {
    if (v.space == Space::shared) continue;
    if (v.external) continue;  // an error only when used
    const size_t bytes = (v.size + 255) / 256 * 256 + 256;
    auto* p = static_cast<uint8_t*>(std::aligned_alloc(256, bytes));
    std::memset(p, 0, bytes);
    if (!v.init.empty()) std::memcpy(p, v.init.data(), v.init.size());
    allocations_.push_back(p);
    memory_[v.name] = p;
    allocations().add(p, v.size, "variable " + v.name, true);
  }
}

void Module::apply_relocations() {
  for (const ast::Variable& v : source_->variables)
    for (const ast::Relocation& r : v.relocs) {
      uint64_t address = 0;
      if (const ast::Variable* target = find_variable(r.symbol)) {
        if (target->space == Space::shared) fail("initialiser of ", v.name, " holds a shared address");
        address = variable_address(r.symbol);
      } else if (const ast::Function* f = find_function(r.symbol)) {
        address = function_address(*f);
      } else {
        fail("initialiser of ", v.name, " names the unknown symbol ", r.symbol);
      }
      address += static_cast<uint64_t>(r.addend);
      std::memcpy(memory_.at(v.name) + r.offset, &address, 8);
    }
}

std::vector<std::string> Module::kernels() const {
  std::vector<std::string> names;
  for (const auto& f : source_->functions)
    if (f->is_entry && f->has_body) names.push_back(f->name);
  return names;
}

bool Module::has_kernel(std::string_view name) const {
  const ast::Function* f = find_function(name);
  return f && f->is_entry && f->has_body;
}

const Program& Module::kernel(std::string_view name) const {
  const std::lock_guard lock(mutex_);
  auto& slot = programs_[std::string(name)];
  if (!slot) {
    if (!has_kernel(name)) fail("the module has no kernel named ", name);
    slot = ProgramBuilder(*this, *find_function(name)).build();
  }
  return *slot;
}

const ast::Variable* Module::find_variable(std::string_view name) const {
  auto it = source_->variable_index.find(name);
  return it == source_->variable_index.end() ? nullptr : &source_->variables[it->second];
}

const ast::Function* Module::find_function(std::string_view name) const {
  auto it = source_->function_index.find(name);
  return it == source_->function_index.end() ? nullptr : source_->functions[it->second].get();
}

uint64_t Module::variable_address(std::string_view name) const {
  auto it = memory_.find(name);
  if (it == memory_.end()) fail("variable ", name, " is extern and has no definition");
  return reinterpret_cast<uint64_t>(it->second);
}

uint64_t Module::function_address(const ast::Function& f) const {
  return kFunctionBase + kFunctionStride * (1 + source_->function_index.at(f.name));
}

const ast::Function* Module::function_at(uint64_t address) const {
  const uint64_t i = (address - kFunctionBase) / kFunctionStride - 1;
  if (address <= kFunctionBase || address % kFunctionStride || i >= source_->functions.size()) return nullptr;
  return source_->functions[i].get();
}

}  // namespace ptxsim
