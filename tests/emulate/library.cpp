// Resident kernels with the host side of their launches, as they are, for torch: on the emulated machine, behind a
// stand-in for the CUDA runtime (library.py). KERNELS: the file of csrc/cuda that is built.
#include "../../csrc/cuda/launch.h"

#define CUDA CPU                      // the key that the kernels are registered for
#undef STABLE_TORCH_LIBRARY_FRAGMENT  // what is defined there is so already where a library was built with CUDA
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) \
    [[maybe_unused]] static void defines(torch::stable::detail::StableLibrary& m)

#ifdef LIMITS_ARE_KNOWN
#define CompositeExplicitAutograd PrivateUse1  // which nobody asks
#endif

#include KERNELS

// What the host side takes from torch. A tensor on the CPU is on device -1.
extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}
}
static const bool there = stand_in::machine().devices.insert({-1, {}}).second;

#ifdef LAUNCHES_ARE_NOTED
// For benchmarks/machine_code, which asks what would be launched and runs nothing: the nth launch since the last time
// that nth was past the end, its numbers and its argument; the argument's bytes, or 0 at the end.
extern "C" AOTI_TORCH_EXPORT size_t noted_launch(size_t nth, unsigned* numbers, char* argument) {
    auto& noted = stand_in::machine().noted;
    if (nth >= noted.size()) {
        noted.clear();
        return 0;
    }
    std::memcpy(numbers, noted[nth].numbers, sizeof noted[nth].numbers);
    std::memcpy(argument, noted[nth].argument.data(), noted[nth].argument.size());
    return noted[nth].argument.size();
}
#endif
