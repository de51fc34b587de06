// SPDX-License-Identifier: MIT
// mpi_group: attention whose keys and values, or whose heads, are spread over the processes of an MPI communicator.
//
//   keys split     each process: attend(q, its tokens, out, {.lse = lse})     then   group.merge(out, lse)
//   heads split    each process: attend(its heads of q, its heads, part)      then   group.gather_heads(part, out, ...)
//
// merge exchanges and merges in log2 rounds (recursive doubling), in the order of merge_parts: the same bits in every
// process, in every run and for every MPI library, given the number of processes and processors of one kind.
// Needs mpi.h (CMake: find_package(MPI COMPONENTS CXX), link MPI::MPI_CXX); kvcache.hpp leaves it out.
// Source: Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH".
#pragma once

#include <kvcache/attention/merge_parts.hpp>
#include <kvcache/attention/softmax_state.hpp>
#include <kvcache/attention/visibility.hpp>
#include <kvcache/core/assert.hpp>
#include <kvcache/core/types.hpp>

#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1  // the C++ bindings that MPI dropped
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX 1
#endif
#include <mpi.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace kvcache::inline v0 {

/// An MPI call that failed. Seen only where the communicator's error handler is MPI_ERRORS_RETURN: MPI's own default
/// ends the job instead. Afterwards the processes no longer agree on where they are; end the job.
class mpi_error : public std::runtime_error {
 public:
  mpi_error(const char* call, int code) : std::runtime_error(message(call, code)), code_(code) {}

  [[nodiscard]] int code() const noexcept { return code_; }

 private:
  static std::string message(const char* call, int code) {
    std::array<char, MPI_MAX_ERROR_STRING> text{};
    int length = 0;
    if (MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) length = 0;
    return std::string("kvcache: ") + call + ": " +
           std::string(text.data(), static_cast<std::size_t>(length));
  }

  int code_;
};

/// The processes that share sequences. Everything marked "collective" is called by all of them, in the same order and
/// with the same sizes. Moved from, it may only be destroyed or assigned to.
/// Threads: one call at a time; MPI must have been initialised, with MPI_THREAD_SERIALIZED if not always by one thread.
class mpi_group {
 public:
  /// Collective. Works on a duplicate of `comm`, so that no message of others is mistaken for its own.
  /// Throws mpi_error.
  explicit mpi_group(MPI_Comm comm);

  mpi_group(mpi_group&& other) noexcept { swap(other); }
  mpi_group& operator=(mpi_group&& other) noexcept {
    mpi_group moved(std::move(other));
    swap(moved);
    return *this;
  }
  /// Collective, unless MPI has been finalised.
  ~mpi_group() {
    int finalized = 1;
    if (comm_ != MPI_COMM_NULL && MPI_Finalized(&finalized) == MPI_SUCCESS && finalized == 0)
      MPI_Comm_free(&comm_);
  }

  /// This process among the others, 0 .. size() - 1, and how many there are.
  [[nodiscard]] index_t rank() const noexcept { return rank_; }
  [[nodiscard]] index_t size() const noexcept { return size_; }

  /// What this process has received from others so far, in bytes, without the headers of messages.
  [[nodiscard]] index_t bytes_received() const noexcept { return bytes_received_; }

  /// Collective. Replaces this process's partial result by that over the keys of all processes.
  ///
  /// \param out  [num_rows, head_dim] as attend gives it; any number of queries, heads and sequences as rows
  /// \param lse  [num_rows], natural logarithm; -infinity where this process saw nothing
  /// With M = 4 * num_rows * (head_dim + 1) bytes, each of n = 2^k processes receives k * M. Otherwise, with 2^k < n the
  /// next power below, all together receive (k * 2^k + 2 * (n - 2^k)) * M, in k + 2 rounds.
  /// Allocates 2 M, kept for the next call. Throws mpi_error, std::bad_alloc. \pre less than 2^31 floats
  void merge(std::span<float> out, std::span<float> lse);

  /// Which of `num_kv_heads` heads are this process's when heads are split. Empty where there are more processes.
  [[nodiscard]] token_range kv_heads(index_t num_kv_heads) const noexcept {
    return share_of(num_kv_heads, rank_, size_);
  }

