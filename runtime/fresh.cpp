// What a compiled graph's weights looked like, and whether they still do: one call for all of them.
//
// Watch(positions, weights, where, counts) remembers of each weight the object, its address and its version,
// and the bits at the addresses `where`: counts[0] samples of one byte, then of two, four and eight.
// watch.matches(args) looks at args[position] of each. Whoever holds a Watch keeps the sampled memory alive.

#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

namespace {

struct Weight {
  Py_ssize_t position;
  const PyObject* object;
  const void* address;
  int64_t version;
};

template <class Bits>
struct Samples {
  std::vector<const void*> where;
  std::vector<Bits> before;

  static Bits read(const void* address) {
    Bits bits;
    std::memcpy(&bits, address, sizeof bits);  // a weight may be a view at any byte
    return bits;
  }

  void take(const int64_t* addresses, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      where.push_back(reinterpret_cast<const void*>(addresses[i]));
      before.push_back(read(where.back()));
    }
  }

  bool same() const {
    Bits changed = 0;  // without a branch, so that the loads overlap: most miss every cache
    for (size_t i = 0; i < where.size(); ++i) changed |= read(where[i]) ^ before[i];
    return changed == 0;
  }
};

struct State {
  std::vector<Weight> weights;
  std::tuple<Samples<uint8_t>, Samples<uint16_t>, Samples<uint32_t>, Samples<uint64_t>> samples;
};

Weight look(Py_ssize_t position, PyObject* object) {
  const at::Tensor& tensor = THPVariable_Unpack(object);
  const auto& counter = tensor.unsafeGetTensorImpl()->version_counter();
  // A tensor made in inference mode counts no versions.
  return {position, object, tensor.const_data_ptr(), counter.enabled() ? counter.current_version() : -1};
}

struct Watch {
  PyObject_HEAD
  State* state;
};

PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *positions, *weights, *where;
  std::array<Py_ssize_t, 4> counts{};
  if (!PyArg_ParseTuple(args, "O!O!O(nnnn)", &PyList_Type, &positions, &PyList_Type, &weights, &where,
                        &counts[0], &counts[1], &counts[2], &counts[3]))
    return nullptr;
  const Py_ssize_t count = PyList_GET_SIZE(weights);
  if (PyList_GET_SIZE(positions) != count) {
    PyErr_SetString(PyExc_ValueError, "Watch: as many positions as weights are needed");
    return nullptr;
  }
  auto state = std::make_unique<State>();
  try {
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* weight = PyList_GET_ITEM(weights, i);
      const Py_ssize_t position = PyLong_AsSsize_t(PyList_GET_ITEM(positions, i));
      if (position < 0 || !THPVariable_Check(weight)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "Watch: a weight is no tensor");
        return nullptr;
      }
      state->weights.push_back(look(position, weight));
    }
    const at::Tensor& addresses = THPVariable_Unpack(where);
    if (addresses.numel() != counts[0] + counts[1] + counts[2] + counts[3]) {
      PyErr_SetString(PyExc_ValueError, "Watch: the counts are not those of the addresses");
      return nullptr;
    }
    const int64_t* next = addresses.const_data_ptr<int64_t>();
    size_t size = 0;
    std::apply([&](auto&... each) { ((each.take(next, counts[size]), next += counts[size++]), ...); },
               state->samples);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  auto* self = reinterpret_cast<Watch*>(type->tp_alloc(type, 0));
  if (self) self->state = state.release();
  return reinterpret_cast<PyObject*>(self);
}

void drop(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<Watch*>(self)->state;
  type->tp_free(self);
  Py_DECREF(type);
}

bool same(const State& state, PyObject* args) {
  const Py_ssize_t count = PyTuple_GET_SIZE(args);
  for (const Weight& was : state.weights) {
    if (was.position >= count) return false;
    PyObject* object = PyTuple_GET_ITEM(args, was.position);
    if (object != was.object) return false;
    const Weight now = look(was.position, object);
    if (now.address != was.address || now.version != was.version) return false;
  }
  // Only now: the addresses are those of memory that the arguments hold.
  return std::apply([](const auto&... each) { return (each.same() && ...); }, state.samples);
}

PyObject* matches(PyObject* self, PyObject* args) {
  if (!PyTuple_Check(args)) {
    PyErr_SetString(PyExc_TypeError, "Watch.matches: a tuple is needed");
    return nullptr;
  }
  try {
    return PyBool_FromLong(same(*reinterpret_cast<Watch*>(self)->state, args));
  } catch (const std::exception&) {
    Py_RETURN_FALSE;  // a weight that has no memory any more is not what it was
  }
}

PyMethodDef methods[] = {
    {"matches", matches, METH_O, "Whether the weights among the arguments (a tuple) are what they were."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(drop)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"sparsecc_fresh.Watch", sizeof(Watch), 0, Py_TPFLAGS_DEFAULT, slots};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "sparsecc_fresh", nullptr, -1, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_sparsecc_fresh() {
  PyObject* module = PyModule_Create(&definition);
  PyObject* type = module ? PyType_FromSpec(&spec) : nullptr;
  if (!type || PyModule_AddObject(module, "Watch", type) < 0) {
    Py_XDECREF(type);
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
