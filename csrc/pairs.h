// The table of a list op (launch.h, "vectors") from two Python lists of tensors, read by DLPack's C exchange API: some
// fifty nanoseconds a tensor, where each attribute in Python costs as much. No torch header: the structures below are
// DLPack's own (dmlc/dlpack, version 1.3), and the functions come from torch by a capsule.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "launch.h"

namespace curvkern::pairs {

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeApi* previous;
  void* managed[3];
  int (*read)(void* tensor, DLTensor* out);
  void* stream;
};

struct Table {
  std::vector<int64_t> rows;
  int64_t tensors = 0, chunks = 0;
  bool only_float32 = true;  // of ys
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(rows.data()); }
};

constexpr int32_t kCpu = 1;
constexpr uint32_t kVersion = 1;

// What is asked of every tensor besides its numbers.
struct Wanted {
  const ExchangeApi* api;
  PyObject *tensor, *parameter;  // the classes; a subclass may mean anything
  PyObject* requires_grad;       // the name, or null where gradients are not recorded
  PyObject* is_neg;              // the name: a view whose sign is still to be turned has the memory of what it views
};

inline int64_t dtype_code(const DLTensor& t) {
  if (t.dtype.lanes != 1) return -1;
  if (t.dtype.code == 4) return t.dtype.bits == 16 ? static_cast<int64_t>(DType::kBFloat16) : -1;
  if (t.dtype.code != 2) return -1;
  return t.dtype.bits == 32   ? static_cast<int64_t>(DType::kFloat32)
         : t.dtype.bits == 16 ? static_cast<int64_t>(DType::kFloat16)
                              : -1;
}

inline int64_t elements(const DLTensor& t) {
  int64_t n = 1;
  for (int32_t d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

// Row-major without gaps.
inline bool is_dense(const DLTensor& t, int64_t n) {
  int64_t stride = 1;
  for (int32_t d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides[d] != stride) return n == 0;
    stride *= t.shape[d];
  }
  return true;
}

inline bool answers_false(PyObject* answer) {
  Py_XDECREF(answer);  // True and False outlive it
  return answer == Py_False;
}

inline bool same_shape(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int32_t d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d]) return false;
  return true;
}

inline bool read(const Wanted& wanted, PyObject* object, DLTensor& out) {
  PyObject* kind = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (kind != wanted.tensor && kind != wanted.parameter) return false;
  if (wanted.requires_grad && !answers_false(PyObject_GetAttr(object, wanted.requires_grad)))
    return PyErr_Clear(), false;
  if (!answers_false(PyObject_CallMethodNoArgs(object, wanted.is_neg))) return PyErr_Clear(), false;
  if (wanted.api->read(object, &out) != 0) return PyErr_Clear(), false;
  const int64_t n = elements(out);
  if (!out.data && n > 0) return false;  // zeros without memory, as of forward-mode derivatives
  return out.device.type == kCpu && dtype_code(out) >= 0 && is_dense(out, n);
}

inline Wanted wanted_of(const pybind11::capsule& api, const pybind11::tuple& classes, bool recording) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const auto* found = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
  if (!found) throw pybind11::error_already_set();
  while (found && found->version.major != kVersion) found = found->previous;
  if (found && !found->read) found = nullptr;
  return {found, classes[0].ptr(), classes[1].ptr(), recording ? name : nullptr, is_neg};
}

// The table, or None unless all are plain dense tensors in memory, float32 or of 16 bits, which pair up; without ys
// each stands alone. The lists must outlive the table.
inline pybind11::object table_of(const pybind11::capsule& api, const pybind11::tuple& classes, bool recording,
                                 const pybind11::list& xs, const pybind11::list& ys, bool two) {
  const Wanted wanted = wanted_of(api, classes, recording);
  const Py_ssize_t count = PyList_GET_SIZE(xs.ptr());
  if (!wanted.api || (two && PyList_GET_SIZE(ys.ptr()) != count)) return pybind11::none();
  Table table;
  table.rows.reserve(static_cast<size_t>(count * kVectorsRow));
  for (Py_ssize_t k = 0; k < count; ++k) {
    DLTensor x{}, y{};
    if (!read(wanted, PyList_GET_ITEM(xs.ptr(), k), x)) return pybind11::none();
    if (two && (!read(wanted, PyList_GET_ITEM(ys.ptr(), k), y) || !same_shape(x, y))) return pybind11::none();
    const int64_t n = elements(x);
    const auto start = [](const DLTensor& t) { return reinterpret_cast<int64_t>(t.data) + int64_t(t.byte_offset); };
    const int64_t row[kVectorsRow] = {start(x),      two ? start(y) : 0,      n,
                                      dtype_code(x), two ? dtype_code(y) : 0, table.chunks};
    table.rows.insert(table.rows.end(), row, row + kVectorsRow);
    table.only_float32 &= two && row[4] == static_cast<int64_t>(DType::kFloat32);
    table.chunks += (n + kVectorsChunk - 1) / kVectorsChunk;
  }
  table.tensors = count;
  return pybind11::cast(std::move(table));
}

inline void bind(pybind11::module_& m) {
  pybind11::class_<Table>(m, "PairTable")
      .def_property_readonly("address", &Table::address)
      .def_readonly("tensors", &Table::tensors)
      .def_readonly("chunks", &Table::chunks)
      .def_readonly("only_float32", &Table::only_float32);
  m.def("pair_table", &table_of);
}

}  // namespace curvkern::pairs
