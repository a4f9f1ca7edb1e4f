// Recursive-descent parser for PTX modules.
#include <algorithm>
#include <bit>
#include <cstring>

#include "ptx/ast.h"
#include "ptx/lexer.h"
#include "ptxsim/error.h"

namespace ptxsim {
namespace {

using ast::Operand;

/// Names visible in one {} block of a function body.
struct NameScope {
  uint32_t id = 0;
  std::unordered_map<std::string, uint32_t> registers;
  std::unordered_map<std::string, std::pair<Type, uint64_t>> families;  ///< "%r" of ".reg .b32 %r<9>"
  std::unordered_map<std::string, uint32_t> variables;
};

class Parser {
 public:
  explicit Parser(std::string text) : module_(std::make_unique<ast::Module>()) {
    module_->text = std::make_shared<const std::string>(std::move(text));
    tokens_ = tokenize(*module_->text);
  }

  std::unique_ptr<ast::Module> run() {
    while (peek().kind != Token::end) top_level();
    return std::move(module_);
  }

 private:
  // ---- tokens -------------------------------------------------------------
  const Token& peek(size_t ahead = 0) const { return tokens_[std::min(pos_ + ahead, tokens_.size() - 1)]; }
  const Token& take() { return tokens_[std::min(pos_++, tokens_.size() - 1)]; }
  bool accept(char c) { return peek().is(c) ? (++pos_, true) : false; }
  bool accept(std::string_view s) { return peek().is(s) ? (++pos_, true) : false; }
  void expect(char c) {
    if (!accept(c)) error(std::string("expected '") + c + "'");
  }
  [[noreturn]] void error(const std::string& what) const {
    fail("PTX line ", peek().line, ": ", what, ", found '", peek().text, "' in: ", module_->line_text(peek().line));
  }
  std::string_view ident() {
    if (peek().kind != Token::ident) error("expected a name");
    return take().text;
  }
  int64_t integer() {
    const bool minus = accept('-');
    if (peek().kind != Token::integer) error("expected an integer");
    const auto v = static_cast<int64_t>(take().bits);
    return minus ? -v : v;
  }

  // ---- module level ---------------------------------------------------------
  void top_level() {
    bool external = false;
    for (;; take()) {
      if (peek().is(".extern"))
        external = true;
      else if (!(peek().is(".visible") || peek().is(".weak") || peek().is(".common")))
        break;
    }
    const Token& t = peek();
    if (accept(".version")) {
      take();
      return;
    }
    if (accept(".target")) {
      module_->target = ident();
      while (accept(',')) ident();
      return;
    }
    if (accept(".address_size")) {
      if (integer() != 64) error("only 64-bit PTX is supported");
      return;
    }
    if (accept(".file")) return file_directive();
    if (accept(".section")) return skip_section();
    if (accept(".pragma")) {
      while (!accept(';')) take();
      return;
    }
    if (accept(".entry")) return function(true);
    if (accept(".func")) return function(false);
    if (accept(".alias")) error(".alias is not supported");
    Space space;
    if (accept(".global"))
      space = Space::global;
    else if (accept(".const"))
      space = Space::constant;
    else if (accept(".shared"))
      space = Space::shared;
    else if (t.is(';')) {
      take();
      return;
    } else
      error("unsupported module-level directive");
    for (ast::Variable& v : variables(space)) {
      v.external = external;
      auto found = module_->variable_index.find(v.name);
      if (found != module_->variable_index.end()) {
        ast::Variable& old = module_->variables[found->second];
        if (old.external) old = std::move(v);  // a declaration, now defined
        continue;
      }
      module_->variables.push_back(std::move(v));
      const auto name = intern(module_->variables.back().name);
      module_->variable_index.emplace(name, static_cast<uint32_t>(module_->variables.size() - 1));
    }
  }

  /// Strings used as keys must outlive vector growth: keep the PTX text's own copy.
  std::string_view intern(const std::string& name) {
    const size_t at = module_->text->find(name);
    return std::string_view(*module_->text).substr(at, name.size());
  }

  void file_directive() {
    const auto id = static_cast<uint32_t>(integer());
    if (peek().kind != Token::string) error("expected a file name");
    module_->files[id] = std::string(take().text);
    while (accept(',')) integer();
  }

  void skip_section() {
    take();
    expect('{');
    while (!accept('}')) {
      if (peek().kind == Token::end) error("unterminated .section");
      take();
    }
  }

  // ---- variables ------------------------------------------------------------
  /// After the state space: [.align n] .type name[dims] [= init], ... ;
  std::vector<ast::Variable> variables(Space space) {
    std::vector<ast::Variable> out;
    ast::Variable common;
    common.space = space;
    variable_type(common);
    do {
      ast::Variable v = common;
      declarator(v);
      if (accept('=')) initialiser(v);
      out.push_back(std::move(v));
    } while (accept(','));
    expect(';');
    return out;
  }

