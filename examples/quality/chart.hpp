// SPDX-License-Identifier: MIT
// Charts of an error, on a logarithmic axis, against bits; written as SVG.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace quality {

struct chart_point {
  std::string label;  ///< empty: none
  std::string family;
  double bits = 0;
  double error = 0;
  bool hollow = false;
};

/// One set of axes.
struct chart_panel {
  std::string title;
  std::string error_axis;
  std::string bits_axis;
  std::string hollow_means;  ///< for the legend; empty if there are no hollow points
  bool shannon_bound = false;
  std::vector<chart_point> points = {};

  /// Leaves out what the axes cannot show, and what is there already.
  void add(const chart_point& point) {
    constexpr double most_bits = 9;
    const bool shown = point.bits <= most_bits && point.error > 0 && std::isfinite(point.error);
    const bool repeated = std::any_of(points.begin(), points.end(), [&](const chart_point& other) {
      return other.bits == point.bits && other.error == point.error && other.hollow == point.hollow;
    });
    if (shown && !repeated) points.push_back(point);
  }
};

/// What codecs of 2, 3 and 4 bits have in common: "rotated" of "rotated4", "klt" of "klt3.4"; "pairs" of "k=...,v=...".
[[nodiscard]] inline std::string family_of(std::string_view spec) {
  if (spec.find('=') != std::string_view::npos) return "pairs";
  if (spec.starts_with("klt")) return "klt";
  const bool has_width = !spec.empty() && '2' <= spec.back() && spec.back() <= '4';
  return std::string(spec.substr(0, spec.size() - (has_width ? 1 : 0)));
}

/// A spec as short as it is clear: "channel4 + rotated4" of "k=channel4,v=rotated4".
[[nodiscard]] inline std::string label_of(std::string spec) {
  const std::size_t values = spec.find(",v=");
  if (!spec.starts_with("k=") || values == std::string::npos) return spec;
  return spec.substr(2, values - 2) + " + " + spec.substr(values + 3);
}

/// Writes panels below each other.
class chart_writer {
 public:
  explicit chart_writer(std::ostream& out) : out_(&out) {}

  void write(const std::vector<chart_panel>& panels) {
    const double height = panel_height * static_cast<double>(panels.size());
    *out_ << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " << number(total_width) << ' '
          << number(height) << "\" width=\"" << number(total_width) << "\" height=\"" << number(height)
          << "\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\">\n"
          << "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n";
    double top = 0;
    for (const chart_panel& panel : panels) {
      write_panel(panel, top);
      top += panel_height;
    }
    *out_ << "</svg>\n";
  }

 private:
  static constexpr double total_width = 900;
  static constexpr double panel_height = 470;
  static constexpr double left = 90;
  static constexpr double right = 740;
  static constexpr double above = 50;   // from the top of a panel to its axes
  static constexpr double below = 400;  // from the top of a panel to the bits axis

  struct box {
    double x, y, width, height;  // of the upper left corner, then sizes
    [[nodiscard]] bool overlaps(const box& o) const {
      return x < o.x + o.width && o.x < x + width && y < o.y + o.height && o.y < y + height;
    }
  };

  static std::string number(double x) {
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), "%.1f", x);
    return text.data();
  }

  static std::string escaped(std::string_view text) {
    std::string out;
    for (const char c : text) {
      if (c == '<') {
        out += "&lt;";
      } else if (c == '&') {
        out += "&amp;";
      } else {
        out += c;
      }
    }
    return out;
  }

  void text(double x, double y, std::string_view what, std::string_view attributes = "") {
    *out_ << "<text x=\"" << number(x) << "\" y=\"" << number(y) << "\" " << attributes << '>'
          << escaped(what) << "</text>\n";
  }
  void line(double x1, double y1, double x2, double y2, std::string_view attributes) {
    *out_ << "<line x1=\"" << number(x1) << "\" y1=\"" << number(y1) << "\" x2=\"" << number(x2) << "\" y2=\""
          << number(y2) << "\" " << attributes << "/>\n";
  }

  void write_panel(const chart_panel& panel, double top);
  void fit_axes(const chart_panel& panel);
  void write_axes(const chart_panel& panel);
  void write_bound();
  void write_points(const chart_panel& panel);
  void write_labels(const chart_panel& panel);
  [[nodiscard]] box place_for(const chart_point& point, const std::vector<box>& taken) const;
  void write_legend(const chart_panel& panel);
  void write_mark(double x, double y, const std::string& colour, bool hollow);

  [[nodiscard]] double x_of(double bits) const {
    return left + (bits - least_bits_) / (most_bits_ - least_bits_) * (right - left);
  }
  [[nodiscard]] double y_of(double error) const {
    const double share = (std::log10(error) - least_power_) / (most_power_ - least_power_);
    return top_ + below - share * (below - above);
  }

  /// Families in the order of their first points.
  [[nodiscard]] std::string colour_of(const std::string& family) {
    static constexpr std::array<const char*, 10> colours = {"#4c566a", "#1f77b4", "#d1495b", "#2a9d5c",
                                                            "#8e5bb5", "#c77d0a", "#0f9aa8", "#7a5c45",
                                                            "#d43fa5", "#8a8f1f"};
    auto found = std::find(families_.begin(), families_.end(), family);
    if (found == families_.end()) found = families_.insert(families_.end(), family);
    return colours[static_cast<std::size_t>(found - families_.begin()) % colours.size()];
  }

  std::ostream* out_;
  std::vector<std::string> families_;
  double top_ = 0;
  double least_bits_ = 0, most_bits_ = 1;
  double least_power_ = 0, most_power_ = 1;  // of ten
};

