// The device that a call runs on: is there a driver for it, torch's stream, what it gives a kernel, launches.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include "fit.h"

namespace fused_attn::cuda {

inline void check(cudaError_t code, const char* what) {
    STD_TORCH_CHECK(code == cudaSuccess, "fused_attn: ", what, ": ", cudaGetErrorString(code));
}

// What gives torch's current stream of a device. It lies in libtorch_cuda, which this library does not name, so that it
// loads beside a torch without CUDA; and a weak symbol would not find it: torch loads this library into a scope of its
// own, where only what it names is looked up.
using StreamOf = int32_t (*)(int32_t device, void** stream);
inline StreamOf stream_of_torch() {
    static const StreamOf function = [] {
        constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
        void* found = dlsym(RTLD_DEFAULT, kName);
        if (!found) {
            void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
            if (library) found = dlsym(library, kName);
        }
        return reinterpret_cast<StreamOf>(found);
    }();
    STD_TORCH_CHECK(function, "fused_attn: this torch has no CUDA (no libtorch_cuda.so is loaded)");
    return function;
}

// The CUDA runtime is linked in, whatever torch's is. Any driver of its major version serves it, or a newer one.
inline void require_driver() {
    static const std::string problem = []() -> std::string {
        int driver = 0, runtime = 0;
        check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
        check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
        const auto text = [](int version) {
            return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
        };
        if (driver == 0) return "there is no CUDA driver";
        if (driver / 1000 >= runtime / 1000) return "";
        return "its CUDA kernels were built with CUDA " + text(runtime) + ", this driver serves CUDA " + text(driver) +
               ": update the driver, build fused_attn with an nvcc as old as the driver, or use the triton backend";
    }();
    STD_TORCH_CHECK(problem.empty(), "fused_attn: ", problem);
}

inline int attribute(int device, cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
}

inline cudaLaunchConfig_t launch_config(dim3 grid, int threads, int ranks, int64_t bytes,
                                        cudaLaunchAttribute& cluster) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    if (ranks > 1) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = static_cast<unsigned>(ranks);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
    return config;
}

// Whether a cluster of so many blocks of the kernel, with all the shared memory there is, finds a place on the device.
inline bool has_room(const void* kernel, int ranks, int64_t bytes) {
    cudaLaunchAttribute cluster = {};
    const cudaLaunchConfig_t config =
        launch_config(dim3(static_cast<unsigned>(ranks)), kThreads, ranks, bytes, cluster);
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess) return count > 0;
    cudaGetLastError();  // the next launch is not to find it
    return false;
}

// What a device gives a kernel.
struct KernelLimits : Limits {
    int processors = 0;
};

// Asked once a kernel and device, and what a launch needs for it is set then: another thread's launch waits for that.
// The device is current.
inline KernelLimits prepare(const void* kernel, int device) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, KernelLimits> prepared;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = prepared.find({kernel, device});
    if (found != prepared.end()) return found->second;

    const int major = attribute(device, cudaDevAttrComputeCapabilityMajor);
    const int minor = attribute(device, cudaDevAttrComputeCapabilityMinor);
    STD_TORCH_CHECK(major >= 8, "fused_attn: the CUDA kernels need compute capability 8.0 or newer, CUDA device ",
                    device, " has ", major, ".", minor, "; use the triton backend");
    cudaFuncAttributes built = {};
    const cudaError_t error = cudaFuncGetAttributes(&built, kernel);
    if (error != cudaSuccess) cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "fused_attn: the CUDA kernels that were built do not run on CUDA device ",
                    device, " (", cudaGetErrorString(error), "): build fused_attn with TORCH_CUDA_ARCH_LIST=\"", major,
                    ".", minor, "\", or use the triton backend");
    KernelLimits limits;
    limits.processors = attribute(device, cudaDevAttrMultiProcessorCount);
    limits.shared = attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    limits.pairs = built.numRegs * kThreads * 2 <= attribute(device, cudaDevAttrMaxRegistersPerMultiprocessor);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limits.shared)),
          "shared memory of a block");
    // Code for older devices knows of no clusters (cluster.cuh), whatever it runs on.
    if (built.ptxVersion >= 90 && attribute(device, cudaDevAttrClusterLaunch) != 0) {
        limits.cluster = 16;  // 8 is what every such device has
        if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
            cudaGetLastError();
            limits.cluster = 8;
        }
        while (limits.cluster > 1 && !has_room(kernel, limits.cluster, limits.shared)) limits.cluster /= 2;
    }
    return prepared[{kernel, device}] = limits;
}

// Makes a device current, and the one before it on leaving: by torch, which makes no context on that one where there is
// none, and remembers for its own calls which one it is.
class OnDevice {
  public:
    explicit OnDevice(int device) : device_(with_driver(device)), guard_(device) {
        int current = -1;
        check(cudaGetDevice(&current), "cudaGetDevice");
        if (current != device_) check(cudaSetDevice(device_), "cudaSetDevice");
    }
    template <class Argument>
    KernelLimits limits(void (*kernel)(Argument)) const {
        return prepare(reinterpret_cast<const void*>(kernel), device_);
    }
    cudaStream_t stream() const {
        void* stream = nullptr;
        STD_TORCH_CHECK(stream_of_torch()(device_, &stream) == 0, "fused_attn: torch has no stream of CUDA device ",
                        device_);
        return static_cast<cudaStream_t>(stream);
    }

  private:
    static int with_driver(int device) {
        require_driver();
        return device;
    }
    int device_;
    torch::stable::accelerator::DeviceGuard guard_;
};

template <class Argument>
void launch(void (*kernel)(Argument), const Argument& argument, dim3 grid, int threads, int ranks, int64_t bytes,
            cudaStream_t stream) {
    cudaLaunchAttribute cluster = {};
    cudaLaunchConfig_t config = launch_config(grid, threads, ranks, bytes, cluster);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, argument), "launch of a resident kernel");
    check(cudaGetLastError(), "launch of a resident kernel");
}

}  // namespace fused_attn::cuda