  void variable_type(ast::Variable& v) {
    uint32_t align = 0, lanes = 1;
    for (;;) {
      if (accept(".align"))
        align = static_cast<uint32_t>(integer());
      else if (accept(".v2"))
        lanes = 2;
      else if (accept(".v4"))
        lanes = 4;
      else if (accept(".ptr")) {
        while (peek().is(".global") || peek().is(".shared") || peek().is(".const") || peek().is(".local") ||
               peek().is(".generic"))
          take();
      } else if (accept(".attribute")) {
        expect('(');
        while (!accept(')')) take();
      } else
        break;
    }
    const std::string_view text = ident();
    const auto type = text[0] == '.' ? parse_type(text.substr(1)) : std::nullopt;
    if (!type) error("expected a type");
    v.type = *type;
    v.size = size_of(*type) * lanes;
    // Parameter attributes may also follow the type: .u64 .ptr .align 1
    for (;;) {
      if (accept(".ptr") || accept(".global") || accept(".shared") || accept(".const") || accept(".local")) continue;
      if (accept(".align")) {
        integer();
        continue;
      }
      break;
    }
    v.align = align ? align : static_cast<uint32_t>(v.size);
  }

  void declarator(ast::Variable& v) {
    v.name = ident();
    while (accept('[')) {
      if (accept(']')) {
        v.size = 0;
        continue;
      }
      v.size *= static_cast<uint64_t>(integer());
      expect(']');
    }
  }

  void initialiser(ast::Variable& v) {
    const unsigned width = size_of(v.type);
    std::vector<uint8_t> bytes;
    if (accept('{')) {
      init_list(v, width, bytes);
    } else {
      init_item(v, width, bytes);
    }
    if (v.size == 0) v.size = bytes.size();
    bytes.resize(v.size, 0);
    v.init = std::move(bytes);
  }

  void init_list(ast::Variable& v, unsigned width, std::vector<uint8_t>& bytes) {
    if (accept('}')) return;
    do {
      if (accept('{'))
        init_list(v, width, bytes);
      else
        init_item(v, width, bytes);
    } while (accept(','));
    expect('}');
  }

  void init_item(ast::Variable& v, unsigned width, std::vector<uint8_t>& bytes) {
    uint64_t bits = 0;
    const bool minus = accept('-');
    if (peek().kind == Token::integer || peek().kind == Token::real32 || peek().kind == Token::real64) {
      const Token& t = take();
      bits = t.bits;
      if (t.kind == Token::integer && minus) bits = 0 - bits;
      if (t.kind == Token::real64 && v.type == Type::f32)
        bits = std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<double>(bits)));
    } else {
      ast::Relocation reloc;
      reloc.offset = static_cast<uint32_t>(bytes.size());
      std::string_view name = ident();
      if (name == "generic" && accept('(')) {
        reloc.generic = true;
        name = ident();
        expect(')');
      }
      if (name.substr(0, 4) == "mask") error("mask() initialisers are not supported");
      reloc.symbol = name;
      if (accept('+'))
        reloc.addend = integer();
      else if (peek().is('-'))
        reloc.addend = integer();
      if (width != 8) error("an address needs a 64-bit initialiser");
      v.relocs.push_back(std::move(reloc));
    }
    for (unsigned i = 0; i < width; ++i) bytes.push_back(static_cast<uint8_t>(bits >> (8 * i)));
  }

  // ---- functions ------------------------------------------------------------
  void function(bool entry) {
    auto fn = std::make_unique<ast::Function>();
    fn->is_entry = entry;
    fn->line = peek().line;
    fn->scopes.emplace_back();
    fn_ = fn.get();
    scopes_.assign(1, NameScope{});
    if (!entry && peek().is('(')) fn->results = parameter_list();
    fn->name = ident();
    if (peek().is('(')) fn->params = parameter_list();
    attributes();
    if (accept('{')) {
      fn->has_body = true;
      block();
    } else {
      expect(';');
    }
    fn_ = nullptr;

    const std::string_view key = intern(fn->name);
    auto found = module_->function_index.find(key);
    if (found != module_->function_index.end()) {
      auto& old = module_->functions[found->second];
      if (!old->has_body)
        old = std::move(fn);
      else if (fn->has_body)
        fail("PTX line ", fn->line, ": function ", fn->name, " is defined twice");
      return;
    }
    module_->function_index.emplace(key, static_cast<uint32_t>(module_->functions.size()));
    module_->functions.push_back(std::move(fn));
  }

