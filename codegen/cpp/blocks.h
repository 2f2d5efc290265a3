// A feed-forward network of blocks of neurons, each of which is live where its value of a router is not 0.

namespace {

// x in place of the values that the router has for every neuron: as in a network without a gate, what is to be made of
// them is in them. The up projection's input is in `weights`. A few floats for each neuron are written, where its
// weights are thousands.
template <class Law, int64_t block>
void run_blocks(const SparseFfn& call, const typename Law::Weights& weights) {
  using Stored = typename Law::Stored;
  struct Values {
    const Stored* router;
    Stored* spread;
  };
  const Scratch<Stored> spread(call.rows * call.neurons);
  Values values{static_cast<const Stored*>(call.router), spread.data()};
  call.parallel(
      call.rows * (call.neurons / block), std::max<int64_t>(kSums / block, 1),
      [](int64_t begin, int64_t end, void* context) {
        const Values& from = *static_cast<const Values*>(context);
        for (int64_t i = begin; i < end; ++i) std::fill_n(from.spread + i * block, block, from.router[i]);
      },
      &values);
  SparseFfn each = call;
  each.x = spread.data();
  each.size = call.neurons;
  run<Law>(each, weights);
}

}  // namespace
