// SPDX-License-Identifier: MIT
// mpi_group against the same parts in one process: every process makes all parts, gives the group its own, and compares
// what comes back, bit by bit. Random sizes, parts that saw nothing, more processes than heads; a communicator of some of
// the processes; a failing call. Ends with the number of failures, at most 1 per process.
#include <kvcache/interop/mpi.hpp>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

namespace {

using kvcache::index_t;

int failures = 0;

void expect(bool holds, const char* rule) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "failed: %s\n", rule);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

float next(std::mt19937& random) { return static_cast<float>(random() % 2001) / 1000.0F - 1.0F; }

struct part {
  std::vector<float> out;
  std::vector<float> lse;
};

/// Rows of a part; about every third has seen nothing.
part make_part(std::mt19937& random, std::size_t num_rows, std::size_t dim) {
  part made{std::vector<float>(num_rows * dim), std::vector<float>(num_rows)};
  for (std::size_t r = 0; r < num_rows; ++r) {
    const bool empty = random() % 3 == 0;
    made.lse[r] = empty ? -std::numeric_limits<float>::infinity() : 20 * next(random);
    for (std::size_t d = 0; d < dim; ++d) made.out[r * dim + d] = empty ? 0.0F : next(random);
  }
  return made;
}

/// What one row of all parts is in double precision, against the merged one.
void compare_with_sums(const std::vector<part>& parts, const part& merged, std::size_t row, std::size_t dim) {
  double sum = 0;
  std::vector<double> out(dim);
  for (const part& p : parts) {
    const double weight = std::exp(double{p.lse[row]});  // 0 of minus infinity; 20 is far from overflow
    sum += weight;
    for (std::size_t d = 0; d < dim; ++d) out[d] += weight * double{p.out[row * dim + d]};
  }
  if (sum == 0) {
    expect(merged.lse[row] == -std::numeric_limits<float>::infinity(),
           "nothing seen by anybody stays nothing");
    return;
  }
  expect(std::abs(std::log(sum) - double{merged.lse[row]}) < 2e-5, "lse is that of all parts");
  for (std::size_t d = 0; d < dim; ++d)
    expect(std::abs(out[d] / sum - double{merged.out[row * dim + d]}) < 2e-5, "out is that of all parts");
}

void check_merge(kvcache::mpi_group& group, std::mt19937& random) {
  const std::size_t num_rows = random() % 20;
  const std::size_t dim = 1 + random() % 70;
  std::vector<part> parts;
  for (index_t p = 0; p < group.size(); ++p) parts.push_back(make_part(random, num_rows, dim));
  const std::vector<part> before = parts;

  part mine = parts[static_cast<std::size_t>(group.rank())];
  group.merge(mine.out, mine.lse);

  std::vector<kvcache::partial_result> results;
  for (part& p : parts) results.push_back({p.out, p.lse});
  kvcache::merge_parts(results);
  expect(same_bits(mine.out, parts[0].out) && same_bits(mine.lse, parts[0].lse),
         "merge gives the bits of merge_parts");
  for (std::size_t r = 0; r < num_rows; ++r) compare_with_sums(before, mine, r, dim);
}

void check_gather(kvcache::mpi_group& group, std::mt19937& random) {
  const auto num_kv_heads = static_cast<index_t>(1 + random() % 6);
  const auto group_floats = static_cast<index_t>(1 + random() % 40);
  const auto q_len = static_cast<index_t>(1 + random() % 3);
  std::vector<float> all(static_cast<std::size_t>(q_len * num_kv_heads * group_floats));
  for (float& x : all) x = next(random);
  const auto heads = group.kv_heads(num_kv_heads);
  std::vector<float> mine;
  for (index_t i = 0; i < q_len; ++i) {
    const auto row = all.begin() + i * num_kv_heads * group_floats;
    mine.insert(mine.end(), row + heads.first * group_floats, row + heads.last * group_floats);
  }
  std::vector<float> out(all.size());
  const index_t before = group.bytes_received();
  group.gather_heads(mine, out, q_len, num_kv_heads);
  expect(same_bits(out, all), "gather_heads gives every head, in order");
  expect(group.bytes_received() - before == static_cast<index_t>((all.size() - mine.size()) * sizeof(float)),
         "a process receives what it does not have");
}

void check_errors() {
  MPI_Comm quiet = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &quiet);
  MPI_Comm_set_errhandler(quiet, MPI_ERRORS_RETURN);
  {
    kvcache::mpi_group group(quiet);
    expect(group.size() >= 1, "a group works on a communicator that returns errors");
  }
  MPI_Comm_free(&quiet);
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  bool threw = false;
  try {
    kvcache::mpi_group nobody(MPI_COMM_NULL);
  } catch (const kvcache::mpi_error& error) {
    threw = std::strstr(error.what(), "MPI_Comm_dup") != nullptr && error.code() != MPI_SUCCESS;
  }
  expect(threw, "a call that fails throws mpi_error and names it");
}

void check_all() {
  std::mt19937 random(1);  // the same numbers in every process
  kvcache::mpi_group group(MPI_COMM_WORLD);
  for (int round = 0; round < 200; ++round) {
    check_merge(group, random);
    check_gather(group, random);
  }
  kvcache::mpi_group moved(std::move(group));
  check_merge(moved, random);
  kvcache::mpi_group other(MPI_COMM_WORLD);
  other = std::move(moved);
  check_merge(other, random);

  // Every second process, in reverse: ranks are those of the communicator.
  MPI_Comm half = MPI_COMM_NULL;
  const int rank = static_cast<int>(other.rank());
  MPI_Comm_split(MPI_COMM_WORLD, rank % 2, -rank, &half);
  kvcache::mpi_group reversed(half);
  MPI_Comm_free(&half);  // the group has its own
  check_merge(reversed, random);
  check_gather(reversed, random);
  check_errors();
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  try {
    check_all();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "escaped: %s\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  MPI_Finalize();
  return failures == 0 ? 0 : 1;
}