  std::vector<uint32_t> parameter_list() {
    std::vector<uint32_t> out;
    expect('(');
    if (accept(')')) return out;
    do {
      if (!accept(".param")) error("expected .param");
      ast::Variable v;
      v.space = Space::param;
      variable_type(v);
      declarator(v);
      out.push_back(add_variable(std::move(v)));
    } while (accept(','));
    expect(')');
    return out;
  }

  uint32_t add_variable(ast::Variable v) {
    const auto index = static_cast<uint32_t>(fn_->variables.size());
    scopes_.back().variables[v.name] = index;
    fn_->variables.push_back(std::move(v));
    return index;
  }

  /// Performance directives between the signature and the body.
  void attributes() {
    auto dims = [&](uint32_t* out) {
      out[0] = out[1] = out[2] = 1;
      int i = 0;
      do out[i++] = static_cast<uint32_t>(integer());
      while (i < 3 && accept(','));
    };
    for (;;) {
      uint32_t d[3];
      if (accept(".maxntid")) {
        dims(d);
        fn_->max_threads = d[0] * d[1] * d[2];
      } else if (accept(".reqntid")) {
        dims(fn_->required_threads);
        fn_->max_threads = fn_->required_threads[0] * fn_->required_threads[1] * fn_->required_threads[2];
      } else if (accept(".reqnctapercluster")) {
        dims(fn_->required_cluster);
      } else if (accept(".minnctapersm") || accept(".maxnreg") || accept(".maxclusterrank") ||
                 accept(".maxnctapersm")) {
        integer();
      } else if (accept(".pragma")) {
        while (!accept(';')) take();
      } else if (accept(".noreturn") || accept(".explicitcluster") || accept(".blocksareclusters")) {
      } else {
        return;
      }
    }
  }

  void block() {
    while (!accept('}')) {
      if (peek().kind == Token::end) error("unterminated function body");
      if (accept('{')) {
        NameScope inner;
        inner.id = static_cast<uint32_t>(fn_->scopes.size());
        fn_->scopes.push_back({scopes_.back().id, {}, {}});
        scopes_.push_back(std::move(inner));
        block();
        scopes_.pop_back();
      } else {
        statement();
      }
    }
  }

  void statement() {
    const Token& t = peek();
    if (accept(';')) return;
    if (t.kind == Token::ident && t.text[0] == '.') return body_directive();
    if (t.kind == Token::ident && peek(1).is(':')) return label();
    instruction();
  }

  void body_directive() {
    if (accept(".reg")) return registers();
    if (accept(".loc")) return loc();
    if (accept(".pragma")) {
      while (!accept(';')) take();
      return;
    }
    if (accept(".file")) return file_directive();
    Space space;
    if (accept(".local"))
      space = Space::local;
    else if (accept(".shared"))
      space = Space::shared;
    else if (accept(".param"))
      space = Space::param;
    else if (accept(".global"))
      space = Space::global;
    else if (accept(".const"))
      space = Space::constant;
    else
      error("unsupported directive in a function body");
    for (ast::Variable& v : variables(space)) add_variable(std::move(v));
  }

  void registers() {
    if (peek().is(".v2") || peek().is(".v4")) error("vector registers are not supported");
    const std::string_view text = ident();
    const auto type = parse_type(text.substr(1));
    if (!type) error("unknown register type");
    do {
      const std::string name(ident());
      if (accept('<')) {
        scopes_.back().families[name] = {*type, static_cast<uint64_t>(integer())};
        expect('>');
      } else {
        scopes_.back().registers[name] = new_register(name, *type);
      }
    } while (accept(','));
    expect(';');
  }

  uint32_t new_register(const std::string& name, Type type) {
    fn_->registers.push_back({name, type});
    return static_cast<uint32_t>(fn_->registers.size() - 1);
  }

  /// .loc file line column [, function_name label [+ n], inlined_at file line column]
  void loc() {
    ast::SourceLocation here;
    here.file = static_cast<uint32_t>(integer());
    here.line = static_cast<uint32_t>(integer());
    integer();
    while (accept(',')) {
      if (accept("function_name")) {
        ident();
        if (accept('+')) integer();
      } else if (accept("inlined_at")) {
        integer(), integer(), integer();
      } else {
        error("unknown .loc attribute");
      }
    }
    if (here.line == 0) return;
    module_->locations.push_back(here);
    current_loc_ = static_cast<uint32_t>(module_->locations.size() - 1);
  }

  void label() {
    const std::string_view name = ident();
    expect(':');
    ast::Scope& scope = fn_->scopes[scopes_.back().id];
    if (accept(".branchtargets")) {
      auto& list = scope.branch_tables[name];
      do list.push_back(ident());
      while (accept(','));
      expect(';');
    } else if (accept(".callprototype")) {
      while (!accept(';')) take();
    } else if (accept(".calltargets")) {
      while (!accept(';')) take();
    } else if (!scope.labels.emplace(name, static_cast<uint32_t>(fn_->body.size())).second) {
      error("label " + std::string(name) + " is defined twice");
    }
  }

