#include "tape.h"

#include <map>
#include <memory>
#include <mutex>

#include "checks.h"
#include "ops.h"

namespace dyvte::bind {

namespace {

std::mutex mutex;  // of what follows
std::map<int64_t, std::shared_ptr<Tape>> tapes;
int64_t last_number = 0;

std::shared_ptr<Tape> find(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = tapes.find(number);
  if (found == tapes.end()) fail("tape_run: tape must be the number of a tape, got ", number);
  return found->second;
}

}  // namespace

int64_t tape_begin(const Tensor& arena) {
  const View v("tape_begin", "arena", arena);
  if (v.on_cuda() || v.dtype != aoti_torch_dtype_uint8()) fail(v.op, ": arena must be uint8 on the CPU");
  check_shape(v, {-1}, "[bytes]");
  check_dense(v);
  if (recording) fail(v.op, ": this thread records already");
  auto tape = std::make_shared<Tape>(v.data, v.size[0]);
  const std::lock_guard<std::mutex> lock(mutex);
  tapes[++last_number] = tape;
  recording = tape.get();
  return last_number;
}

int64_t tape_end(const Tensor&) {
  if (!recording) fail("tape_end: this thread records nothing");
  const int64_t used = recording->used;
  recording = nullptr;
  return used;
}

void tape_run(const Tensor&, int64_t number) {
  for (const auto& call : find(number)->calls) {
    const Status status = call();
    if (status) fail("tape_run: ", status);
  }
}

void tape_drop(const Tensor&, int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  tapes.erase(number);
}

}  // namespace dyvte::bind
