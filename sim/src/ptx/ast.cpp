#include "ptx/ast.h"

namespace ptxsim::ast {

const uint32_t* Function::find_label(uint32_t scope, std::string_view name) const {
  for (;; scope = scopes[scope].parent) {
    auto it = scopes[scope].labels.find(name);
    if (it != scopes[scope].labels.end()) return &it->second;
    if (scope == 0) return nullptr;
  }
}

const std::vector<std::string_view>* Function::find_branch_table(uint32_t scope, std::string_view name) const {
  for (;; scope = scopes[scope].parent) {
    auto it = scopes[scope].branch_tables.find(name);
    if (it != scopes[scope].branch_tables.end()) return &it->second;
    if (scope == 0) return nullptr;
  }
}

std::string_view Module::line_text(uint32_t line) const {
  std::string_view rest = *text;
  for (uint32_t i = 1; i < line; ++i) {
    size_t eol = rest.find('\n');
    if (eol == std::string_view::npos) return {};
    rest.remove_prefix(eol + 1);
  }
  rest = rest.substr(0, rest.find('\n'));
  while (!rest.empty() && (rest.front() == ' ' || rest.front() == '\t')) rest.remove_prefix(1);
  while (!rest.empty() && rest.back() == '\r') rest.remove_suffix(1);
  return rest;
}

}  // namespace ptxsim::ast
