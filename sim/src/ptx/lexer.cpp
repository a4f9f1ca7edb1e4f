#include "ptx/lexer.h"

#include <bit>
#include <cctype>
#include <charconv>
#include <cstdlib>

#include "ptxsim/error.h"

namespace ptxsim {
namespace {

bool starts_ident(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}
bool continues_ident(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '.'; }

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  std::vector<Token> run() {
    std::vector<Token> out;
    out.reserve(text_.size() / 5);
    for (skip_blank(); pos_ < text_.size(); skip_blank()) out.push_back(next());
    Token last;
    last.line = line_;
    out.push_back(last);
    return out;
  }

 private:
  char peek(size_t ahead = 0) const { return pos_ + ahead < text_.size() ? text_[pos_ + ahead] : '\0'; }

  void skip_blank() {
    while (pos_ < text_.size()) {
      char c = text_[pos_];
      if (c == '\n') {
        ++line_, ++pos_;
      } else if (std::isspace(static_cast<unsigned char>(c)) || c == '\0') {
        ++pos_;
      } else if (c == '/' && peek(1) == '/') {
        while (pos_ < text_.size() && text_[pos_] != '\n') ++pos_;
      } else if (c == '/' && peek(1) == '*') {
        for (pos_ += 2; pos_ < text_.size() && !(text_[pos_] == '*' && peek(1) == '/'); ++pos_)
          line_ += text_[pos_] == '\n';
        pos_ += 2;
      } else {
        return;
      }
    }
  }

  Token next() {
    const size_t begin = pos_;
    Token t;
    t.line = line_;
    const char c = peek();
    if (starts_ident(c)) {
      // A directive ends at the next dot: inline assembly writes ".reg.b32 x".
      const bool directive = c == '.';
      t.kind = Token::ident;
      for (++pos_; pos_ < text_.size(); ++pos_) {
        if (continues_ident(peek()) && !(directive && peek() == '.')) continue;
        if (peek() == ':' && peek(1) == ':' && continues_ident(peek(2))) {
          ++pos_;
          continue;
        }
        break;
      }
    } else if (std::isdigit(static_cast<unsigned char>(c))) {
      number(t);
    } else if (c == '"') {
      for (++pos_; pos_ < text_.size() && peek() != '"'; ++pos_) {
      }
      ++pos_;
      t.kind = Token::string;
      t.text = text_.substr(begin + 1, pos_ - begin - 2);
      return t;
    } else {
      t.kind = Token::punct;
      ++pos_;
    }
    t.text = text_.substr(begin, pos_ - begin);
    return t;
  }

  void number(Token& t) {
    const char tag = peek() == '0' ? static_cast<char>(std::tolower(static_cast<unsigned char>(peek(1)))) : '\0';
    if (tag == 'f' || tag == 'd') {
      const size_t digits = tag == 'f' ? 8 : 16;
      t.kind = tag == 'f' ? Token::real32 : Token::real64;
      parse_int(pos_ + 2, digits, 16, t);
      pos_ += 2 + digits;
      return;
    }
    t.kind = Token::integer;
    size_t end = pos_;
    if (tag == 'x' || tag == 'b') {
      end += 2;
      while (end < text_.size() && std::isxdigit(static_cast<unsigned char>(text_[end]))) ++end;
      parse_int(pos_ + 2, end - pos_ - 2, tag == 'x' ? 16 : 2, t);
    } else {
      while (end < text_.size() && std::isdigit(static_cast<unsigned char>(text_[end]))) ++end;
      if (end < text_.size() && (text_[end] == '.' || text_[end] == 'e' || text_[end] == 'E')) {
        char* stop = nullptr;
        const std::string copy(text_.substr(pos_, 64));
        t.kind = Token::real64;
        t.bits = std::bit_cast<uint64_t>(std::strtod(copy.c_str(), &stop));
        pos_ += static_cast<size_t>(stop - copy.c_str());
        return;
      }
      const bool octal = text_[pos_] == '0' && end - pos_ > 1;
      parse_int(pos_, end - pos_, octal ? 8 : 10, t);
    }
    pos_ = end;
    if (peek() == 'U') ++pos_;
  }

  void parse_int(size_t at, size_t count, int radix, Token& t) {
    const char* first = text_.data() + at;
    const char* last = first + count;
    auto [stop, ec] = std::from_chars(first, last, t.bits, radix);
    if (ec != std::errc() || stop != last) fail("PTX line ", line_, ": malformed number");
  }

  std::string_view text_;
  size_t pos_ = 0;
  uint32_t line_ = 1;
};

}  // namespace

std::vector<Token> tokenize(std::string_view text) { return Lexer(text).run(); }

}  // namespace ptxsim
