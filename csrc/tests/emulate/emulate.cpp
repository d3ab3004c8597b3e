#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

extern "C" char __data_start, _end;  // of the program's variables, __shared__ ones among them: the linker's names

uint3 threadIdx, blockIdx;
dim3 gridDim;

namespace emulate {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kWarp = 32;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  unsigned exchanges = 0;
};

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s (block %u, %u)\n", what, blockIdx.x, blockIdx.y);
  std::abort();
}

std::vector<Fiber> fibers;
ucontext_t scheduler;
const std::function<void()>* body;
float lanes[2][1024 / kWarp]
           [kWarp];  // a warp's exchanges take turns, so that nobody overwrites a value before it was read
unsigned registers[2][1024 / kWarp][kWarp][6];
std::mt19937 random_order{1};
std::unique_ptr<char[]> shared;
size_t shared_size = 0;

void entry() {
  (*body)();
  fibers[threadIdx.x].state = State::done;
}

void wait(State state) {
  const uint3 self = threadIdx;
  fibers[self.x].state = state;
  swapcontext(&fibers[self.x].context, &scheduler);
  threadIdx = self;
}

void start(unsigned thread) {
  Fiber& fiber = fibers[thread];
  fiber.state = State::ready;
  fiber.exchanges = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, entry, 0);
}

// Lets threads go that all their warp, or all threads of the block that are left, wait with.
void release(unsigned threads) {
  auto count = [&](unsigned begin, unsigned end, State state) {
    return std::count_if(fibers.begin() + begin, fibers.begin() + end,
                         [&](const Fiber& f) { return f.state == state; });
  };
  auto wake = [&](unsigned begin, unsigned end, State state) {
    for (unsigned i = begin; i < end; ++i) {
      if (fibers[i].state == state) fibers[i].state = State::ready;
    }
  };
  const long done = count(0, threads, State::done), waiting = count(0, threads, State::at_block_barrier);
  if (waiting > 0 && waiting + done == threads) wake(0, threads, State::at_block_barrier);
  for (unsigned warp = 0; warp < threads; warp += kWarp) {
    if (count(warp, warp + kWarp, State::at_warp_barrier) == kWarp) wake(warp, warp + kWarp, State::at_warp_barrier);
  }
}

// Threads that can run, in random order; those of one warp, which changes now and then, only when no other can: it
// finds what the others leave when they are as far ahead as barriers let them be.
std::vector<unsigned> runnable(unsigned threads) {
  static unsigned slow = 0;
  const unsigned warps = threads / kWarp;
  if (random_order() % 32 == 0) slow = random_order() % warps;
  std::vector<unsigned> ready, behind;
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i].state == State::ready) (i / kWarp == slow ? behind : ready).push_back(i);
  }
  if (ready.empty()) ready.swap(behind);
  std::shuffle(ready.begin(), ready.end(), random_order);
  return ready;
}

void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) start(i);
  while (true) {
    const std::vector<unsigned> ready = runnable(threads);
    if (ready.empty()) {
      const bool all_done =
          std::all_of(fibers.begin(), fibers.begin() + threads, [](const Fiber& f) { return f.state == State::done; });
      if (all_done) return;
      die("threads wait for each other: a barrier or shuffle that not all of them reach");
    }
    for (unsigned i : ready) {
      threadIdx = {i, 0, 0};
      swapcontext(&scheduler, &fibers[i].context);
    }
    release(threads);
  }
}

}  // namespace

unsigned lane() { return threadIdx.x % kWarp; }

void block_barrier() { wait(State::at_block_barrier); }

float exchange(float value, unsigned source) {
  float* warp = lanes[fibers[threadIdx.x].exchanges++ % 2][threadIdx.x / kWarp];
  warp[lane()] = value;
  wait(State::at_warp_barrier);
  return warp[source];
}

const unsigned (*gather(const unsigned (&mine)[6]))[6] {
  auto& warp = registers[fibers[threadIdx.x].exchanges++ % 2][threadIdx.x / kWarp];
  std::copy(mine, mine + 6, warp[lane()]);
  wait(State::at_warp_barrier);
  return warp;
}

void* dynamic_shared() { return shared.get(); }

void check_global(const void* at) {
  const char* byte = static_cast<const char*>(at);
  const bool dynamic = byte >= shared.get() && byte < shared.get() + shared_size;
  if (dynamic || (byte >= &__data_start && byte < &_end)) die("a global access to shared memory");
}

void run_grid(dim3 blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread) {
  if (threads % kWarp) die("block sizes that are no multiple of 32 are not modelled");
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  body = &thread;
  gridDim = blocks;
  shared_size = shared_bytes;
  shared.reset(new char[shared_bytes]);  // of exactly this size, for the address sanitiser
  std::vector<size_t> order(size_t{blocks.x} * blocks.y * blocks.z);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random_order);
  for (size_t block : order) {
    blockIdx = {static_cast<unsigned>(block % blocks.x), static_cast<unsigned>(block / blocks.x % blocks.y),
                static_cast<unsigned>(block / blocks.x / blocks.y)};
    std::memset(shared.get(), 0xff, shared_bytes);
    run_block(threads);
  }
}

}  // namespace emulate

namespace {
cudaError_t last_error = cudaSuccess;
}

void emulate_launch_error(cudaError_t error) { last_error = error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 8;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
