// A feed-forward network of which the weights of live neurons alone are read.
//
// Neurons are cut into chunks, whose number does not depend on the threads. A chunk computes the activations of its
// neurons, lists those that are live for any row, gathers their rows of the up projection, and adds their rows of the
// down projection into sums of its own. These are added up in order: the bits do not depend on the threads.

namespace {

constexpr int64_t kChunks = 16;     // at most
constexpr int64_t kTogether = 32;   // neurons after which live ones are looked for
constexpr int64_t kColumns = 1024;  // of the sums that are added up at a time
constexpr int64_t kSums = 1 << 17;  // that are worth a thread

// As Buffer, but with anything in it at first.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : lines_(std::make_unique_for_overwrite<Line[]>((count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line))) {}
  T* data() const { return reinterpret_cast<T*>(lines_.get()); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
};

struct None {  // in place of a projection that is not there
  using Input = None;
};

template <class Gate, class Up, class Down>
struct Weights {
  Gate gate;
  const typename Gate::Input& gate_input;
  Up up;
  const typename Up::Input& up_input;
  Down down;
};

// out[m * apart + i] = sum over k of y[m, k] W[n[i], k]
template <class Weight, class Which>
inline void multiply(const Weight& w, const Which& n, int64_t count, const typename Weight::Input& y, int64_t rows,
                     float* out, int64_t apart) {
  for (int64_t i = 0; i < count; i += kBlock) {
    const int some = int(std::min<int64_t>(count - i, kBlock));
    for (int64_t m = 0; m < rows; m += kRows) {
      const int together = int(std::min<int64_t>(rows - m, kRows));
      float p[kBlock * kRows];
      products(w, n.after(i), some, y, m, together, p);
      for (int c = 0; c < together; ++c)
        for (int r = 0; r < some; ++r) out[(m + c) * apart + i + r] = p[r * kRows + c];
    }
  }
}

struct Chunk {
  int64_t begin, count;  // of the candidates
  int64_t live, uses;    // neurons that are live for any row, and the sum over rows of live ones
  bool adds;             // whether its sums are anything
};

template <class Law>
struct Job {
  using Stored = typename Law::Stored;

  const SparseFfn& call;
  const typename Law::Weights& weights;
  const int64_t candidates, width, chunks, apart, out_apart;
  Scratch<float> activations;  // [rows, apart], of the candidates
  Scratch<float> sums;         // [chunks, rows, out_apart]
  std::vector<int64_t> only;   // and what Gathered wants behind it
  std::vector<Chunk> chunk;

  static int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

  Job(const SparseFfn& call, const typename Law::Weights& weights)
      : call(call), weights(weights), candidates(call.only ? call.candidates : call.neurons),
        width(std::max<int64_t>(up_to((candidates + kChunks - 1) / kChunks, 16), 16)),
        chunks((candidates + width - 1) / width), apart(chunks * width), out_apart(up_to(call.out_size, 16)),
        activations(call.rows * apart), sums(chunks * call.rows * out_apart), chunk(chunks) {
    for (int64_t c = 0; c < chunks; ++c) chunk[c] = {c * width, std::min(width, candidates - c * width), 0, 0, false};
    if (call.only) {
      only.assign(call.only, call.only + candidates);
      only.resize(candidates + kMostAhead + kBlock, candidates ? only.back() : 0);
    }
  }

  float* row(int64_t m, const Chunk& some) const { return activations.data() + m * apart + some.begin; }
  float* sum(int64_t c, int64_t m) const { return sums.data() + (c * call.rows + m) * out_apart; }
  int64_t neuron(int64_t candidate) const { return call.only ? only[candidate] : candidate; }
};

// What one thread needs for its chunks.
template <class Law>
class Worker {
 public:
  explicit Worker(Job<Law>& job)
      : job_(job), call_(job.call), rows_(job.call.rows), width_(job.width), operands_(Law::kOperands * width_),
        live_(width_), at_(width_), numbers_(width_ + kMostAhead + kBlock), p_(rows_ * width_), a_(rows_ * width_),
        v_(Law::kOperands * width_) {}

  // The activations of a chunk; where something selects among them, as they come before.
  void activate(const Chunk& some) {
    gather_operands(some);
    found_ = uses_ = 0;
    for (int64_t i = 0; i < some.count; i += kTogether) {
      const int64_t end = std::min(i + kTogether, some.count);
      multiply_gate(some, i, end);
      apply(some, i, end, [](Vector p0, const Vector* v) { return Law::activation(p0, v); });
      if constexpr (!Law::kSelects) list(some, i, end);
    }
  }