  // ---- instructions -----------------------------------------------------------
  void instruction() {
    ast::Instruction in;
    in.line = peek().line;
    in.loc = current_loc_;
    if (accept('@')) {
      const bool negated = accept('!');
      Operand p = operand();
      p.negated = negated;
      in.guard.push_back(std::move(p));
      in.line = peek().line;
    }
    in.opcode = ident();
    if (!peek().is(';')) {
      const bool is_call = in.opcode.substr(0, 4) == "call";
      do in.operands.push_back(is_call && peek().is('(') ? call_list() : operand());
      while (accept(','));
    }
    expect(';');
    fn_->body.push_back(std::move(in));
  }

  /// The (…) lists of a call become vectors.
  Operand call_list() {
    Operand out;
    out.kind = Operand::vector;
    expect('(');
    if (accept(')')) return out;
    do out.parts.push_back(operand());
    while (accept(','));
    expect(')');
    return out;
  }

  Operand operand() {
    Operand o;
    if (accept('!')) {
      o = operand();
      o.negated = true;
      return o;
    }
    if (peek().is('{')) return vector_operand();
    if (peek().is('[')) return address();
    if (peek().is('-') || peek().kind != Token::ident) return number();
    o = name_operand();
    if (accept('|')) o.second.push_back(operand());
    return o;
  }

  Operand number() {
    Operand o;
    const bool minus = accept('-');
    const Token& t = take();
    switch (t.kind) {
      case Token::integer:
        o.bits = minus ? 0 - t.bits : t.bits;
        break;
      case Token::real32:
        o.number = Operand::real32;
        o.bits = minus ? t.bits ^ (1ull << 31) : t.bits;
        break;
      case Token::real64:
        o.number = Operand::real64;
        o.bits = minus ? t.bits ^ (1ull << 63) : t.bits;
        break;
      default:
        --pos_;
        error("expected an operand");
    }
    return o;
  }

  Operand vector_operand() {
    Operand o;
    o.kind = Operand::vector;
    expect('{');
    if (accept('}')) return o;
    do o.parts.push_back(operand());
    while (accept(','));
    expect('}');
    return o;
  }

  Operand address() {
    Operand o;
    o.kind = Operand::address;
    expect('[');
    if (peek().kind == Token::integer || peek().is('-')) {
      o.offset = integer();
    } else {
      Operand base = name_operand();
      o.offset = base.offset;
      base.offset = 0;
      o.parts.push_back(std::move(base));
      if (accept(',')) o.parts.push_back(operand());
    }
    expect(']');
    return o;
  }

  /// A register, variable, special register or symbol, with optional +/- offset.
  Operand name_operand() {
    Operand o;
    const std::string_view name = ident();
    o.name = name;
    if (name == "_") {
      o.kind = Operand::sink;
      return o;
    }
    if (name == "WARP_SZ") {
      o.bits = 32;
      return o;
    }
    if (find_register(name, o.index)) {
      o.kind = Operand::reg;
    } else if (find_variable(name, o.index)) {
      o.kind = Operand::variable;
    } else if (name[0] == '%') {
      o.kind = Operand::special;
    } else {
      o.kind = Operand::symbol;
      o.scope = scopes_.back().id;
    }
    if (accept('+'))
      o.offset = integer();
    else if (peek().is('-') && peek(1).kind == Token::integer)
      o.offset = integer();
    return o;
  }

  bool find_register(std::string_view view, uint32_t& index) {
    const std::string name(view);
    size_t digits = name.size();
    while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
    const std::string prefix = name.substr(0, digits);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (auto it = scope->registers.find(name); it != scope->registers.end()) {
        index = it->second;
        return true;
      }
      if (digits == name.size()) continue;
      if (auto it = scope->families.find(prefix); it != scope->families.end()) {
        if (std::stoull(name.substr(digits)) >= it->second.second) continue;
        index = scope->registers[name] = new_register(name, it->second.first);
        return true;
      }
    }
    return false;
  }

  bool find_variable(std::string_view view, uint32_t& index) const {
    const std::string name(view);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (auto it = scope->variables.find(name); it != scope->variables.end()) {
        index = it->second;
        return true;
      }
    return false;
  }

  std::unique_ptr<ast::Module> module_;
  std::vector<Token> tokens_;
  size_t pos_ = 0;
  ast::Function* fn_ = nullptr;
  std::vector<NameScope> scopes_;
  uint32_t current_loc_ = 0;
};

}  // namespace

std::unique_ptr<ast::Module> parse_ptx(std::string text) { return Parser(std::move(text)).run(); }

}  // namespace ptxsim
