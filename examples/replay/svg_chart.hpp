// SPDX-License-Identifier: MIT
// Hit rate over capacity as an SVG file that needs nothing else: one panel a trace, one line a policy.
#pragma once

#include "llama/text_table.hpp"
#include "replay/hit_rates.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

namespace replay {

namespace detail {

/// Names come from outside: a file may be called anything.
[[nodiscard]] inline std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '<') {
      out += "&lt;";
    } else if (c == '&') {
      out += "&amp;";
    } else if (static_cast<unsigned char>(c) >= 0x20) {
      out += c;
    }
  }
  return out;
}

[[nodiscard]] inline std::string px(double x) { return llama::formatted("%.1f", x); }

class panel {
 public:
  static constexpr double width = 560, height = 360;

  panel(const results& r, double left) : r_(r), left_(left + 56) {
    least_ = static_cast<double>(*std::min_element(r.blocks.begin(), r.blocks.end()));
    least_ = std::max(least_, 1.0);
    most_ = std::max(static_cast<double>(*std::max_element(r.blocks.begin(), r.blocks.end())), 2 * least_);
    for (const hit_rates& row : r.rows)
      top_ = std::max(top_, std::ceil(10 * *std::max_element(row.rates.begin(), row.rates.end())) / 10);
  }

  void draw(std::ostream& out) const {
    out << "<text class=\"title\" x=\"" << px(left_) << "\" y=\"24\">" << escaped(r_.trace_name)
        << "</text>\n";
    for (int tenth = 0; tenth <= static_cast<int>(std::lround(10 * top_)); ++tenth) {
      const double rate = tenth / 10.0;
      out << "<path class=\"grid\" d=\"M" << px(left_) << ' ' << px(y(rate)) << 'h' << px(plot_width)
          << "\"/>"
          << "<text x=\"" << px(left_ - 8) << "\" y=\"" << px(y(rate) + 4) << "\" text-anchor=\"end\">"
          << 10 * tenth << " %</text>\n";
    }
    double last_label = -1e9;
    for (std::size_t i = 0; i < r_.blocks.size(); ++i) {
      const double at = x(r_.blocks[i]);
      out << "<path class=\"grid\" d=\"M" << px(at) << ' ' << px(y(0)) << "v4\"/>";
      if (at - last_label < 28) continue;
      last_label = at;
      out << "<text x=\"" << px(at) << "\" y=\"" << px(y(0) + 20) << "\" text-anchor=\"middle\">"
          << escaped(r_.titles[i]) << "</text>\n";
    }
    out << "<text x=\"" << px(left_ + plot_width / 2) << "\" y=\"" << px(y(0) + 40)
        << "\" text-anchor=\"middle\">capacity (of " << llama::with_commas(r_.sum.num_different)
        << " different blocks)</text>\n";
    for (std::size_t i = 0; i < r_.rows.size(); ++i) draw_line(out, i);
  }

 private:
  static constexpr double plot_width = 380, plot_top = 44, plot_height = 260;
  // Told apart by lightness too; the optimum is dashed.
  static constexpr std::array<std::string_view, 5> colours{"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                                           "#555555"};

  [[nodiscard]] double x(index_t blocks) const {
    const double at = std::max(static_cast<double>(blocks), least_);
    return left_ + plot_width * std::log(at / least_) / std::log(most_ / least_);
  }
  [[nodiscard]] double y(double rate) const { return plot_top + plot_height * (1 - rate / top_); }

  void draw_line(std::ostream& out, std::size_t which) const {
    const hit_rates& row = r_.rows[which];
    const std::string_view colour = colours[which % colours.size()];
    const bool best = which + 1 == r_.rows.size();
    out << "<polyline stroke=\"" << colour << "\" stroke-dasharray=\"" << (best ? "5 4" : "none")
        << "\" points=\"";
    for (std::size_t i = 0; i < row.rates.size(); ++i)
      out << (i > 0 ? " " : "") << px(x(r_.blocks[i])) << ',' << px(y(row.rates[i]));
    out << "\"/>\n";
    const double at = plot_top + 16 + 20 * static_cast<double>(which);
    out << "<path stroke=\"" << colour << "\" stroke-width=\"2\" stroke-dasharray=\""
        << (best ? "5 4" : "none") << "\" d=\"M" << px(left_ + plot_width + 16) << ' ' << px(at)
        << "h22\"/><text x=\"" << px(left_ + plot_width + 44) << "\" y=\"" << px(at + 4) << "\">"
        << escaped(row.name) << "</text>\n";
  }

  const results& r_;
  double left_;
  double least_ = 1, most_ = 2;  // blocks
  double top_ = 0.1;             // rate
};

}  // namespace detail

/// \pre every result has a capacity; they are drawn in the order given
inline void write_svg(std::ostream& out, const std::vector<results>& all) {
  const double width = detail::panel::width * static_cast<double>(all.size());
  out << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " << detail::px(width) << ' '
      << detail::px(detail::panel::height) << "\" font-family=\"sans-serif\" font-size=\"12\">\n"
      << "<style>.grid{stroke:#ddd;fill:none}.title{font-size:15px;font-weight:bold}"
      << "polyline{fill:none;stroke-width:2}</style>\n<rect width=\"100%\" height=\"100%\" "
         "fill=\"white\"/>\n";
  for (std::size_t i = 0; i < all.size(); ++i)
    detail::panel(all[i], detail::panel::width * static_cast<double>(i)).draw(out);
  out << "</svg>\n";
}

}  // namespace replay