inline void chart_writer::write_panel(const chart_panel& panel, double top) {
  top_ = top;
  if (panel.points.empty()) {
    text(left, top + 28, panel.title + ": no codec of at most 9 bits",
         R"(font-size="17" font-weight="bold")");
    return;
  }
  fit_axes(panel);
  write_axes(panel);
  if (panel.shannon_bound) write_bound();
  write_points(panel);
  write_labels(panel);
  write_legend(panel);
}

inline void chart_writer::fit_axes(const chart_panel& panel) {
  const auto [fewest, most] = std::minmax_element(
      panel.points.begin(), panel.points.end(), [](const auto& a, const auto& b) { return a.bits < b.bits; });
  least_bits_ = std::floor(fewest->bits - 0.3);
  most_bits_ = std::ceil(most->bits + 0.6);
  const auto [least, largest] =
      std::minmax_element(panel.points.begin(), panel.points.end(),
                          [](const auto& a, const auto& b) { return a.error < b.error; });
  const double bound = panel.shannon_bound ? std::pow(4.0, -most->bits) : least->error;
  least_power_ = std::floor(std::log10(std::min(bound, least->error)));
  most_power_ = std::ceil(std::log10(largest->error));
  if (most_power_ == least_power_) most_power_ += 1;
}

inline void chart_writer::write_axes(const chart_panel& panel) {
  text(left, top_ + 28, panel.title, R"(font-size="17" font-weight="bold" fill="#222222")");
  for (double power = least_power_; power <= most_power_; ++power) {
    const double y = y_of(std::pow(10.0, power));
    line(left, y, right, y, R"(stroke="#e3e3e3")");
    *out_ << "<text x=\"" << number(left - 8) << "\" y=\"" << number(y + 4)
          << R"(" text-anchor="end" fill="#444444">10<tspan dy="-5" font-size="10">)"
          << static_cast<int>(power) << "</tspan></text>\n";
  }
  for (double bits = least_bits_; bits <= most_bits_; ++bits) {
    const double x = x_of(bits);
    line(x, top_ + above, x, top_ + below, R"(stroke="#f0f0f0")");
    text(x, top_ + below + 18, std::to_string(static_cast<int>(bits)),
         R"(text-anchor="middle" fill="#444444")");
  }
  line(left, top_ + below, right, top_ + below, R"(stroke="#444444")");
  line(left, top_ + above, left, top_ + below, R"(stroke="#444444")");
  text((left + right) / 2, top_ + below + 42, panel.bits_axis, R"(text-anchor="middle" fill="#222222")");
  *out_ << "<text transform=\"translate(" << number(left - 56) << ' ' << number(top_ + (above + below) / 2)
        << ") rotate(-90)\" text-anchor=\"middle\" fill=\"#222222\">" << escaped(panel.error_axis)
        << "</text>\n";
}

/// 4^-bits is a straight line, cut off where the axes end.
inline void chart_writer::write_bound() {
  const double first = std::max(least_bits_, -most_power_ / std::log10(4.0));
  const double last = std::min(most_bits_, -least_power_ / std::log10(4.0));
  line(x_of(first), y_of(std::pow(4.0, -first)), x_of(last), y_of(std::pow(4.0, -last)),
       R"(stroke="#222222" stroke-width="1.5" stroke-dasharray="6 4")");
}

inline void chart_writer::write_mark(double x, double y, const std::string& colour, bool hollow) {
  *out_ << "<circle cx=\"" << number(x) << "\" cy=\"" << number(y) << "\" r=\"4.5\" fill=\""
        << (hollow ? "#ffffff" : colour) << "\" stroke=\"" << (hollow ? colour : "#ffffff")
        << "\" stroke-width=\"" << (hollow ? "1.8" : "1") << "\"/>\n";
}

inline void chart_writer::write_points(const chart_panel& panel) {
  for (const chart_point& p : panel.points)
    write_mark(x_of(p.bits), y_of(p.error), colour_of(p.family), p.hollow);
}

/// Each beside its point, or as near to it as there is room, then with a line to it.
inline void chart_writer::write_labels(const chart_panel& panel) {
  std::vector<box> taken;
  for (const chart_point& p : panel.points) taken.push_back({x_of(p.bits) - 6, y_of(p.error) - 6, 12, 12});
  for (double bits = least_bits_; panel.shannon_bound && bits <= most_bits_; bits += 0.05)
    taken.push_back({x_of(bits) - 3, y_of(std::pow(4.0, -bits)) - 3, 6, 6});
  std::vector<chart_point> labelled;  // those on the right first: they have room beside them; then the lower
  std::copy_if(panel.points.begin(), panel.points.end(), std::back_inserter(labelled),
               [](const chart_point& p) { return !p.label.empty(); });
  std::stable_sort(labelled.begin(), labelled.end(), [](const chart_point& a, const chart_point& b) {
    return a.bits != b.bits ? a.bits > b.bits : a.error < b.error;
  });
  for (const chart_point& p : labelled) {
    const double x = x_of(p.bits), y = y_of(p.error);
    const box place = place_for(p, taken);
    taken.push_back(place);
    const double middle = place.y + place.height / 2;
    if (std::fabs(middle - y) > 8)
      line(x, y, place.x > x ? place.x - 1 : place.x + place.width + 1, middle,
           R"(stroke="#aaaaaa" stroke-width="0.8")");
    text(place.x, place.y + 10, p.label, "font-size=\"12\" fill=\"" + colour_of(p.family) + "\"");
  }
}

/// Right of the point, higher or lower by as little as possible; else left of it.
inline chart_writer::box chart_writer::place_for(const chart_point& point,
                                                 const std::vector<box>& taken) const {
  constexpr double step = 5;
  constexpr int most_steps = 12;
  const double x = x_of(point.bits), y = y_of(point.error);
  const double width = 6.4 * static_cast<double>(point.label.size()) + 2;
  const auto is_free = [&](const box& at) {
    return at.x > left && at.y > top_ + above && at.y + at.height < top_ + below &&
           std::none_of(taken.begin(), taken.end(), [&](const box& other) { return at.overlaps(other); });
  };
  for (const double near : {x + 10, x - 10 - width, x + 40, x - 40 - width}) {
    for (int i = 0; i <= 2 * most_steps; ++i) {
      const int steps = (i + 1) / 2 * (i % 2 == 0 ? -1 : 1);
      const box at{near, y - 6 + step * steps, width, 12};
      if (is_free(at)) return at;
    }
  }
  return {x + 10, y - 6, width, 12};
}

inline void chart_writer::write_legend(const chart_panel& panel) {
  constexpr double step = 22;
  const double x = right + 24;
  double y = top_ + above + 10;
  std::vector<std::string> shown;
  for (const chart_point& p : panel.points) {
    if (std::find(shown.begin(), shown.end(), p.family) != shown.end()) continue;
    shown.push_back(p.family);
    write_mark(x, y, colour_of(p.family), false);
    text(x + 12, y + 4, p.family, R"(fill="#222222")");
    y += step;
  }
  if (!panel.hollow_means.empty()) {
    write_mark(x, y, "#222222", true);
    text(x + 12, y + 4, panel.hollow_means, R"(fill="#222222")");
    y += step;
  }
  if (panel.shannon_bound) {
    line(x - 8, y, x + 8, y, R"(stroke="#222222" stroke-width="1.5" stroke-dasharray="6 4")");
    text(x + 12, y + 4, "Shannon bound", R"(fill="#222222")");
  }
}

}  // namespace quality
