// Decode: modifiers and operands of one instruction.
#include <algorithm>
#include <bit>

#include "ops/local_address.h"
#include "ptxsim/error.h"
#include "sim/decoder.h"
#include "sim/memory.h"
#include "sim/module.h"

namespace ptxsim {
namespace {

struct SpecialName {
  std::string_view name;
  Special slot;
};
constexpr SpecialName kSpecials[] = {
    {"%tid.x", Special::tid_x},
    {"%tid.y", Special::tid_y},
    {"%tid.z", Special::tid_z},
    {"%ntid.x", Special::ntid_x},
    {"%ntid.y", Special::ntid_y},
    {"%ntid.z", Special::ntid_z},
    {"%ctaid.x", Special::ctaid_x},
    {"%ctaid.y", Special::ctaid_y},
    {"%ctaid.z", Special::ctaid_z},
    {"%nctaid.x", Special::nctaid_x},
    {"%nctaid.y", Special::nctaid_y},
    {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},
    {"%warpid", Special::warpid},
    {"%nwarpid", Special::nwarpid},
    {"%smid", Special::smid},
    {"%nsmid", Special::nsmid},
    {"%gridid", Special::gridid64},
    {"%lanemask_eq", Special::lanemask_eq},
    {"%lanemask_le", Special::lanemask_le},
    {"%lanemask_lt", Special::lanemask_lt},
    {"%lanemask_ge", Special::lanemask_ge},
    {"%lanemask_gt", Special::lanemask_gt},
    {"%clusterid.x", Special::clusterid_x},
    {"%clusterid.y", Special::clusterid_y},
    {"%clusterid.z", Special::clusterid_z},
    {"%nclusterid.x", Special::nclusterid_x},
    {"%nclusterid.y", Special::nclusterid_y},
    {"%nclusterid.z", Special::nclusterid_z},
    {"%cluster_ctaid.x", Special::cluster_ctaid_x},
    {"%cluster_ctaid.y", Special::cluster_ctaid_y},
    {"%cluster_ctaid.z", Special::cluster_ctaid_z},
    {"%cluster_nctaid.x", Special::cluster_nctaid_x},
    {"%cluster_nctaid.y", Special::cluster_nctaid_y},
    {"%cluster_nctaid.z", Special::cluster_nctaid_z},
    {"%cluster_ctarank", Special::cluster_ctarank},
    {"%cluster_nctarank", Special::cluster_nctarank},
    {"%is_explicit_cluster", Special::is_explicit_cluster},
    {"%total_smem_size", Special::total_smem_size},
    {"%dynamic_smem_size", Special::dynamic_smem_size},
    {"%aggr_smem_size", Special::aggr_smem_size},
    {"%reserved_smem_offset_begin", Special::reserved_smem_offset},
    {"%envreg1", Special::envreg1},
    {"%envreg2", Special::envreg2},
};

uint64_t truncate(uint64_t bits, unsigned bytes) { return bytes >= 8 ? bits : bits & ((1ull << (8 * bytes)) - 1); }

/// Bits of an immediate as a value of type t.
uint64_t immediate_bits(const ast::Operand& o, Type t) {
  using Number = ast::Operand::Number;
  if (o.number == Number::integer) {
    if (t == Type::f32) return std::bit_cast<uint32_t>(static_cast<float>(static_cast<int64_t>(o.bits)));
    if (t == Type::f64) return std::bit_cast<uint64_t>(static_cast<double>(static_cast<int64_t>(o.bits)));
    return truncate(o.bits, size_of(t));
  }
  const bool single = o.number == Number::real32;
  const double value = single ? std::bit_cast<float>(static_cast<uint32_t>(o.bits)) : std::bit_cast<double>(o.bits);
  if (t == Type::f32 || t == Type::b32) return single ? o.bits : std::bit_cast<uint32_t>(static_cast<float>(value));
  if (t == Type::f64 || t == Type::b64) return single ? std::bit_cast<uint64_t>(value) : o.bits;
  return truncate(o.bits, size_of(t));
}

}  // namespace

Decode::Decode(ProgramBuilder& builder, const ast::Instruction& source) : builder_(builder), source_(source) {
  std::string_view rest = source.opcode;
  size_t dot = rest.find('.');
  base_ = rest.substr(0, dot);
  while (dot != std::string_view::npos) {
    rest.remove_prefix(dot + 1);
    dot = rest.find('.');
    mods_.push_back(rest.substr(0, dot));
  }
  inst.line = source.line;
  inst.loc = source.loc;
}

bool Decode::flag(std::string_view name) {
  auto it = std::find(mods_.begin(), mods_.end(), name);
  if (it == mods_.end()) return false;
  mods_.erase(it);
  return true;
}

std::string_view Decode::pick(std::initializer_list<std::string_view> names) {
  for (std::string_view n : names)
    if (flag(n)) return n;
  return {};
}

bool Decode::has_type() const {
  return std::any_of(mods_.begin(), mods_.end(), [](std::string_view m) { return parse_type(m).has_value(); });
}

Type Decode::type() {
  for (auto it = mods_.begin(); it != mods_.end(); ++it)
    if (auto t = parse_type(*it)) {
      mods_.erase(it);
      return *t;
    }
  unsupported("no operand type");
}

std::string_view Decode::next() {
  if (mods_.empty()) unsupported("a modifier is missing");
  const std::string_view m = mods_.front();
  mods_.erase(mods_.begin());
  return m;
}

void Decode::unsupported(const std::string& why) const {
  fail("unsupported PTX", why.empty() ? "" : ": ", why, "\n  at kernel ", builder_.program().kernel, ", PTX line ",
       source_.line, ": ", builder_.source().line_text(source_.line));
}

const ast::Operand& Decode::arg(size_t i) const {
  if (i >= source_.operands.size()) unsupported("an operand is missing");
  return source_.operands[i];
}

void Decode::expect_count(size_t n) const {
  if (count() != n) unsupported("expected " + std::to_string(n) + " operands");
}

Operand Decode::constant(Type t, uint64_t bits) { return builder_.constant(size_of(t), bits); }
Operand Decode::scratch(unsigned bytes) { return builder_.scratch(bytes); }

Operand Decode::any_register(const ast::Operand& o, unsigned min_bytes) {
  if (o.kind != ast::Operand::reg) unsupported("expected a register");
  if (o.negated) unsupported("negated operand");
  const Operand r = builder_.register_operand(o.index);
  if (builder_.function().registers[o.index].type == Type::pred)
    unsupported("a predicate register where a value is needed");
  if (r.bytes < min_bytes) unsupported("register is narrower than the type");
  return r;
}

Operand Decode::any_result(const ast::Operand& o, unsigned min_bytes) {
  Operand r = any_register(o, min_bytes);
  r.written = true;
  return r;
}

Operand Decode::out_of(const ast::Operand& o, Type t) {
  if (o.kind == ast::Operand::sink) return builder_.scratch(size_of(t));
  if (t == Type::pred) return predicate_of(o);
  const Operand r = any_result(o, size_of(t));
  if (r.bytes != size_of(t)) unsupported("register size differs from the type's");
  return r;
}

Operand Decode::in_of(const ast::Operand& o, Type t) {
  switch (o.kind) {
    case ast::Operand::imm:
      if (t == Type::pred) return builder_.constant(4, o.bits ? kAllLanes : 0);
      return builder_.constant(size_of(t), immediate_bits(o, t));
    case ast::Operand::reg: {
      Operand r = out_of(o, t);
      r.written = false;
      return r;
    }
    case ast::Operand::special: {
      for (const SpecialName& s : kSpecials) {
        if (s.name != o.name) continue;
        const unsigned bytes = static_cast<uint32_t>(s.slot) < kSpecial64Count ? 8 : 4;
        if (bytes < size_of(t)) unsupported("special register is narrower than the type");
        return {special_offset(s.slot), Bank::special, static_cast<uint8_t>(size_of(t))};
      }
      unsupported("special register " + std::string(o.name));
    }
    case ast::Operand::variable:
    case ast::Operand::symbol: {
      // The address of a variable or function, as a value.
      int64_t disp = 0;
      const Operand base = address_base(o, Space::generic, disp);
      const bool constant = base.bank == Bank::special && base.offset == special_offset(Special::zero64);
      if (constant) return builder_.constant(size_of(t), static_cast<uint64_t>(disp + o.offset));
      const Operand sum = builder_.scratch(size_of(t));
      emit_address(builder_, source_, sum, base, disp + o.offset);
      return sum;
    }
    default:
      unsupported("operand form");
  }
}

Operand Decode::any_source(const ast::Operand& o, Type t) {
  if (o.kind == ast::Operand::reg) return any_register(o, size_of(t));
  return in_of(o, t);
}

Operand Decode::predicate_of(const ast::Operand& o) {
  if (o.kind == ast::Operand::sink) return {};
  if (o.kind != ast::Operand::reg || builder_.function().registers[o.index].type != Type::pred)
    unsupported("expected a predicate register");
  return builder_.register_operand(o.index);
}

void Decode::predicate_in(size_t i, bool& negated) {
  const ast::Operand& o = arg(i);
  negated = o.negated;
  if (o.kind == ast::Operand::imm)
    add(builder_.constant(4, o.bits ? kAllLanes : 0));
  else if (o.kind == ast::Operand::special)
    add(in_of(o, Type::pred));
  else
    add(predicate_of(o));
}

uint64_t Decode::immediate(size_t i) const {
  if (arg(i).kind != ast::Operand::imm) unsupported("operand " + std::to_string(i) + " must be a constant");
  return arg(i).bits;
}

/// The lane-wise base of an address and its constant part. Module variables
/// have fixed addresses; shared ones are relative to the CTA, parameters to the
/// launch and locals to the activation.
Operand Decode::address_base(const ast::Operand& o, Space, int64_t& disp) {
  const Operand zero{special_offset(Special::zero64), Bank::special, 8};
  const Operand shared_base{special_offset(Special::shared_base64), Bank::special, 8};
  const Operand param_base{special_offset(Special::param_base64), Bank::special, 8};
  if (o.kind == ast::Operand::variable) {
    const ast::Variable& v = builder_.function().variables[o.index];
    switch (v.space) {
      case Space::shared:
        disp = static_cast<int64_t>(builder_.shared_offset(v, true));
        return shared_base;
      case Space::param:
        disp = builder_.variable_offset(o.index);
        if (builder_.in_kernel() && builder_.function().params.size() > o.index) return param_base;
        break;
      case Space::local:
        disp = builder_.variable_offset(o.index);
        break;
      default:
        unsupported("variable of this space in a function body");
    }
    const Operand base = builder_.scratch(8);
    emit_local_base(builder_, source_, base);
    return base;
  }
  if (o.kind == ast::Operand::symbol) {
    if (const ast::Variable* v = builder_.module().find_variable(o.name)) {
      if (v->space == Space::shared) {
        disp = static_cast<int64_t>(builder_.shared_offset(*v, true));
        return shared_base;
      }
      disp = static_cast<int64_t>(builder_.module().variable_address(o.name));
      return zero;
    }
    if (const ast::Function* f = builder_.module().find_function(o.name)) {
      if (f->has_body) builder_.function_number(*f);
      disp = static_cast<int64_t>(builder_.module().function_address(*f));
      return zero;
    }
    unsupported("unknown symbol " + std::string(o.name));
  }
  unsupported("operand is not an address");
}

void Decode::address_of(const ast::Operand& o, Space space) {
  if (o.kind != ast::Operand::address) unsupported("expected an address in brackets");
  inst.disp = o.offset;
  if (o.parts.empty()) return add({special_offset(Special::zero64), Bank::special, 8});
  const ast::Operand& base = o.parts[0];
  if (base.kind == ast::Operand::reg) {
    const Operand r = any_register(base, 4);
    return add(r);
  }
  int64_t disp = 0;
  const Operand b = address_base(base, space, disp);
  inst.disp += disp;
  add(b);
}

void Decode::address(size_t i, Space space) { address_of(arg(i), space); }

void Decode::finish() {
  if (!mods_.empty()) unsupported("modifier ." + std::string(mods_.front()));
  if (!inst.exec) unsupported("this form of the instruction");
  if (!source_.guard.empty()) {
    const Operand p = predicate_of(source_.guard[0]);
    inst.guarded = true;
    inst.guard_offset = p.offset;
    inst.guard_flip = source_.guard[0].negated ? kAllLanes : 0;
  }
  builder_.emit(inst, operands_);
}

}  // namespace ptxsim
