// Measures an MPI library the way `smddp-perf` measures ours, and writes the same CSV columns.
//
//   mpirun -n 2 ./collectives_mpi LABEL OPS DTYPES MIN MAX BUDGET BATCH CSV [fresh|used]     (OPS and DTYPES separated by commas)
//
// Each size is checked first on fresh data. Then batches of about BATCH seconds of calls on zeros; a batch starts behind a barrier
// and counts as long as its slowest rank. With "fresh" every call has inputs written just before it, and begins at a moment
// that all ranks have agreed on (they must be of one machine): a barrier lets go of one rank before another. With "used",
// besides, its time ends when each rank has looked at every cache line of its result. bfloat16 is reduced by a user
// operation, since MPI has no such type.
#include <mpi.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

using Bytes = std::vector<unsigned char>;

float widen(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

void add_bfloat16(void *in, void *inout, int *count, MPI_Datatype *) {
  const auto *a = static_cast<const uint16_t *>(in);
  auto *b = static_cast<uint16_t *>(inout);
  for (int i = 0; i < *count; i++) b[i] = narrow(widen(a[i]) + widen(b[i]));
}

// A page-aligned array of float32 or bfloat16.
class Array {
 public:
  Array(size_t count, bool wide) : count_(count), wide_(wide) {
    const size_t bytes = (count * width() + 4095) / 4096 * 4096 + 4096;
    data_ = std::aligned_alloc(4096, bytes);
    if (!data_) MPI_Abort(MPI_COMM_WORLD, 1);
    clear();
  }
  ~Array() { std::free(data_); }
  Array(const Array &) = delete;
  Array &operator=(const Array &) = delete;

  size_t width() const { return wide_ ? 4 : 2; }
  size_t count() const { return count_; }
  void *data() const { return data_; }
  void clear() { std::memset(data_, 0, count_ * width()); }
  void set(size_t i, float v) {
    if (wide_) static_cast<float *>(data_)[i] = v;
    else static_cast<uint16_t *>(data_)[i] = narrow(v);
  }
  float get(size_t i) const {
    return wide_ ? static_cast<const float *>(data_)[i] : widen(static_cast<const uint16_t *>(data_)[i]);
  }

 private:
  size_t count_;
  bool wide_;
  void *data_;
};

struct Case {
  std::string op;
  int rank, world;
  MPI_Datatype type;
  MPI_Op sum;
  Array &whole, &block;

  void call() {
    const int n = int(whole.count()), k = int(block.count());
    if (op == "allreduce") MPI_Allreduce(MPI_IN_PLACE, whole.data(), n, type, sum, MPI_COMM_WORLD);
    else if (op == "broadcast") MPI_Bcast(whole.data(), n, type, 0, MPI_COMM_WORLD);
    else if (op == "alltoall") MPI_Alltoall(whole.data(), n / world, type, block.data(), n / world, type, MPI_COMM_WORLD);
    else if (op == "allgather") MPI_Allgather(block.data(), k, type, whole.data(), k, type, MPI_COMM_WORLD);
    else if (op == "sendrecv")
      MPI_Sendrecv(whole.data(), n, type, (rank + 1) % world, 0, block.data(), n, type, previous(), 0, MPI_COMM_WORLD,
                   MPI_STATUS_IGNORE);
    else MPI_Reduce_scatter_block(whole.data(), block.data(), k, type, sum, MPI_COMM_WORLD);
  }

  int previous() const { return (rank + world - 1) % world; }

  // What rank `by` brings to place i: small, so that sums of many ranks are exact in bfloat16, too. Gathered data is i mod 7.
  static float brought(size_t i, size_t by) { return float((i % 7 + 3 * by) % 13 + 1); }
  float mine(size_t i) const { return brought(i, size_t(rank)); }
  std::array<float, 7> sums() const {
    std::array<float, 7> all{};
    for (size_t i = 0; i < all.size(); i++)
      for (int by = 0; by < world; by++) all[i] += brought(i, size_t(by));
    return all;
  }
  // Sums of bfloat16 are rounded from 256 on, in each step.
  bool near(float got, float want) const { return std::fabs(got - want) <= (type == MPI_FLOAT || want < 256 ? 0 : want / 50); }

  void fill() {
    const size_t first = size_t(rank) * block.count();
    for (size_t i = 0; i < whole.count(); i++) whole.set(i, op == "allgather" ? -1 : mine(i));
    for (size_t i = 0; i < block.count(); i++) block.set(i, op == "allgather" ? float((first + i) % 7) : -1);
  }

  // What this rank brings, written again.
  void renew() {
    if (op == "allgather") block.clear();
    else if (op != "broadcast" || rank == 0) whole.clear();
  }

  // Looks at every cache line of what a call left on this rank, as a program that goes on with it does.
  void read_result() const {
    if (op == "broadcast" && rank == 0) return;
    const Array &result = op == "reduce_scatter" || op == "alltoall" || op == "sendrecv" ? block : whole;
    const auto *bytes = static_cast<const volatile unsigned char *>(result.data());
    for (size_t i = 0; i < result.count() * result.width(); i += 64) bytes[i];
  }

  bool right() const {
    const size_t first = size_t(rank) * block.count();
    const auto summed = sums();
    if (op == "reduce_scatter") {
      for (size_t i = 0; i < block.count(); i++)
        if (!near(block.get(i), summed[(first + i) % 7])) return false;
      return true;
    }
    if (op == "alltoall") {
      const size_t share = block.count() / size_t(world);
      for (size_t i = 0; i < block.count(); i++)
        if (block.get(i) != brought(size_t(rank) * share + i % share, i / share)) return false;
      return true;
    }
    if (op == "sendrecv") {
      for (size_t i = 0; i < block.count(); i++)
        if (block.get(i) != brought(i, size_t(previous()))) return false;
      return true;
    }
    for (size_t i = 0; i < whole.count(); i++) {
      const float want = op == "allreduce" ? summed[i % 7] : op == "broadcast" ? brought(i, 0) : float(i % 7);
      if (!near(whole.get(i), want)) return false;
    }
    return true;
  }
};

// So long before it begins ranks agree on when a call does.
const int64_t notice = 10'000;

// Of the clock that all processes of a machine read alike, and that nobody sets: CLOCK_MONOTONIC.
int64_t nanos() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// Meets the other ranks; when all of them begin.
int64_t begin() {
  MPI_Barrier(MPI_COMM_WORLD);
  int64_t start = nanos() + notice;
  MPI_Bcast(&start, 1, MPI_INT64_T, 0, MPI_COMM_WORLD);
  // More than that is left only where the ranks' clocks differ.
  for (int64_t left = notice; left > 0 && left <= notice;) left = start - nanos();
  return start;
}

double batch(Case &c, int calls, bool fresh, bool used) {
  if (fresh) {
    double sum = 0;
    for (int i = 0; i < calls; i++) {
      c.renew();
      const int64_t start = begin();
      c.call();
      if (used) c.read_result();
      sum += double(nanos() - start) * 1e-9;
    }
    return sum / calls;
  }
  MPI_Barrier(MPI_COMM_WORLD);
  const double start = MPI_Wtime();
  for (int i = 0; i < calls; i++) c.call();
  return (MPI_Wtime() - start) / calls;
}

std::vector<std::string> words(const std::string &text) {
  std::vector<std::string> out(1);
  for (char c : text) {
    if (c == ',') out.emplace_back();
    else out.back() += c;
  }
  return out;
}

}  // namespace

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  int rank, world;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &world);
  const bool used = argc == 10 && std::string(argv[9]) == "used";
  const bool fresh = used || (argc == 10 && std::string(argv[9]) == "fresh");
  if (argc != 9 && !fresh) {
    if (rank == 0) std::fprintf(stderr, "usage: %s LABEL OPS DTYPES MIN MAX BUDGET BATCH CSV [fresh|used]\n", argv[0]);
    MPI_Finalize();
    return 2;
  }
  const std::string known = " allreduce broadcast alltoall allgather reduce_scatter sendrecv ";
  for (const auto &op : words(argv[2]))
    if (known.find(" " + op + " ") == std::string::npos) {
      if (rank == 0) std::fprintf(stderr, "no operation '%s'; there are:%s\n", op.c_str(), known.c_str());
      MPI_Finalize();
      return 2;
    }
  const size_t smallest = std::strtoull(argv[4], nullptr, 10), largest = std::strtoull(argv[5], nullptr, 10);
  const double budget = std::atof(argv[6]), length = std::atof(argv[7]);
  FILE *csv = rank == 0 ? std::fopen(argv[8], "a") : nullptr;
  if (csv && std::fseek(csv, 0, SEEK_END) == 0 && std::ftell(csv) == 0)
    std::fprintf(csv, "label,op,dtype,world,bytes,iters,median_us,min_us,algbw_GBps,busbw_GBps,check\n");
  MPI_Op user_sum;
  MPI_Op_create(add_bfloat16, 1, &user_sum);
  MPI_Datatype two_bytes;
  MPI_Type_contiguous(2, MPI_BYTE, &two_bytes);
  MPI_Type_commit(&two_bytes);

  for (const auto &op : words(argv[2]))
    for (const auto &dtype : words(argv[3]))
      for (size_t bytes = smallest; bytes <= largest; bytes *= 4) {
        const bool wide = dtype == "float32", blocks = op == "allgather" || op == "reduce_scatter" || op == "alltoall";
        const size_t count = bytes / (wide ? 4 : 2);
        if (count == 0 || (blocks && count % size_t(world))) continue;
        Array whole(count, wide), block(op == "alltoall" || op == "sendrecv" ? count : blocks ? count / size_t(world) : 0, wide);
        Case c{op, rank, world, wide ? MPI_FLOAT : two_bytes, wide ? MPI_SUM : user_sum, whole, block};
        c.fill();
        c.call();
        int good = c.right();
        whole.clear();
        block.clear();
        for (int i = 0; i < 3; i++) c.call();
        double estimate = batch(c, 2, fresh, used);
        MPI_Allreduce(MPI_IN_PLACE, &estimate, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
        if (fresh) estimate += double(notice) * 1e-9;
        const int calls = std::clamp(int(length / estimate), 1, 20000);
        const int batches = std::clamp(int(budget / (estimate * calls)), 7, 401);
        std::vector<double> times;
        for (int b = 0; b < batches; b++) times.push_back(batch(c, calls, fresh, used));
        MPI_Allreduce(MPI_IN_PLACE, times.data(), batches, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
        MPI_Allreduce(MPI_IN_PLACE, &good, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
        std::sort(times.begin(), times.end());
        const double median = times[size_t(batches) / 2], algbw = double(bytes) / median / 1e9;
        const double n = world, factor = op == "allreduce" ? 2 * (n - 1) / n : blocks ? (n - 1) / n : 1;
        if (csv) {
          std::fprintf(csv, "%s,%s,%s,%d,%zu,%d,%.2f,%.2f,%.4f,%.4f,%s\n", argv[1], op.c_str(), dtype.c_str(), world, bytes,
                       batches * calls, median * 1e6, times[0] * 1e6, algbw, algbw * factor, good ? "ok" : "WRONG");
          std::fflush(csv);
        }
      }
  if (csv) std::fclose(csv);
  MPI_Finalize();
  return 0;
}
