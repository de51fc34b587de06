// SPDX-License-Identifier: MIT
// Any bytes as the value of a tier: good only if they are, byte for byte, the record of this key and payload. Half of the
// inputs get the checksums that they ought to have, so that more than checksums is looked at.
#include <kvcache/store/tier_record.hpp>

#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

namespace {

using namespace kvcache;
using namespace kvcache::store;

void repair(std::vector<std::byte>& record) {
  detail::tier_record_fields fields;
  if (record.size() < sizeof(fields)) return;
  std::memcpy(&fields, record.data(), sizeof(fields));
  if (fields.space_bytes > max_space_bytes || fields.num_tokens > max_path_tokens) return;
  const std::size_t head_bytes = detail::record_head_bytes(static_cast<std::size_t>(fields.space_bytes),
                                                           static_cast<std::size_t>(fields.num_tokens));
  if (head_bytes > record.size()) return;
  fields.payload_crc = crc32c(std::span(record).subspan(head_bytes));
  std::memcpy(record.data(), &fields, sizeof(fields));
  fields.head_crc = detail::tier_head_checksum(std::span(record).first(head_bytes));
  std::memcpy(record.data(), &fields, sizeof(fields));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto input = std::as_bytes(std::span(data, size));
  if (input.empty()) return 0;
  std::vector<std::byte> record(input.begin() + 1, input.end());
  if ((input[0] & std::byte{1}) != std::byte{0}) repair(record);

  static const std::vector<token_id> tokens{1, 2, 3};
  static const tier_key keys[] = {{"me", tokens}, {"", {}}, {"you", std::span(tokens).first(1)}};
  int num_good = 0;
  for (const tier_key& key : keys) {
    std::span<const std::byte> payload;
    if (check_record(key, record, payload) != record_state::good) continue;
    ++num_good;
    std::vector<std::byte> again;
    write_record_head(key, payload, again);
    again.insert(again.end(), payload.begin(), payload.end());
    // Only what nobody reads may differ: zeros that a record with right checksums need not have.
    if (again.size() != record.size()) std::abort();
    const std::size_t used = sizeof(detail::tier_record_fields) + key.space.size() + 4 * key.tokens.size();
    if (!std::equal(again.begin() + 48, again.begin() + static_cast<std::ptrdiff_t>(used),
                    record.begin() + 48) ||
        !std::equal(payload.begin(), payload.end(),
                    again.end() - static_cast<std::ptrdiff_t>(payload.size())))
      std::abort();
  }
  if (num_good > 1) std::abort();  // of two keys at once
  return 0;
}