  /// Collective. Puts the outputs of all heads together, in every process. No number changes on the way.
  ///
  /// \param part  outputs of the query heads that read this process's kv_heads(), [q_len, its heads, head_dim]
  /// \param out   [q_len, num_q_heads, head_dim]; may not overlap `part`
  /// Each process receives what it does not have: all together 4 * (n - 1) * q_len * num_q_heads * head_dim bytes.
  /// Allocates as much as `out` if q_len > 1, kept for the next call. Throws mpi_error, std::bad_alloc.
  /// \pre num_q_heads is a multiple of num_kv_heads; less than 2^31 floats
  void gather_heads(std::span<const float> part, std::span<float> out, index_t q_len, index_t num_kv_heads);

 private:
  static void require(const char* call, int code) {
    if (code != MPI_SUCCESS) throw mpi_error(call, code);
  }

  void swap(mpi_group& other) noexcept {
    std::swap(comm_, other.comm_);
    std::swap(rank_, other.rank_);
    std::swap(size_, other.size_);
    std::swap(bytes_received_, other.bytes_received_);
    mine_.swap(other.mine_);
    theirs_.swap(other.theirs_);
    counts_.swap(other.counts_);
    offsets_.swap(other.offsets_);
  }

  void exchange(index_t partner);
  void send_mine(index_t to) {
    require("MPI_Send", MPI_Send(mine_.data(), count_of(mine_), MPI_FLOAT, static_cast<int>(to), tag, comm_));
  }
  void receive(std::vector<float>& into, index_t from) {
    require("MPI_Recv", MPI_Recv(into.data(), count_of(into), MPI_FLOAT, static_cast<int>(from), tag, comm_,
                                 MPI_STATUS_IGNORE));
    bytes_received_ += static_cast<index_t>(into.size() * sizeof(float));
  }
  static int count_of(std::span<const float> floats) noexcept {
    KVCACHE_ASSERT(floats.size() <= static_cast<std::size_t>(std::numeric_limits<int>::max()),
                   "mpi_group: a message must have less than 2^31 floats");
    return static_cast<int>(floats.size());
  }

  /// A message as spans: first the outputs, then lse.
  static partial_result result_in(std::vector<float>& message, std::size_t num_rows) noexcept {
    const std::span<float> all(message);
    return {all.first(all.size() - num_rows), all.last(num_rows)};
  }
  /// mine_ becomes the merge of both, the lower ranks' keys on the left: the same in both processes.
  void merge_exchanged(std::size_t num_rows, bool mine_is_left);

  static constexpr int tag = 1;

  MPI_Comm comm_ = MPI_COMM_NULL;
  index_t rank_ = 0;
  index_t size_ = 1;
  index_t bytes_received_ = 0;
  std::vector<float> mine_;  // messages of merge: [num_rows, head_dim] and [num_rows]
  std::vector<float> theirs_;
  std::vector<int> counts_;  // [size] floats, for gather_heads
  std::vector<int> offsets_;
};

inline mpi_group::mpi_group(MPI_Comm comm) {
  require("MPI_Comm_dup", MPI_Comm_dup(comm, &comm_));
  int rank = 0;
  int size = 1;
  require("MPI_Comm_rank", MPI_Comm_rank(comm_, &rank));
  require("MPI_Comm_size", MPI_Comm_size(comm_, &size));
  rank_ = rank;
  size_ = size;
}

inline void mpi_group::exchange(index_t partner) {
  const int other = static_cast<int>(partner);
  require("MPI_Sendrecv", MPI_Sendrecv(mine_.data(), count_of(mine_), MPI_FLOAT, other, tag, theirs_.data(),
                                       count_of(theirs_), MPI_FLOAT, other, tag, comm_, MPI_STATUS_IGNORE));
  bytes_received_ += static_cast<index_t>(theirs_.size() * sizeof(float));
}

