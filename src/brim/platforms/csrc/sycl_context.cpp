// The native context of a SYCL queue, for platforms/sycl_context.py.
#include <cstdint>
#include <sycl/sycl.hpp>

extern "C" std::uint64_t brim_native_context(void *queue) noexcept {
  if (!queue) return 0;
  try {
    const sycl::context context = static_cast<sycl::queue *>(queue)->get_context();
    return reinterpret_cast<std::uint64_t>(sycl::get_native<sycl::backend::ext_oneapi_level_zero>(context));
  } catch (...) {
    return 0;  // another backend: there is no such context
  }
}
