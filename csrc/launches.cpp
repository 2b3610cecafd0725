// The gathered tensors laid out in launches: for the CPU, and for devices.
#include <algorithm>
#include <tuple>

#include "gather.h"

namespace fusedopt {
namespace {

auto launch_key(const Slot& s) {
  // a step on the CPU sums slot by slot
  return std::tuple(s.wave, s.on_device ? s.holders : 0, s.rule, s.dtype, s.grad_dtype, s.state_dtype);
}

template <class S>
void sort_into_launches(std::vector<S*>& order) {
  const auto before = [](const Slot* a, const Slot* b) { return launch_key(*a) < launch_key(*b); };
  if (!std::is_sorted(order.begin(), order.end(), before)) std::stable_sort(order.begin(), order.end(), before);
}

}  // namespace

// Parameters that share memory (tied by .data, say) step in order, in waves of their own: two threads must not meet
// there. Looked at only when a pointer or the set of active tensors changed.
uint64_t Table::settle() {
  bool changed = moved_;
  for (Slot& slot : slots_) {
    const int now = slot.active ? 1 + (slot.grad != nullptr) : 0;
    changed |= now != slot.was;
    slot.was = now;
  }
  if (!changed) return version_;
  moved_ = false;
  ++version_;
  updated_ = Ref();
  struct Range {
    const char *begin, *end;
    size_t slot;
  };
  std::vector<Range> ranges;
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    slot.wave = 0;
    if (!slot.active || slot.layout.numel == 0) continue;
    const auto add = [&](void* data, Dtype dtype) {
      const char* begin = static_cast<const char*>(data);
      ranges.push_back({begin, begin + slot.layout.numel * size_of(dtype), i});
    };
    add(slot.data, slot.dtype);
    for (int s = 0; s < slot.n_states; ++s) add(slot.states[s], slot.state_dtype);
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<std::pair<size_t, size_t>> clashes;  // earlier slot, later slot
  for (size_t a = 0; a < ranges.size(); ++a)
    for (size_t b = a + 1; b < ranges.size() && ranges[b].begin < ranges[a].end; ++b)
      if (ranges[a].slot != ranges[b].slot) clashes.push_back(std::minmax(ranges[a].slot, ranges[b].slot));
  std::sort(clashes.begin(), clashes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  for (const auto& [earlier, later] : clashes)
    slots_[later].wave = std::max(slots_[later].wave, slots_[earlier].wave + 1);
  return version_;
}

std::vector<Launch> Table::launches(const std::vector<Group>& groups, int threads, const Precision* precision) {
  settle();
  std::vector<Slot*> order;
  order.reserve(slots_.size());
  for (Slot& slot : slots_)
    if (slot.active && !slot.on_device) order.push_back(&slot);
  sort_into_launches(order);

  rows_.clear();
  rows_.reserve(order.size());
  std::vector<Launch> launches;
  for (size_t i = 0; i < order.size(); ++i) {
    Slot& slot = *order[i];
    if (i == 0 || launch_key(*order[i - 1]) != launch_key(slot))
      launches.push_back({slot.rule, slot.dtype, slot.grad_dtype, slot.state_dtype, rows_.data() + i, 0, groups.data(),
                          threads, precision});
    ++launches.back().n_rows;
    double step = slot.fresh ? 1 : 2;
    if (slot.step && slot.grad)
      step = slot.step_is_double ? (*static_cast<double*>(slot.step) += 1) : (*static_cast<float*>(slot.step) += 1);
    if (slot.grad) slot.fresh = false;
    Row row{slot.data, slot.grad, {}, slot.layout.numel, step, slot.group, slot.extras, slot.origin};
    std::copy(slot.states, slot.states + kMaxStates, row.state);
    rows_.push_back(row);
  }
  return launches;
}

std::vector<DeviceLaunch>& DevicePlan::lay_out(Table& table, int32_t device) {
  const std::vector<Slot>& slots = table.slots();
  const uint64_t version = table.settle();
  if (version == version_) {
    for (size_t l = 0; l < launches_.size(); ++l) {
      DeviceLaunch& launch = launches_[l];
      launch.rows_changed = launch.grads_changed = false;
      for (size_t r = 0; r < launch.grads.size(); ++r) {
        const void* grad = slots[slots_[l][r]].grad;
        launch.grads_changed |= grad != launch.grads[r];
        launch.grads[r] = grad;
      }
    }
    return launches_;
  }
  version_ = version;
  launches_.clear();
  slots_.clear();
  std::vector<const Slot*> order;
  for (const Slot& slot : slots)
    if (slot.active && slot.on_device && slot.device.id == device) order.push_back(&slot);
  sort_into_launches(order);
  for (size_t i = 0; i < order.size(); ++i) {
    const Slot& slot = *order[i];
    if (i == 0 || launch_key(*order[i - 1]) != launch_key(slot)) {
      launches_.push_back(
          {slot.rule, slot.dtype, slot.grad_dtype, slot.state_dtype, slot.holders, {}, {}, 0, true, true, {}});
      slots_.emplace_back();
    }
    DeviceLaunch& launch = launches_.back();
    DeviceRow row{slot.data,           {},         static_cast<float*>(slot.step), slot.layout.numel, launch.chunks,
                  int64_t(slot.group), slot.extras};
    std::copy(slot.states, slot.states + kMaxStates, row.state);
    launch.rows.push_back(row);
    launch.grads.push_back(slot.grad);
    launch.chunks += (slot.layout.numel + kChunk - 1) / kChunk;
    slots_.back().push_back(size_t(&slot - slots.data()));
  }
  return launches_;
}

}  // namespace fusedopt