  // What follows it: the sums of a chunk.
  void finish(int64_t c) {
    Chunk& some = job_.chunk[c];
    if constexpr (Law::kSelects) {
      gather_operands(some);
      found_ = uses_ = 0;
      apply(some, 0, some.count, [](Vector a, const Vector* v) { return Law::after(a, v); });
      list(some, 0, some.count);
    }
    some.live = found_;
    some.uses = uses_;
    if (!found_) return;
    gather_live(some);
    const auto& w = job_.weights;
    if constexpr (Law::kUp)
      multiply(w.up, Gathered{numbers_.data()}, found_, w.up_input, rows_, p_.data(), width_);
    hide();
    const int64_t kept = compact();
    some.adds = kept > 0;
    if (!kept) return;
    for (int64_t m = 0; m < rows_; ++m) std::fill_n(job_.sum(c, m), job_.out_apart, 0.0f);
    add(w.down, Gathered{numbers_.data()}, kept, p_.data(), width_, rows_, job_.sum(c, 0), job_.out_apart);
  }

 private:
  using Stored = typename Law::Stored;

  void multiply_gate(const Chunk& some, int64_t i, int64_t end) {
    float* to = job_.row(0, some) + i;
    if constexpr (Law::kGate) {
      const auto& w = job_.weights;
      const int64_t begin = some.begin + i;
      if (call_.only)
        multiply(w.gate, Gathered{job_.only.data() + begin}, end - i, w.gate_input, rows_, to, job_.apart);
      else
        multiply(w.gate, Following{begin}, end - i, w.gate_input, rows_, to, job_.apart);
    } else {
      for (int64_t m = 0; m < rows_; ++m)
        gather(static_cast<const Stored*>(call_.x) + m * call_.size, some.begin + i, end - i, to + m * job_.apart);
    }
  }

  // Elements of a vector over neurons, those of some candidates.
  void gather(const Stored* from, int64_t begin, int64_t count, float* to) {
    if (call_.only) {
      for (int64_t i = 0; i < count; ++i)
        to[i] = sparsecc::load(from + job_.only[begin + i], sparsecc::First{1})[0];
    } else {
      over_lanes(int(count), [&](int i, auto lanes) {
        sparsecc::store(to + i, sparsecc::load(from + begin + i, lanes), lanes);
      });
    }
  }

  void gather_operands(const Chunk& some) {
    for (int j = 0; j < Law::kOperands; ++j)
      gather(static_cast<const Stored*>(call_.operands[j]), some.begin, some.count, operands_.data() + j * width_);
  }

  template <class Lanes>
  static void load_operands(const float* from, int64_t apart, Lanes lanes, Vector* v) {
    for (int j = 0; j < Law::kOperands; ++j) v[j] = sparsecc::load(from + j * apart, lanes);
  }

  template <class Function>
  void apply(const Chunk& some, int64_t begin, int64_t end, Function function) {
    for (int64_t m = 0; m < rows_; ++m) {
      float* a = job_.row(m, some) + begin;
      over_lanes(int(end - begin), [&](int i, auto lanes) {
        Vector v[Law::kOperands + 1];
        load_operands(operands_.data() + begin + i, width_, lanes, v);
        sparsecc::store(a + i, function(sparsecc::load(a + i, lanes), v), lanes);
      });
    }
  }

  // Adds to the list the neurons that are live for any row. The first rows of up and down are asked for at once, for
  // nothing comes before them that could; Gathered asks for the others.
  void list(const Chunk& some, int64_t begin, int64_t end) {
    int32_t* live = live_.data();
    std::fill(live + begin, live + end, 0);
    for (int64_t m = 0; m < rows_; ++m) {
      const float* a = job_.row(m, some);
      for (int64_t i = begin; i < end; ++i) live[i] += a[i] != 0;
    }
    const int64_t before = found_;
    for (int64_t i = begin; i < end; ++i) {
      at_.data()[found_] = i;
      found_ += live[i] != 0;
      uses_ += live[i];
    }
    const auto& w = job_.weights;
    for (int64_t l = before; l < found_; ++l) {
      const int64_t neuron = numbers_.data()[l] = job_.neuron(some.begin + at_.data()[l]);
      if constexpr (Law::kUp)
        if (l < rows_ahead(w.up.row_bytes())) w.up.ask(neuron);
      if (l < rows_ahead(w.down.row_bytes())) w.down.ask(neuron);
    }
  }

  // What belongs to live neurons side by side.
  void gather_live(const Chunk& some) {
    pad(found_);
    for (int64_t m = 0; m < rows_; ++m) pick(job_.row(m, some), found_, a_.data() + m * width_);
    for (int j = 0; j < Law::kOperands; ++j) pick(operands_.data() + j * width_, found_, v_.data() + j * width_);
  }

  void pick(const float* from, int64_t count, float* to) {
    for (int64_t l = 0; l < count; ++l) to[l] = from[at_.data()[l]];
  }

  void pad(int64_t count) {
    if (count) std::fill_n(numbers_.data() + count, kMostAhead + kBlock, numbers_.data()[count - 1]);
  }

