// dyvte_engine._C: host-side native classes. No torch header, so the only ABI it depends on is Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.h"
#include "page_allocator.h"

namespace py = pybind11;
using dyvte::PageAllocator;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = DYVTE_VERSION;
  info["compiler"] = DYVTE_COMPILER;
  info["torch_target"] = DYVTE_TORCH_TARGET;
  info["torch_built_against"] = DYVTE_TORCH_VERSION;
  info["cuda"] = static_cast<bool>(DYVTE_HAS_CUDA);
  info["cuda_reason"] = DYVTE_CUDA_REASON;
  info["cuda_version"] = DYVTE_CUDA_VERSION;
  info["cuda_archs"] = DYVTE_CUDA_ARCH_LIST;
  info["cpu_isa"] = dyvte::cpu_isa_name();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native host-side classes of dyvte_engine";
  py::register_exception<dyvte::OutOfPages>(m, "OutOfPagesError", PyExc_MemoryError);
  py::class_<PageAllocator>(m, "PageAllocator",
                            "Page numbers 0..n_pages-1 of a K/V pool; lowest numbers are handed out first.")
      .def(py::init<int64_t>(), py::arg("n_pages"))
      .def("alloc", &PageAllocator::alloc, py::arg("n"),
           "The n lowest free page numbers. Raises OutOfPagesError (a MemoryError) when fewer are free; then none is "
           "taken.")
      .def("free", &PageAllocator::free, py::arg("pages"),
           "Gives pages back. Raises ValueError for a page out of range or not in use; then none is given back.")
      .def_property_readonly("free_count", &PageAllocator::free_count)
      .def_property_readonly("used_count", &PageAllocator::used_count);
  m.def("build_info", &build_info,
        "What was built: version, compiler, torch_target, torch_built_against, cuda, cuda_version, cuda_archs; and "
        "cpu_isa, "
        "the instruction set the CPU kernels use on this machine.");
}