inline void mpi_group::merge_exchanged(std::size_t num_rows, bool mine_is_left) {
  if (!mine_is_left) mine_.swap(theirs_);
  const partial_result left = result_in(mine_, num_rows);
  const partial_result right = result_in(theirs_, num_rows);
  kvcache::merge(left.out, left.lse, right.out, right.lse);
}

inline void mpi_group::merge(std::span<float> out, std::span<float> lse) {
  KVCACHE_ASSERT(lse.empty() ? out.empty() : out.size() % lse.size() == 0,
                 "mpi_group::merge: out must be [num_rows, head_dim], lse [num_rows]");
  if (size_ == 1 || lse.empty()) return;
  mine_.assign(out.begin(), out.end());
  mine_.insert(mine_.end(), lse.begin(), lse.end());
  theirs_.resize(mine_.size());

  // Beyond a power of two, the odd ones of the first ranks give what they have to the even ones, and wait.
  const auto whole = static_cast<index_t>(std::bit_floor(static_cast<std::size_t>(size_)));
  const index_t extra = size_ - whole;
  const bool folds = rank_ < 2 * extra;
  const bool waits = folds && rank_ % 2 == 1;
  if (waits) {
    send_mine(rank_ - 1);
    receive(mine_, rank_ - 1);
  } else {
    if (folds) {
      receive(theirs_, rank_ + 1);
      merge_exchanged(lse.size(), true);
    }
    const index_t place = folds ? rank_ / 2 : rank_ - extra;
    for (index_t step = 1; step < whole; step *= 2) {
      const index_t other = place ^ step;
      exchange(other < extra ? 2 * other : other + extra);
      merge_exchanged(lse.size(), place < other);
    }
    if (folds) send_mine(rank_ + 1);
  }
  const partial_result all = result_in(mine_, lse.size());
  std::copy(all.out.begin(), all.out.end(), out.begin());
  std::copy(all.lse.begin(), all.lse.end(), lse.begin());
}

inline void mpi_group::gather_heads(std::span<const float> part, std::span<float> out, index_t q_len,
                                    index_t num_kv_heads) {
  KVCACHE_ASSERT(
      q_len >= 1 && num_kv_heads >= 1 && static_cast<index_t>(out.size()) % (q_len * num_kv_heads) == 0,
      "gather_heads: out must be [q_len, num_q_heads, head_dim]");
  const index_t group_floats =
      static_cast<index_t>(out.size()) / (q_len * num_kv_heads);  // of one KV head and query
  const auto floats_of = [&](index_t rank) {
    const token_range heads = share_of(num_kv_heads, rank, size_);
    return (heads.last - heads.first) * group_floats;
  };
  KVCACHE_ASSERT(static_cast<index_t>(part.size()) == q_len * floats_of(rank_),
                 "gather_heads: part must be [q_len, query heads of kv_heads(), head_dim]");
  const index_t total = count_of(out);  // fits MPI's counts
  counts_.resize(static_cast<std::size_t>(size_));
  offsets_.resize(counts_.size());
  int offset = 0;
  for (index_t r = 0; r < size_; ++r) {
    counts_[static_cast<std::size_t>(r)] = static_cast<int>(q_len * floats_of(r));
    offsets_[static_cast<std::size_t>(r)] = offset;
    offset += counts_[static_cast<std::size_t>(r)];
  }
  if (q_len > 1) mine_.resize(out.size());
  const std::span<float> gathered = q_len > 1 ? std::span<float>(mine_) : out;
  require("MPI_Allgatherv", MPI_Allgatherv(part.data(), count_of(part), MPI_FLOAT, gathered.data(),
                                           counts_.data(), offsets_.data(), MPI_FLOAT, comm_));
  bytes_received_ += (total - count_of(part)) * index_t{sizeof(float)};
  if (q_len == 1) return;

  // gathered[rank][query][its heads] -> out[query][all heads]
  auto from = gathered.begin();
  index_t first = 0;
  for (index_t r = 0; r < size_; ++r) {
    for (index_t query = 0; query < q_len; ++query) {
      std::copy_n(from, floats_of(r), out.begin() + query * num_kv_heads * group_floats + first);
      from += floats_of(r);
    }
    first += floats_of(r);
  }
}

}  // namespace kvcache::inline v0
