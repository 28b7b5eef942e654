// A stand-in for the CUDA runtime: devices, contexts and kernels are records, and every call is counted. Like the real
// one it makes a device's context when the device is set, and refuses a launch that was not prepared for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorInvalidClusterSize = 912
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxRegistersPerMultiprocessor = 82,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrClusterLaunch = 120
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributeNonPortableClusterSizeAllowed = 13
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

using cudaStream_t = struct CUstream_st*;
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaFuncAttributes {
    int ptxVersion, numRegs;
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace stand_in {

struct Device {
    int capability = 90, shared = 227 * 1024, processors = 132;
    bool clusters = true;
};
struct Machine {
    std::mutex mutex;
    int driver = 13000, runtime = 13000;
    std::map<int, Device> devices = {{0, {}}, {1, {}}};
    int registers = 64;        // of every kernel's threads
    int ptx = 90;              // of every kernel; 0: there is no code for the device
    int largest = 16;          // the largest cluster that may be asked for
    int room = 16;             // the largest cluster that finds a place
    bool non_portable = true;  // whether clusters beyond 8 may be allowed
    std::set<int> contexts;
    std::map<std::string, int> calls;
    std::map<std::pair<const void*, int>, int> shared, allowed;  // set by cudaFuncSetAttribute, a kernel and device
    std::set<unsigned> clusters_launched;
    std::set<int> launched_on;
    cudaError_t last = cudaSuccess;
    struct Noted {
        unsigned numbers[5];  // blocks along x and y, blocks a cluster, threads, bytes of shared memory
        std::string argument;
    };
    std::vector<Noted> noted;  // with LAUNCHES_ARE_NOTED, instead of the launches
    static thread_local int current;

    cudaError_t done(const char* call, cudaError_t error = cudaSuccess) {
        ++calls[call];
        if (error != cudaSuccess) last = error;
        return error;
    }
};
inline thread_local int Machine::current = 0;
inline Machine& machine() {
    static Machine m;
    return m;
}
using Lock = std::lock_guard<std::mutex>;

}  // namespace stand_in

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorNoKernelImageForDevice ? "no kernel image is available for execution on the device"
                                                    : "some error of the stand-in";
}
inline cudaError_t cudaGetLastError() {
    stand_in::Machine& m = stand_in::machine();
    const stand_in::Lock lock(m.mutex);
    return std::exchange(m.last, cudaSuccess);
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = stand_in::machine().driver;
    return stand_in::machine().done("driver");
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = stand_in::machine().runtime;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = stand_in::Machine::current;  // 0 where nothing was set, and no context is made
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    stand_in::Machine& m = stand_in::machine();
    const stand_in::Lock lock(m.mutex);
    stand_in::Machine::current = device;
    m.contexts.insert(device);
    return m.done("set device");
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
    const stand_in::Device& d = stand_in::machine().devices.at(device);
    switch (which) {
        case cudaDevAttrMultiProcessorCount:
            *value = d.processors;
            break;
        case cudaDevAttrMaxRegistersPerMultiprocessor:
            *value = 65536;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = d.capability / 10;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = d.capability % 10;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = d.shared;
            break;
        case cudaDevAttrClusterLaunch:
            *value = d.clusters;
            break;
    }
    return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    stand_in::Machine& m = stand_in::machine();
    const stand_in::Lock lock(m.mutex);
    attributes->ptxVersion = m.ptx;
    attributes->numRegs = m.registers;
    return m.done("attributes", m.ptx ? cudaSuccess : cudaErrorNoKernelImageForDevice);
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
    stand_in::Machine& m = stand_in::machine();
    const stand_in::Lock lock(m.mutex);
    const std::pair<const void*, int> here = {kernel, stand_in::Machine::current};
    if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        m.shared[here] = value;
        return m.done("shared");
    }
    if (!m.non_portable) return m.done("allowed", cudaErrorInvalidValue);
    m.allowed[here] = value;
    return m.done("allowed");
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel, const cudaLaunchConfig_t* config) {
    stand_in::Machine& m = stand_in::machine();
    const stand_in::Lock lock(m.mutex);
    const unsigned ranks = config->attrs[0].val.clusterDim.x;
    const std::pair<const void*, int> here = {kernel, stand_in::Machine::current};
    if (static_cast<int>(ranks) > m.largest || (ranks > 8 && !m.allowed[here]))
        return m.done("occupancy", cudaErrorInvalidClusterSize);
    *count = static_cast<int>(ranks) <= m.room && static_cast<int>(config->dynamicSmemBytes) <= m.shared[here];
    return m.done("occupancy");
}
template <class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Argument), const Argument& argument) {
    stand_in::Machine& m = stand_in::machine();
    const stand_in::Lock lock(m.mutex);
    const std::pair<const void*, int> here = {reinterpret_cast<const void*>(kernel), stand_in::Machine::current};
    const unsigned ranks = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
    if (static_cast<int>(config->dynamicSmemBytes) > std::max(48 * 1024, m.shared[here]))
        return m.done("launch", cudaErrorInvalidValue);
    if (static_cast<int>(ranks) > m.room || (ranks > 8 && !m.allowed[here]))
        return m.done("launch", cudaErrorInvalidClusterSize);
    m.clusters_launched.insert(ranks);
    m.launched_on.insert(stand_in::Machine::current);
#ifdef LAUNCHES_ARE_NOTED
    m.noted.push_back({{config->gridDim.x, config->gridDim.y, ranks, config->blockDim.x,
                        static_cast<unsigned>(config->dynamicSmemBytes)},
                       {reinterpret_cast<const char*>(&argument), sizeof argument}});
#elif defined FUSED_ATTN_EMULATE
    fused_attn::cuda::machine::launch(config->gridDim.x, static_cast<int>(config->gridDim.y), static_cast<int>(ranks),
                                      static_cast<int>(config->blockDim.x), config->dynamicSmemBytes,
                                      [&] { kernel(argument); });
#else
    (void)argument;
#endif
    return m.done("launch");
}