  // h in place of p1; nothing for a row that a neuron is dead for.
  void hide() {
    for (int64_t m = 0; m < rows_; ++m)
      over_lanes(int(found_), [&](int i, auto lanes) {
        float* p = p_.data() + m * width_ + i;
        Vector v[Law::kOperands + 1];
        load_operands(v_.data() + i, width_, lanes, v);
        const Vector a = sparsecc::load(a_.data() + m * width_ + i, lanes);
        const Vector p1 = Law::kUp ? sparsecc::load(p, lanes) : a;
        sparsecc::store(p, a == 0 ? sparsecc::splat(0) : Law::hidden(a, p1, v), lanes);
      });
  }

  // Without the neurons whose h is zero for all rows, and with the factors of the others in it.
  int64_t compact() {
    int64_t kept = 0;
    for (int64_t l = 0; l < found_; ++l) {
      const int64_t neuron = numbers_.data()[l];
      const float factor = job_.weights.down.factor(neuron);
      bool any = false;
      for (int64_t m = 0; m < rows_; ++m) {
        float* h = p_.data() + m * width_;
        const float value = h[l];
        any |= value != 0;
        h[kept] = value == 0 ? 0 : value * factor;
      }
      numbers_.data()[kept] = neuron;
      kept += any;
    }
    pad(kept);
    return kept;
  }

  Job<Law>& job_;
  const SparseFfn& call_;
  const int64_t rows_, width_;
  int64_t found_ = 0, uses_ = 0;   // live neurons of the chunk so far
  Scratch<float> operands_;  // [operands, width], of the chunk
  Scratch<int32_t> live_;    // rows that a neuron is live for
  Scratch<int64_t> at_, numbers_;  // of live neurons: their places in the chunk, their numbers
  Scratch<float> p_, a_, v_;       // of live neurons: p1 and then h [rows, width], a, and the operands
};

template <class Law>
void activate_some(int64_t begin, int64_t end, void* context) {
  Job<Law>& job = *static_cast<Job<Law>*>(context);
  Worker<Law> worker(job);
  for (int64_t c = begin; c < end; ++c) worker.activate(job.chunk[c]);
}

template <class Law>
void select_some(int64_t begin, int64_t end, void* context) {
  const Job<Law>& job = *static_cast<const Job<Law>*>(context);
  for (int64_t m = begin; m < end; ++m) Law::select(job.activations.data() + m * job.apart, job.candidates);
}

template <class Law>
void finish_some(int64_t begin, int64_t end, void* context) {
  Job<Law>& job = *static_cast<Job<Law>*>(context);
  Worker<Law> worker(job);
  for (int64_t c = begin; c < end; ++c) worker.finish(c);
}

template <class Law>
void activate_and_finish_some(int64_t begin, int64_t end, void* context) {
  Job<Law>& job = *static_cast<Job<Law>*>(context);
  Worker<Law> worker(job);
  for (int64_t c = begin; c < end; ++c) {
    worker.activate(job.chunk[c]);
    worker.finish(c);
  }
}

// Columns of the outputs, from the sums of all chunks in order.
template <class Law>
void add_up_some(int64_t begin, int64_t end, void* context) {
  const Job<Law>& job = *static_cast<const Job<Law>*>(context);
  const int64_t size = job.call.out_size;
  typename Law::Stored* out = static_cast<typename Law::Stored*>(job.call.out);
  for (int64_t m = 0; m < job.call.rows; ++m) {
    const int64_t first = begin * kColumns, last = std::min(size, end * kColumns);
    over_lanes(int(last - first), [&](int i, auto lanes) {
      Vector total = {};
      for (int64_t c = 0; c < job.chunks; ++c)
        if (job.chunk[c].adds) total += sparsecc::load(job.sum(c, m) + first + i, lanes);
      sparsecc::store(out + m * size + first + i, total, lanes);
    });
  }
}

template <class Law>
void run(const SparseFfn& call, const typename Law::Weights& weights) {
  Job<Law> job(call, weights);
  if constexpr (Law::kSelects) {
    call.parallel(job.chunks, 1, activate_some<Law>, &job);
    call.parallel(call.rows, 1, select_some<Law>, &job);
    call.parallel(job.chunks, 1, finish_some<Law>, &job);
  } else {
    call.parallel(job.chunks, 1, activate_and_finish_some<Law>, &job);
  }
  const int64_t blocks = (call.out_size + kColumns - 1) / kColumns;
  const int64_t each = std::max<int64_t>(kColumns * call.rows * job.chunks, 1);
  call.parallel(blocks, std::max<int64_t>(kSums / each, 1), add_up_some<Law>, &job);
  call.live[0] = call.live[1] = 0;
  for (const Chunk& some : job.chunk) {
    call.live[0] += some.uses;
    call.live[1] += some.live;
  }
}

}  // namespace
